"""Where an index is searched: the CPU's kernels, one device, or the devices of a mesh.

A backend is chosen once, when an index is opened, and may be shared between threads.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from colbert_jax import runtime
from colbert_jax.config import SearchConfig
from colbert_jax.search.arrays import (
    Hits,
    IndexArrays,
    check_centroids,
    check_placed,
    with_inverse_norms,
)
from colbert_jax.search.cpu import CpuArrays, cpu_arrays, cpu_exact, cpu_search
from colbert_jax.search.exact import exact_search
from colbert_jax.search.plaid import initial_capacity, plaid_search
from colbert_jax.search.sharded import (
    shard_arrays,
    sharded_exact_search,
    sharded_plaid_search,
)

_WIDEN = 4  # times the probes for queries that found too few candidates
_INT32 = np.iinfo(np.int32).max


def choose_backend(arrays: IndexArrays, mesh: Mesh | None = None) -> Backend:
    """The backend for an index's arrays as they are on disk.

    Args:
      mesh: one axis of devices to spread the documents over. If None, the CPU's kernels where they
        run, else the default device.

    Raises:
      NotImplementedError, ValueError: more tokens than a device can hold.
    """
    if mesh is not None and mesh.devices.size > 1:
        return ShardedBackend(arrays, mesh)
    if mesh is None and runtime.use_cpu_kernels():
        return CpuBackend(arrays)
    return DeviceBackend(arrays, None if mesh is None else mesh.devices.flat[0])


class Backend(ABC):
    """PLAID and exact search over the arrays of one index.

    Both raise DamagedArrayError where they meet a code or a document out of range.
    """

    def __init__(self, arrays: IndexArrays):
        self._num_documents = len(arrays.offsets) - 1
        self._num_centroids = len(arrays.centroids)

    @abstractmethod
    def exact(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Hits:
        """The k best documents of each query by their scores on decompressed embeddings.

        Args:
          queries: float32[B, Lq, D], B >= 1; rows of zeros are padding.
          k: at most the number of documents that have a token.
        """

    def plaid(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray | None = None
    ) -> Hits:
        """The k best documents of each query by PLAID.

        A query with fewer candidates than k is searched again with more probes, and in the end
        exactly.

        Args:
          queries, k: as of `exact`.
          settings: resolved (`SearchConfig.resolve`).
        """
        positions, scores = self._plaid(queries, k, settings)
        short = np.flatnonzero((positions == self._num_documents).any(axis=1))
        if len(short):
            # Probing wider costs less than scoring everything, until it probes everything; a query
            # of zeros finds no candidates however wide.
            wider = int(settings.ncells or 1) * _WIDEN
            again = queries[short]
            if wider < self._num_centroids and again.any(axis=(1, 2)).all():
                hits = self.plaid(again, k, dataclasses.replace(settings, ncells=wider))
            else:
                hits = self.exact(again, k)
            positions[short], scores[short] = hits
        return Hits(positions, scores)

    @abstractmethod
    def _plaid(
        self, queries: np.ndarray, k: int, settings: SearchConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores [B, k], to be written to; position N where candidates ran out."""


class CpuBackend(Backend):
    """numba's kernels over mapped arrays that are never copied."""

    def __init__(self, arrays: IndexArrays):
        super().__init__(arrays)
        self._mapped = cpu_arrays(arrays)

    @functools.cached_property
    def _arrays(self) -> CpuArrays:
        """The arrays, once the first search has read all centroids, as every search does."""
        centroids = self._mapped.centroids
        check_centroids(centroids.min(), centroids.max())
        return self._mapped

    def exact(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Hits:
        return Hits(*cpu_exact(self._arrays, queries, k))

    def _plaid(
        self, queries: np.ndarray, k: int, settings: SearchConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        return cpu_search(self._arrays, queries, k, settings)


class DeviceBackend(Backend):
    """XLA's programs on one device, where the arrays are placed by the first search."""

    def __init__(self, arrays: IndexArrays, device: jax.Device | None = None):
        super().__init__(arrays)
        if len(arrays.codes) > _INT32:
            raise NotImplementedError(
                f"{len(arrays.codes)} tokens; one device holds at most {_INT32}: shard the index "
                "over several, Index.open(path, mesh=...)"
            )
        self._mapped, self._device = arrays, device
        self._lengths = np.diff(arrays.offsets)
        self._capacities = _Capacities(arrays, 1)
        self._lock = threading.Lock()
        self._placed: IndexArrays | None = None

    @property
    def arrays(self) -> IndexArrays:
        """The arrays on the device."""
        with self._lock:
            if self._placed is None:
                self._placed = self._place()
            return self._placed

    def _place(self) -> IndexArrays:
        mapped = self._mapped
        narrow = mapped._replace(
            offsets=np.asarray(mapped.offsets).astype(np.int32),  # type: ignore[arg-type]
            list_offsets=np.asarray(mapped.list_offsets).astype(np.int32),  # type: ignore[arg-type]
        )
        # On a CPU mapped arrays enter JAX without a copy; an accelerator gets its own.
        put = functools.partial(jax.device_put, device=self._device, may_alias=True)
        placed = jax.tree.map(put, narrow)
        check_placed(placed)
        return with_inverse_norms(placed)

    def exact(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Hits:
        runtime.check_process()
        return exact_search(self.arrays, self._lengths, jnp.asarray(queries), k)

    def _plaid(
        self, queries: np.ndarray, k: int, settings: SearchConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        runtime.check_process()
        search = functools.partial(plaid_search, self.arrays)
        return self._capacities.search(search, queries, k, settings)


class ShardedBackend(Backend):
    """XLA's programs over the devices of a mesh, each with its own documents.

    One search at a time: programs that talk to each other must start in the same order everywhere.
    """

    def __init__(self, arrays: IndexArrays, mesh: Mesh):
        super().__init__(arrays)
        self._lengths = np.diff(arrays.offsets)
        self._shards = shard_arrays(arrays, mesh)
        self._capacities = _Capacities(arrays, mesh.devices.size)
        self._lock = threading.Lock()

    def exact(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Hits:
        runtime.check_process()
        with self._lock:
            return sharded_exact_search(self._shards, self._lengths, queries, k)

    def _plaid(
        self, queries: np.ndarray, k: int, settings: SearchConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        runtime.check_process()
        with self._lock:
            search = functools.partial(sharded_plaid_search, self._shards)
            return self._capacities.search(search, queries, k, settings)


class _Capacities:
    """Room for candidates that was enough so far, for every length of query and number of probes:
    whoever comes next need not find it out again."""

    def __init__(self, arrays: IndexArrays, shards: int):
        self._list_lengths, self._shards = np.diff(arrays.list_offsets), shards
        self._known: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()

    def search(
        self, search: Any, queries: np.ndarray, k: int, settings: SearchConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run search(queries, k, settings, capacity) -> positions, scores, enough capacity."""
        key = queries.shape[1], int(settings.ncells or 1)
        capacity = self._known.get(key)
        if capacity is None:
            capacity = initial_capacity(self._list_lengths, *key, shards=self._shards)
        positions, scores, enough = search(queries, k, settings, capacity)
        with self._lock:
            self._known[key] = max(self._known.get(key, 0), enough)
        return positions.copy(), scores.copy()
