"""Groups of processes over a stand-in for the coordination service."""

import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from coordination import Service

from colbert_jax import processes
from colbert_jax.processes import Group, PeerError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(processes, "_POLL", 0.02)


def together(work, count: int = 3) -> list:
    """What `work(group)` returns or raises in each process."""
    service = Service()

    def one(index: int):
        group = Group(index, count, service, "job")
        try:
            return work(group)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_values_by_process():
    def work(group):
        return [group.exchange("a", group.index), group.exchange("b", {"x": [group.index]})]

    assert together(work) == [[[0, 1, 2], [{"x": [0]}, {"x": [1]}, {"x": [2]}]]] * 3


def test_nobody_goes_on_before_all_have_come():
    came = []

    def work(group):
        time.sleep(0.05 * group.index)
        came.append(group.index)
        group.exchange("all here")
        return len(came)

    assert together(work) == [3, 3, 3]


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_reaches_those_who_wait(failing):
    def work(group):
        group.check()
        if group.index == failing:
            error = OSError("disk full")
            group.fail(error)
            raise error
        group.exchange("the end")

    for index, result in enumerate(together(work)):
        if index == failing:
            assert isinstance(result, OSError)
        else:
            assert isinstance(result, PeerError)
            assert str(result) == f"process {failing} failed: OSError: disk full"


def test_check_tells_without_waiting():
    service = Service()
    first, second = (Group(i, 2, service, "job") for i in range(2))
    first.check()
    second.fail(ValueError("bad"))
    second.check()  # its own failure is no news
    with pytest.raises(PeerError, match="process 1 failed: ValueError: bad"):
        first.check()


def test_different_calls_are_an_error_in_all():
    results = together(lambda group: group.exchange(f"call {group.index // 2}"))
    assert all(isinstance(result, PeerError) for result in results)
    assert "process 0 is at 'call 0', process 2 at 'call 1'" in str(results[1])


def test_one_that_never_comes():
    def work(group):
        return "elsewhere" if group.index == 1 else group.exchange("the start", seconds=0.1)

    first, _, third = together(work)
    assert isinstance(first, TimeoutError) and "process 1 did not come to 'the start'" in str(first)
    assert isinstance(third, TimeoutError)


def test_values_are_deleted_when_all_have_read_them():
    service = Service()
    groups = [Group(i, 3, service, "job") for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for n in range(5):
            together = list(pool.map(lambda group, n=n: group.exchange("x", n), groups))
            assert together == [[n] * 3] * 3
    assert {key.split("/")[1] for key in service.values} == {"4"}


def test_lanes_of_several_threads_do_not_meet():
    def work(group):
        lanes = [group.lane(), group.lane()]
        with ThreadPoolExecutor(2) as pool:
            said = [f"{name} of {group.index}" for name in ("first", "second")]
            # Process 1's threads come in the other order.
            turn = -1 if group.index == 1 else 1
            pairs = list(zip(lanes, said, strict=True))[::turn]
            return list(pool.map(lambda pair: pair[0].exchange("x", pair[1]), pairs))[::turn]

    lists = [[f"{name} of {i}" for i in range(3)] for name in ("first", "second")]
    assert together(work) == [lists] * 3


def test_a_failure_reaches_the_other_lanes():
    service = Service()
    first, second = (Group(i, 2, service, "job") for i in range(2))
    lane, _ = first.lane(), second.lane()
    second.fail(OSError("gone"))
    with pytest.raises(PeerError, match="process 1 failed: OSError: gone"):
        lane.exchange("x")


def test_waiting_ends_when_cancelled():
    with pytest.raises(CancelledError, match="nobody waits for 'x'"):
        Group(0, 2, Service(), "job").exchange("x", cancelled=lambda: True)


def test_alone():
    with processes.group("anything") as group:
        assert group.count == 1 and group.is_first
        assert group.exchange("x", 5) == [5]
        group.check()
        group.fail(OSError())
