"""Ragged rows to a few static shapes (length ladder, token-budget batches), and the local devices
that run them: one program a shape, several side by side."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from colbert_jax.runtime import apart, check_process, num_threads

# Padding is a share of the work and every step a program to compile: steps of 16 where most
# passages are, of about an eighth beyond.
LADDER = (
    *(16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 180),
    *(208, 232, 256, 300, 344, 400, 456, 512),
)
_WORTH_SPLITTING = 512  # tokens that two programs side by side do faster than one
# Tokens of one batch: on a CPU its activations stay in cache; elsewhere, large enough to fill the
# device, small enough that the documents of a batch are about equally long.
TOKENS_PER_DEVICE = {"cpu": 1 << 10}
_TOKENS_PER_ACCELERATOR = 1 << 14
WINDOW = 4096  # rows tokenised, sorted and batched together, for every device
_MOST_BATCHES = 8  # side by side: more cores share the work of each

Item = TypeVar("Item")
Result = TypeVar("Result")


def ladder_length(length: int, longest: int | None = None, ladder: Sequence[int] = LADDER) -> int:
    """Round a row's length up to the next step of the ladder, doubling beyond its end.

    `longest` caps the result (a model's number of positions); it must not be below `length`.
    """
    step = next((step for step in ladder if step >= length), ladder[-1])
    while step < length:
        step *= 2
    return step if longest is None else min(step, longest)


def next_power_of_two(n: int) -> int:
    """Round up to a power of two, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


class Batch(NamedTuple):
    """rows: positions of the batch's rows; size: rows to pad to; length: columns to pad to."""

    rows: np.ndarray
    size: int
    length: int


def plan_batches(
    lengths: np.ndarray,
    token_budget: int,
    *,
    multiple: int = 1,
    longest: int | None = None,
    parallel: int = 1,
) -> Iterator[Batch]:
    """Cut rows, longest first, into batches of about `token_budget` tokens.

    A batch has the ladder length of its longest row, and all full batches of one length have the
    same shape, so a run compiles few programs. The last rows, too few for a full batch, are cut
    into powers of two.

    Args:
      lengths: int[N], the rows' lengths.
      token_budget: tokens of a full batch, padding included.
      multiple: every size is a multiple of this (the number of devices).
      longest: see `ladder_length`.
      parallel: batches that run side by side; the last rows are shared among that many.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        step = ladder_length(int(lengths[order[start]]), longest)
        size = max(token_budget // (step * multiple), 1) * multiple
        left = len(order) - start
        if left * step < _WORTH_SPLITTING:
            rest = next_power_of_two(left)
        else:
            rest = _power_of_two_near(-(-left // parallel))
        size = min(size, -(-rest // multiple) * multiple)
        rows = order[start : start + size]
        yield Batch(rows, size, step)
        start += len(rows)


def _power_of_two_near(n: int) -> int:
    """The next power of two if n rows fill more than three quarters of it, else the one before."""
    above = next_power_of_two(n)
    return above if 4 * n > 3 * above else above // 2


def pad_rows(rows: Sequence[np.ndarray], size: int, length: int, fill: int = 0) -> np.ndarray:
    """[size, length] of the rows' dtype, each row at the left, the rest `fill`."""
    padded = np.full((size, length), fill, rows[0].dtype if rows else np.int32)
    for target, row in zip(padded, rows, strict=False):
        target[: len(row)] = row
    return padded


def over_rows(
    function: Callable[..., Any], mesh: jax.sharding.Mesh, arrays: int
) -> Callable[..., Any]:
    """Compile function(params, *arrays) so that each device runs it on its share of the rows.

    Args:
      function: returns arrays with as many rows as its arguments.
      mesh: the devices.
      arrays: how many arrays it takes after the parameters.
    """
    rows = PartitionSpec("data")
    in_specs = (PartitionSpec(), *[rows] * arrays)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=rows))


class BatchRunner:
    """Runs programs on local devices, which share the rows of a batch and each hold parameters."""

    def __init__(self, devices: Sequence[jax.Device] | None, longest: int):
        """
        Args:
          devices: If None, all local devices.
          longest: the most tokens that a row may have.
        """
        check_process()
        self.devices = list(devices or jax.local_devices())
        self._longest = longest
        self.mesh = jax.sharding.Mesh(
            np.array(self.devices), ("data",), axis_types=(AxisType.Auto,)
        )
        self._on_cpu = self.devices[0].platform == "cpu"
        share = num_threads() // len(self.devices) if self._on_cpu else 1
        self.side_by_side = min(max(share, 2), _MOST_BATCHES)
        self._compiled: set[tuple[Any, ...]] = set()
        self._compiling = threading.Lock()

    def windows(self, items: Any) -> Iterator[Any]:
        """Cut items into parts that are sorted by length one at a time."""
        size = WINDOW * len(self.devices)
        return (items[i : i + size] for i in range(0, len(items), size))

    @apart()
    def put(self, params: dict) -> dict:
        """Put parameters on every device; on a CPU the arrays are used without a copy."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return jax.device_put(params, replicated, may_alias=True)

    def program(self, function: Callable[..., Any], arrays: int) -> Callable[..., Any]:
        """See `over_rows`; on the devices of this runner."""
        return over_rows(function, self.mesh, arrays)

    @apart()
    def run(self, program: Callable[..., Any], params: dict, *batch: np.ndarray):
        """Run a program on one batch and fetch the result."""
        check_process()
        known = program, batch[0].shape
        arguments = jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec("data")))
        if known in self._compiled:
            result = program(params, *arguments)
        else:
            with self._compiling:  # or two threads would compile the same program
                result = program(params, *arguments)
                self._compiled.add(known)
        return jax.tree.map(np.asarray, result)

    @property
    def _tokens(self) -> int:
        """Of a batch."""
        here = TOKENS_PER_DEVICE.get(self.devices[0].platform, _TOKENS_PER_ACCELERATOR)
        return here * len(self.devices)

    def rows_of(self, length: int) -> int:
        """Rows of one length, in tokens, that fill a batch: a power of two for each device."""
        devices = len(self.devices)
        share = self._tokens // (length * devices)
        return devices << max(share.bit_length() - 1, 0)

    def padded_rows(self, count: int) -> int:
        """Rows that `count` rows are padded to: a power of two for each device."""
        devices = len(self.devices)
        return devices * next_power_of_two(-(-count // devices))

    def for_each(self, lengths: np.ndarray, work: Callable[[Batch], None], bar: Any = None) -> None:
        """Call `work` on batches of rows of these lengths, int[N], from several threads.

        Programs that one thread starts run one after the other, those of two run side by side: on a
        CPU that keeps more of its cores busy than one program does, elsewhere the device computes
        one batch while the host fetches the last and prepares the next.
        """
        batches = plan_batches(
            lengths,
            self._tokens,
            multiple=len(self.devices),
            longest=self._longest,
            parallel=self.side_by_side if self._on_cpu else 1,
        )

        def count(batch: Batch) -> int:
            work(batch)
            return len(batch.rows)

        with ThreadPoolExecutor(self.side_by_side) as host:
            for done in host.map(count, batches):
                if bar is not None:
                    bar.update(done)


def one_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function(item) of each item; the next is computed while the caller uses the last."""
    items = iter(items)
    with ThreadPoolExecutor(1) as host:

        def compute() -> list[Result]:
            return [function(item) for item in itertools.islice(items, 1)]

        ahead = host.submit(compute)
        while result := ahead.result():
            ahead = host.submit(compute)
            yield result[0]
