"""Batches of ragged rows on this process's devices: one program a shape, several side by side."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from colbert_jax.batching import Batch, plan_batches
from colbert_jax.threads import num_threads

# Tokens of one batch: on a CPU its activations stay in cache; elsewhere, large enough to fill the
# device, small enough that the documents of a batch are about equally long.
TOKENS_PER_DEVICE = {"cpu": 1 << 10}
_TOKENS_PER_ACCELERATOR = 1 << 14
WINDOW = 4096  # rows tokenised, sorted and batched together, for every device
_MOST_BATCHES = 8  # side by side: more cores share the work of each

Item = TypeVar("Item")
Result = TypeVar("Result")


class BatchRunner:
    """Local devices that share the rows of every batch; parameters are on each of them."""

    def __init__(self, devices: Sequence[jax.Device] | None, longest: int):
        """
        Args:
          devices: None: all local ones.
          longest: the most tokens that a row may have.
        """
        self.devices = list(devices or jax.local_devices())
        self._longest = longest
        self._mesh = jax.sharding.Mesh(
            np.array(self.devices), ("data",), axis_types=(AxisType.Auto,)
        )
        self._on_cpu = self.devices[0].platform == "cpu"
        share = num_threads() // len(self.devices) if self._on_cpu else 1
        self.side_by_side = min(max(share, 2), _MOST_BATCHES)
        self._compiled: set[tuple[int, ...]] = set()
        self._compiling = threading.Lock()

    def windows(self, items: list[Item]) -> Iterator[list[Item]]:
        """The items in parts that are worth a sorting of their own."""
        size = WINDOW * len(self.devices)
        return (items[i : i + size] for i in range(0, len(items), size))

    def put(self, params: dict) -> dict:
        """Parameters on every device; on a CPU the arrays are taken over without a copy."""
        replicated = NamedSharding(self._mesh, PartitionSpec())
        return jax.device_put(params, replicated, may_alias=True)

    def program(self, function: Callable[..., jax.Array], arrays: int) -> Callable[..., jax.Array]:
        """function(params, *arrays) compiled so that each device runs it on its share of the rows.

        Args:
          function: to an array with the rows of its arguments.
          arrays: how many it takes behind the parameters.
        """
        rows = PartitionSpec("data")
        return jax.jit(
            jax.shard_map(
                function,
                mesh=self._mesh,
                in_specs=(PartitionSpec(), *[rows] * arrays),
                out_specs=rows,
            )
        )

    def run(self, program: Callable[..., jax.Array], params: dict, *batch: np.ndarray):
        """What a program gives for one batch, on the host."""
        shape = batch[0].shape
        arguments = jax.device_put(batch, NamedSharding(self._mesh, PartitionSpec("data")))
        if shape in self._compiled:
            result = program(params, *arguments)
        else:
            with self._compiling:  # or two threads would compile the same program
                result = program(params, *arguments)
                self._compiled.add(shape)
        return np.asarray(result)

    def for_each(self, lengths: np.ndarray, work: Callable[[Batch], None], bar: Any = None) -> None:
        """Call `work` on batches of rows of these lengths, int[N], from several threads.

        Programs that one thread starts run one after the other, those of two run side by side: on a
        CPU that keeps more of its cores busy than one program does, elsewhere the device computes
        one batch while the host fetches the last and prepares the next.
        """
        devices = len(self.devices)
        batches = plan_batches(
            lengths,
            TOKENS_PER_DEVICE.get(self.devices[0].platform, _TOKENS_PER_ACCELERATOR) * devices,
            multiple=devices,
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
    """function(item) of each item, the next one computed while the caller uses the last."""
    items = iter(items)
    with ThreadPoolExecutor(1) as host:

        def compute() -> list[Result]:
            return [function(item) for item in itertools.islice(items, 1)]

        ahead = host.submit(compute)
        while result := ahead.result():
            ahead = host.submit(compute)
            yield result[0]
