"""Host threads for loops that release the GIL."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


@functools.cache
def num_threads() -> int:
    """The cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def spread(worker: Callable[[int], None], threads: int) -> None:
    """Run worker(0), ..., worker(threads - 1) side by side, the last of them here."""
    others = [_pool().submit(worker, lane) for lane in range(threads - 1)]
    try:
        worker(threads - 1)
    finally:
        for other in others:
            other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads(), thread_name_prefix="colbert_jax")


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
