"""Concurrent requests as one batch: each waits a moment, or while the batch before is computed."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple


class QueueFullError(Exception):
    """As many requests wait as may."""


class _Waiting(NamedTuple):
    item: Any
    size: int
    answer: asyncio.Future
    since: float


class Gatherer:
    """Hands items to `work` in batches, one batch at a time, in a thread of its own.

    An item waits until `wait` seconds have passed, until the batch is full, or while the batch
    before it is computed. Use it in one event loop, between `start` and `stop`.
    """

    def __init__(
        self,
        work: Callable[[list[Any]], Sequence[Any]],
        *,
        wait: float,
        most: int,
        queue: int,
        name: str = "gatherer",
        observe: Callable[[int, float], None] | None = None,
    ):
        """
        Args:
          work: results of items, in their order; a result that is an exception is raised to the one
            who waits for it. If it raises, it is called again for each item alone, so that nobody
            is answered with an error of another's.
          wait: seconds, from the first item of a batch on.
          most: sizes of a batch's items together; an item that is larger is a batch of its own.
          queue: items that may wait.
          observe: told the number of items and the seconds of each batch.
        """
        self._work, self._wait, self._most, self._queue = work, wait, most, queue
        self._observe = observe
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"colbert_jax-{name}")
        self._task: asyncio.Task | None = None

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to work, in the running event loop."""
        self._changed, self._stopping = asyncio.Event(), False
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Finish all items that wait, then end."""
        if self._task is not None:
            self._stopping = True
            self._changed.set()
            await self._task
            self._task = None
        self._thread.shutdown()

    async def submit(self, item: Any, size: int = 1) -> Any:
        """The result of an item. Cancelled, the item is left out, if its batch has not begun.

        Raises:
          QueueFullError: as many items wait as may.
        """
        if self._task is None:
            raise RuntimeError("the gatherer has not been started, or has ended")
        if len(self._waiting) >= self._queue:
            self._drop_cancelled()
        if len(self._waiting) >= self._queue:
            raise QueueFullError(f"{self._queue} requests wait already")
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(item, size, answer, time.monotonic()))
        self._changed.set()
        return await answer

    def _drop_cancelled(self) -> None:
        self._waiting = collections.deque(one for one in self._waiting if not one.answer.done())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting or not self._stopping:
            if not await self._batch_is_due():
                continue
            batch = self._next_batch()
            if not batch:
                continue
            start = time.monotonic()
            results = await loop.run_in_executor(self._thread, self._results, batch)
            if self._observe is not None:
                self._observe(len(batch), time.monotonic() - start)
            for one, result in zip(batch, results, strict=True):
                if one.answer.done():  # whoever waited has left
                    continue
                if isinstance(result, BaseException):
                    one.answer.set_exception(result)
                else:
                    one.answer.set_result(result)

    async def _batch_is_due(self) -> bool:
        """Wait for something to happen; whether the items that wait are to be computed now."""
        self._changed.clear()
        if not self._waiting:
            if not self._stopping:
                await self._changed.wait()
            return False
        left = self._waiting[0].since + self._wait - time.monotonic()
        if left <= 0 or self._stopping or sum(one.size for one in self._waiting) >= self._most:
            return True
        try:
            await asyncio.wait_for(self._changed.wait(), left)
        except TimeoutError:
            return True
        return False

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        while self._waiting and (not batch or size + self._waiting[0].size <= self._most):
            one = self._waiting.popleft()
            if not one.answer.done():
                batch.append(one)
                size += one.size
        return batch

    def _results(self, batch: list[_Waiting]) -> Sequence[Any]:
        items = [one.item for one in batch]
        try:
            return self._work(items)
        except Exception as error:
            if len(items) == 1:
                return [error]
        return [self._alone(item) for item in items]

    def _alone(self, item: Any) -> Any:
        try:
            return self._work([item])[0]
        except Exception as error:
            return error
