"""Requests that wait for each other: which batches they become, and who is told what."""

import asyncio
import threading

import pytest

from colbert_jax.serving.gatherer import Gatherer, QueueFullError


def run(work, scenario, **settings):
    """The batches that `work` was given, and what the scenario returns."""
    batches: list[list] = []

    def noted(items):
        batches.append(list(items))
        return work(items)

    async def whole():
        gatherer = Gatherer(noted, **{"wait": 0.0, "most": 8, "queue": 100} | settings)
        gatherer.start()
        try:
            return await scenario(gatherer)
        finally:
            await gatherer.stop()

    return batches, asyncio.run(whole())


def double(items):
    return [2 * item for item in items]


def test_concurrent_items_are_one_batch_and_answered_in_their_order():
    async def scenario(gatherer):
        return await asyncio.gather(*(gatherer.submit(n) for n in range(5)))

    batches, results = run(double, scenario, wait=0.2)
    assert batches == [[0, 1, 2, 3, 4]] and results == [0, 2, 4, 6, 8]


def test_a_full_batch_does_not_wait():
    async def scenario(gatherer):
        many = asyncio.gather(*(gatherer.submit(n) for n in range(16)))
        return await asyncio.wait_for(many, 5)

    batches, results = run(double, scenario, wait=60.0)
    assert [len(batch) for batch in batches] == [8, 8] and results == double(range(16))


def test_sizes_count_and_a_large_item_is_alone():
    async def scenario(gatherer):
        sizes = [3, 5, 9, 1]
        return await asyncio.gather(*(gatherer.submit(n, n) for n in sizes))

    batches, _ = run(double, scenario, wait=0.05)
    assert batches == [[3, 5], [9], [1]]


def test_items_that_come_during_a_batch_are_the_next_one():
    begun, go_on = threading.Event(), threading.Event()

    def work(items):
        begun.set()
        assert go_on.wait(10)
        return items

    async def scenario(gatherer):
        first = asyncio.ensure_future(gatherer.submit(0))
        await asyncio.to_thread(begun.wait, 10)
        others = [asyncio.ensure_future(gatherer.submit(n)) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        go_on.set()
        return await asyncio.gather(first, *others)

    batches, results = run(work, scenario)
    assert batches == [[0], [1, 2, 3]] and results == [0, 1, 2, 3]


def test_the_queue_is_bounded_and_those_who_left_make_room():
    begun, go_on = threading.Event(), threading.Event()

    def work(items):
        begun.set()
        assert go_on.wait(10)
        return items

    async def scenario(gatherer):
        tasks = [asyncio.ensure_future(gatherer.submit(0))]
        await asyncio.to_thread(begun.wait, 10)
        tasks += [asyncio.ensure_future(gatherer.submit(n)) for n in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="2 requests wait already"):
            await gatherer.submit(3)
        tasks[1].cancel()
        await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(gatherer.submit(4)))
        await asyncio.sleep(0)
        go_on.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    batches, results = run(work, scenario, queue=2)
    assert batches == [[0], [2, 4]]  # nothing is computed for one who has left
    assert isinstance(results.pop(1), asyncio.CancelledError) and results == [0, 2, 4]


def test_nobody_is_told_of_anothers_error():
    def work(items):
        if 3 in items:
            raise ValueError("three")
        return [KeyError("five") if item == 5 else item for item in items]

    async def scenario(gatherer):
        tasks = (gatherer.submit(n) for n in (2, 3, 4, 5))
        return await asyncio.gather(*tasks, return_exceptions=True)

    _, results = run(work, scenario, wait=0.05)
    assert results[0] == 2 and results[2] == 4
    assert isinstance(results[1], ValueError) and isinstance(results[3], KeyError)


def test_stop_finishes_what_waits():
    async def whole():
        gatherer = Gatherer(double, wait=60.0, most=8, queue=9)
        gatherer.start()
        tasks = [asyncio.ensure_future(gatherer.submit(n)) for n in range(3)]
        await asyncio.sleep(0)
        await gatherer.stop()
        with pytest.raises(RuntimeError, match="has ended"):
            await gatherer.submit(1)
        return [await task for task in tasks]

    assert asyncio.run(whole()) == [0, 2, 4]
