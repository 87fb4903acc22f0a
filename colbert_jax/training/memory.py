"""Whether a training step fits into memory, before the first one is made.

What a step takes is what XLA has planned for its program; what is free is asked of the devices, or
on a CPU of the machine. Later batches can be longer than the first: what the settings allow is held
against memory too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax

from colbert_jax import runtime
from colbert_jax.config import TrainingConfig
from colbert_jax.progress import LOGGER
from colbert_jax.training.batch import ExampleBatch, TokenBatch
from colbert_jax.training.loader import num_groups

# Gives the compiled gradients of a batch, of arrays or `jax.ShapeDtypeStruct`, under settings.
Compile = Callable[[TrainingConfig, ExampleBatch], Any]
LARGEST = 256  # queries that "auto" takes at most
_TRIES = 4  # sizes that are compiled to find one that fits
_SHARE = 0.9  # of what is free: so much may take what a message names


class Room(NamedTuple):
    """What there is for a step.

    free: bytes, see `free_memory`; None where nobody says.
    lengths: the most tokens of a query and of a document.
    """

    free: int | None
    lengths: tuple[int, int]


def check_memory(
    config: TrainingConfig,
    batch: ExampleBatch,
    devices: Sequence[jax.Device],
    room: Room,
    compiled: Compile,
) -> None:
    """Raise ValueError where the gradients of a micro-batch do not fit into what is free.

    The message names the largest batch that fits, and settings under which this one does; so they
    do with the longest texts. Warns where this batch fits and the longest may not.

    Args:
      batch: of all processes, on the devices.
      devices: of the whole job.
    """
    free = room.free
    if free is None:
        return
    micro, rows, count = len(batch.queries.ids), len(batch.order), len(devices)

    def taken(program: Any, accumsteps: int = config.accumsteps) -> int:
        return step_memory(program, devices, accumulating=accumsteps > 1)

    @cache
    def program(queries: int) -> Any:
        return compiled(config, resized(batch, queries, room.lengths))

    def needed(queries: int) -> int:
        return taken(program(queries))

    now = taken(compiled(config, batch))
    LOGGER.info(
        "a step of bsize %s takes about %s, and %s of memory are free",
        *(config.bsize, _size(now), _size(free)),
    )
    if now <= free:
        # No part of what a step takes grows faster than the square of a length, so most batches
        # are through without a program that may never be run.
        grown = _grown(batch, room.lengths)
        if now * grown**2 > free and (most := needed(micro)) > free:
            runtime.warn(
                f"the first step of bsize {config.bsize} takes about {_size(now)}, but one of "
                f"queries of {room.lengths[0]} and documents of {room.lengths[1]} tokens would "
                f"take {_size(most)}, and {_size(free)} of memory are free. If there are such "
                "texts, lower bsize or chunk, or raise accumsteps"
            )
        return
    fitting = int(_SHARE * free)
    fits = _largest(micro, count, fitting, needed)
    ways = []
    chunk = 1 << max((fits * rows // micro // count).bit_length() - 2, 0)  # half of what fits
    if chunk < (config.chunk or rows // count):
        longest = resized(batch, micro, room.lengths)
        if taken(compiled(dataclasses.replace(config, chunk=chunk), longest)) <= fitting:
            ways.append(f"chunk {chunk}, which changes nothing else")
    # Cut finer, all gradients so far are kept beside those of a micro-batch.
    parts = [n for n in range(2, micro + 1) if micro % (n * count) == 0 and micro // n <= fits]
    for n in parts[:_TRIES]:
        if taken(program(micro // n), 2) <= fitting:
            ways.append(f"accumsteps {n * config.accumsteps}")
            break
    least = count * config.accumsteps
    smaller = f"bsize {fits * config.accumsteps} fits" if fits else f"not even bsize {least} fits"
    also = f", and this one does with {' or '.join(ways)}" if ways else ""
    raise ValueError(
        f"a step of bsize {config.bsize} takes about {_size(now)}, and "
        f"{_size(free)} of memory are free: {smaller}{also}"
    )


def fitting_batch(
    config: TrainingConfig,
    batch: ExampleBatch,
    state: Any,
    most: int,
    devices: Sequence[jax.Device],
    room: Room,
    compiled: Callable[[ExampleBatch], Any],
) -> int:
    """The largest `bsize` that leaves a tenth of what is free with the longest texts, of those that
    are that of `config` times a power of two, up to `LARGEST` and `most`.

    Where none fits it is the one of `config`, which `check_memory` then refuses.

    Args:
      config: with the smallest `bsize`.
      batch: a micro-batch of that, of all processes, on the devices.
      state: shapes of all that is on the devices during a step, with their shardings.
      compiled: gives the compiled gradients of a micro-batch of `jax.ShapeDtypeStruct`.
    """
    if room.free is None:
        LOGGER.info("bsize auto: nobody says how much memory is free, so it is 32 or near it")
    count = len(_local(devices)) if devices[0].platform == "cpu" else 1
    kept = count * sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    free = math.inf if room.free is None else _SHARE * (room.free - kept)
    least, size = config.batch_size, config.batch_size
    largest = 32 if room.free is None else LARGEST
    while 2 * size <= min(largest, most):
        size *= 2
    taken = 0
    while room.free is not None:
        program = compiled(resized(batch, size // config.accumsteps, room.lengths))
        taken = step_memory(program, devices, accumulating=config.accumsteps > 1)
        if taken <= free or size == least:
            break
        # Almost linear, so that this is nearly always the next guess.
        wanted = size * free / taken
        size //= 2
        while size > max(wanted, least):
            size //= 2
    LOGGER.info("bsize auto: %d queries a step", size)
    return size


def _grown(batch: ExampleBatch, lengths: tuple[int, int]) -> float:
    """How many times longer queries or documents can be than those of the batch."""
    seen = [(lengths[0], batch.queries), *((lengths[1], group) for group in batch.documents)]
    return max(1.0, *(most / rows.ids.shape[1] for most, rows in seen))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _largest(most: int, multiple: int, free: int, needed: Callable[[int], int]) -> int:
    """The largest number of queries found that fits, a multiple; 0 if none does.

    What is needed grows almost linearly: each guess is where the line through the last two sizes
    meets what is free.
    """
    known = [(most, needed(most))]
    size = int(most * free / known[0][1])
    for _ in range(_TRIES):
        size = min(size, known[-1][0] - multiple) // multiple * multiple
        if size < multiple:
            return 0
        known.append((size, needed(size)))
        if known[-1][1] <= free:
            return size
        (x1, y1), (x2, y2) = known[-2:]
        size = int(x2 - (y2 - free) * (x1 - x2) / max(y1 - y2, 1))
    return 0


def step_memory(program: Any, devices: Sequence[jax.Device], *, accumulating: bool = False) -> int:
    """Bytes that the gradients of a batch take beside what is there before, of a device, or on a
    CPU of all devices of this process."""
    stats = program.memory_analysis()
    if stats is None:
        return 0
    one = stats.temp_size_in_bytes + (1 + accumulating) * stats.output_size_in_bytes
    return one * (len(_local(devices)) if devices[0].platform == "cpu" else 1)


def free_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that are free on the fullest of this process's devices, or in the machine where they
    are CPUs; None where nobody says."""
    if devices[0].platform == "cpu":
        return available_memory()
    stats = [device.memory_stats() or {} for device in _local(devices)]
    free = [one["bytes_limit"] - one["bytes_in_use"] for one in stats if "bytes_limit" in one]
    return min(free, default=None)


def _local(devices: Sequence[jax.Device]) -> list[jax.Device]:
    return [device for device in devices if device.process_index == jax.process_index()]


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take without swapping; None where the system does not say.

    Linux: what the kernel calls available, and what the process's control group and its limit on
    addresses leave.

    Args:
      root: where `proc` and `sys` are.
    """
    free = []
    for line in _lines(root / "proc/meminfo"):
        name, value, *_ = line.split()
        if name == "MemAvailable:":
            free.append(1024 * int(value))
    group = root / "sys/fs/cgroup"
    for most, used, stat, unused in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        limit, now = (next(iter(_lines(group / name)), "") for name in (most, used))
        if limit.isdigit() and now.isdigit():
            stats = dict(line.split()[:2] for line in _lines(group / stat))
            free.append(max(int(limit) - int(now) + int(stats.get(unused, 0)), 0))
    addresses = _address_limit()
    pages = next(iter(_lines(root / "proc/self/statm")), "")
    if addresses is not None and pages:
        free.append(max(addresses - int(pages.split()[0]) * _page(), 0))
    return min(free, default=None)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _address_limit() -> int | None:
    """Bytes of addresses that the process may have (`ulimit -v`); None if it may have all."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _page() -> int:
    import resource

    return resource.getpagesize()


def resized(batch: ExampleBatch, queries: int, lengths: tuple[int, int]) -> ExampleBatch:
    """The shapes of a batch of another number of queries, all texts of the greatest length."""
    rows = len(batch.order) // len(batch.queries.ids) * queries
    shards = batch.order.sharding.num_devices
    groups = num_groups(rows, shards, len(batch.documents))

    def like(n: int, tree: Any, *length: int) -> Any:
        def one(x: Any) -> jax.ShapeDtypeStruct:
            shape = (n, *length) if x.ndim == 2 and length else (n, *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

        return jax.tree.map(one, tree)

    documents: tuple[TokenBatch, ...] = tuple(
        like(rows // groups, group, lengths[1]) for group in batch.documents[:groups]
    )
    passages = batch.passages
    if passages is not None:
        passages = like(queries, passages)._replace(documents=like(rows, passages.documents))
    return ExampleBatch(
        like(queries, batch.queries, lengths[0]),
        documents,
        like(rows, batch.order),
        like(queries, batch.scores),
        passages,
        like(queries, batch.images),
    )
