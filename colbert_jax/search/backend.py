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
    list_lengths,
)
from colbert_jax.search.cpu import (
    CpuArrays,
    cpu_arrays,
    cpu_exact,
    cpu_learned,
    cpu_search,
    with_fixed_point,
)
from colbert_jax.search.exact import exact_search
from colbert_jax.search.learned import LearnedArrays, check_learned
from colbert_jax.search.placement import place, place_learned, place_with_room
from colbert_jax.search.plaid import initial_capacity, learned_search, plaid_search, score_few
from colbert_jax.search.sharded import (
    shard_arrays,
    sharded_exact_search,
    sharded_learned_search,
    sharded_plaid_search,
    sharded_score_few,
)

_WIDEN = 4  # times the probes for queries that found too few candidates
_WIDER_FOR_ALLOWED = 2  # times that probes are widened where few documents are allowed
_INT32 = np.iinfo(np.int32).max


@runtime.apart()
def choose_backend(
    arrays: IndexArrays, mesh: Mesh | None = None, learned: LearnedArrays | None = None
) -> Backend:
    """The backend for an index's arrays as they are on disk.

    Args:
      learned: as they are on disk; None: the index has none.
      mesh: one axis of devices to spread the documents over. If None, the CPU's kernels where they
        run, else the default device.

    Raises:
      NotImplementedError, ValueError: more tokens than a device can hold.
    """
    if mesh is not None and mesh.devices.size > 1:
        return ShardedBackend(arrays, mesh, learned)
    if mesh is None and runtime.use_cpu_kernels():
        return CpuBackend(arrays, learned)
    return DeviceBackend(arrays, None if mesh is None else mesh.devices.flat[0], learned)


class Backend(ABC):
    """PLAID, learned and exact search over the arrays of one index.

    All raise DamagedArrayError where they meet a code, a document or a number out of range.
    """

    def __init__(self, arrays: IndexArrays, learned: LearnedArrays | None):
        self._num_documents = len(arrays.offsets) - 1
        self._num_centroids = len(arrays.centroids)
        self._unchecked = learned

    @functools.cached_property
    def _learned(self) -> LearnedArrays:
        """On the host, checked once."""
        assert self._unchecked is not None
        check_learned(self._unchecked)
        return self._unchecked

    @abstractmethod
    def grown(self, arrays: IndexArrays, learned: LearnedArrays | None = None) -> Backend:
        """The backend for arrays that continue those of this one, which stays usable.

        Args:
          arrays: on the host; documents and centroids have been added at the end, or none.
          learned: of all these documents, if there are any.
        """

    @runtime.apart()
    def exact(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Hits:
        """The k best documents of each query by their scores on decompressed embeddings.

        Args:
          queries: float32[B, Lq, D], B >= 1; rows of zeros are padding.
          k: at most the number of allowed documents that have a token; may be 0.
          allowed: bool[N], the documents that may be found, on the host. If None, all.
        """
        if k == 0:
            return _nothing(len(queries))
        return self._exact(queries, k, self._selective(allowed))

    @runtime.apart()
    def plaid(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray | None = None
    ) -> Hits:
        """The k best documents of each query by PLAID.

        Only documents that are allowed become candidates, so that every later cut is among them. A
        query with fewer candidates than k is searched again with more probes, and in the end
        exactly. Where no more are allowed than PLAID scores exactly for one query, these are scored
        exactly at once. Where at most a quarter are allowed, four times as many lists are probed,
        and sixteen times where at most a sixteenth is: the candidates are no more than those of a
        search in all documents.

        Args:
          queries, k, allowed: as of `exact`.
          settings: resolved (`SearchConfig.resolve`).
        """
        if k == 0:
            return _nothing(len(queries))
        allowed = self._selective(allowed)
        if allowed is not None:
            count = int(np.count_nonzero(allowed))
            if count <= max(int(settings.ndocs or 1) // 4, k):
                return self._few(queries, k, settings, allowed)
            # The best of a few documents are less near to the query than the best of all are.
            ncells = int(settings.ncells or 1)
            for _ in range(_WIDER_FOR_ALLOWED):
                count *= _WIDEN
                if count <= self._num_documents:
                    ncells *= _WIDEN
            settings = dataclasses.replace(settings, ncells=ncells)
        return self._until_enough(queries, k, settings, allowed)

    @runtime.apart()
    def learned(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray | None = None
    ) -> Hits:
        """The k best of the `ndocs` documents that learned vectors predict to be the best.

        Where no more are allowed, these are scored.

        Args: as of `plaid`; the index has learned vectors.
        """
        if k == 0:
            return _nothing(len(queries))
        allowed = self._selective(allowed)
        ndocs = int(settings.ndocs or 1)
        if allowed is not None and np.count_nonzero(allowed) <= max(ndocs, k):
            return self._few(queries, k, dataclasses.replace(settings, ndocs=4 * ndocs), allowed)
        return Hits(*self._by_learned(queries, k, settings, allowed))

    @abstractmethod
    def _by_learned(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores [B, k]."""

    def _until_enough(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray | None
    ) -> Hits:
        positions, scores = self._plaid(queries, k, settings, allowed)
        short = np.flatnonzero((positions == self._num_documents).any(axis=1))
        if len(short):
            # Probing wider costs less than scoring everything, until it probes everything; a query
            # of zeros finds no candidates however wide.
            wider = int(settings.ncells or 1) * _WIDEN
            again = queries[short]
            if wider < self._num_centroids and again.any(axis=(1, 2)).all():
                settings = dataclasses.replace(settings, ncells=wider)
                hits = self._until_enough(again, k, settings, allowed)
            else:
                hits = self._exact(again, k, allowed)
            positions[short], scores[short] = hits
        return Hits(positions, scores)

    @abstractmethod
    def _exact(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> Hits:
        """See `exact`; k >= 1."""

    def _few(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray
    ) -> Hits:
        """As `_exact`, where at most max(ndocs // 4, k) documents are allowed."""
        return self._exact(queries, k, allowed)

    @abstractmethod
    def _plaid(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores [B, k], to be written to; position N where candidates ran out."""

    def _selective(self, allowed: np.ndarray | None) -> np.ndarray | None:
        """bool[N]; None where all are allowed. Raises ValueError for another shape."""
        if allowed is None:
            return None
        allowed = np.asarray(allowed, bool)
        if allowed.shape != (self._num_documents,):
            raise ValueError(
                f"allowed must be [{self._num_documents}], one for each document, got "
                f"{list(allowed.shape)}"
            )
        return None if allowed.all() else allowed


def _nothing(batch: int) -> Hits:
    return Hits(np.zeros((batch, 0), np.int32), np.zeros((batch, 0), np.float32))


class CpuBackend(Backend):
    """numba's kernels over mapped arrays that are never copied."""

    def __init__(self, arrays: IndexArrays, learned: LearnedArrays | None = None):
        super().__init__(arrays, learned)
        self._mapped = cpu_arrays(arrays)

    @functools.cached_property
    def _arrays(self) -> CpuArrays:
        """The arrays, once the first search has read all centroids, as every search does."""
        centroids = self._mapped.centroids
        check_centroids(centroids.min(), centroids.max())
        return with_fixed_point(self._mapped)

    def grown(self, arrays: IndexArrays, learned: LearnedArrays | None = None) -> Backend:
        return CpuBackend(arrays, learned)

    @functools.cached_property
    def _with_token(self) -> np.ndarray | None:
        """bool[N], the documents that have a token; None: all."""
        found = np.diff(self._mapped.offsets) > 0
        return None if found.all() else found

    def _by_learned(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._with_token is not None:
            allowed = self._with_token if allowed is None else allowed & self._with_token
        return cpu_learned(self._arrays, self._learned, queries, k, settings, allowed)

    def _exact(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> Hits:
        return Hits(*cpu_exact(self._arrays, queries, k, allowed))

    def _plaid(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        return cpu_search(self._arrays, queries, k, settings, allowed)


class DeviceBackend(Backend):
    """XLA's programs on one device, where the arrays are placed by the first search."""

    def __init__(
        self,
        arrays: IndexArrays,
        device: jax.Device | None = None,
        learned: LearnedArrays | None = None,
    ):
        super().__init__(arrays, learned)
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
        # Those of an earlier state of the index, and how many of its first tokens they hold.
        self._former: tuple[IndexArrays, int] | None = None

    @property
    def arrays(self) -> IndexArrays:
        """The arrays on the device."""
        with self._lock:
            if self._placed is None:
                self._placed = self._place()
            return self._placed

    def _place(self) -> IndexArrays:
        cpu = runtime.on_cpu() if self._device is None else self._device.platform == "cpu"
        if cpu and self._former is None:  # room would take a copy of mapped arrays
            placed = place(self._mapped, self._device)
        else:
            placed = place_with_room(self._mapped, self._device, *(self._former or ()))
        check_placed(placed, self._num_documents)
        self._former = None
        return placed

    @functools.cached_property
    def _placed_learned(self) -> LearnedArrays:
        """On the device, with as much room as the arrays."""
        return place_learned(self._learned, self._device, len(self.arrays.offsets) - 1)

    def _by_learned(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        runtime.check_process()
        arrays = self.arrays
        if allowed is not None:
            allowed = np.pad(allowed, (0, len(arrays.offsets) - 1 - len(allowed)))
        return learned_search(arrays, self._placed_learned, queries, k, settings, allowed)

    def grown(self, arrays: IndexArrays, learned: LearnedArrays | None = None) -> Backend:
        """Only what is new is copied to the device, beside inverted lists and learned vectors."""
        grown = DeviceBackend(arrays, self._device, learned)
        grown._capacities.learn(self._capacities)
        with self._lock:
            placed, former = self._placed, self._former
        grown._former = former if placed is None else (placed, len(self._mapped.codes))
        return grown

    def _exact(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> Hits:
        runtime.check_process()
        return exact_search(self.arrays, self._lengths, jnp.asarray(queries), k, allowed)

    def _few(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray
    ) -> Hits:
        runtime.check_process()
        given = _by_length(allowed, self._lengths)
        return Hits(*score_few(self.arrays, queries, k, settings, given))

    def _plaid(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        runtime.check_process()
        arrays = self.arrays
        room = len(arrays.offsets) - 1
        if allowed is not None:
            allowed = np.pad(allowed, (0, room - len(allowed)))
        search = functools.partial(plaid_search, arrays, allowed=allowed)
        positions, scores = self._capacities.search(search, queries, k, settings)
        return np.minimum(positions, self._num_documents), scores


class ShardedBackend(Backend):
    """XLA's programs over the devices of a mesh, each with its own documents.

    One search at a time: programs that talk to each other must start in the same order everywhere.
    """

    def __init__(self, arrays: IndexArrays, mesh: Mesh, learned: LearnedArrays | None = None):
        super().__init__(arrays, learned)
        self._lengths = np.diff(arrays.offsets)
        self._mesh = mesh
        if self._lengths.any():  # else there is nothing to find, and nothing is searched
            checked = None if learned is None else self._learned
            self._shards = shard_arrays(arrays, mesh, checked)
        self._capacities = _Capacities(arrays, mesh.devices.size)
        self._lock = threading.Lock()

    def grown(self, arrays: IndexArrays, learned: LearnedArrays | None = None) -> Backend:
        return ShardedBackend(arrays, self._mesh, learned)

    def _by_learned(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        runtime.check_process()
        with self._lock:
            return sharded_learned_search(self._shards, queries, k, settings, allowed)

    def _exact(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> Hits:
        runtime.check_process()
        with self._lock:
            return sharded_exact_search(self._shards, self._lengths, queries, k, allowed)

    def _few(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray
    ) -> Hits:
        runtime.check_process()
        given = _by_length(allowed, self._lengths)
        with self._lock:
            return Hits(*sharded_score_few(self._shards, queries, k, settings, given))

    def _plaid(
        self, queries: np.ndarray, k: int, settings: SearchConfig, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        runtime.check_process()
        with self._lock:
            search = functools.partial(sharded_plaid_search, self._shards, allowed=allowed)
            return self._capacities.search(search, queries, k, settings)


def _by_length(allowed: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int32[n], the allowed documents that have a token, short ones first."""
    documents = np.flatnonzero(allowed & (lengths > 0))
    return documents[np.argsort(lengths[documents], kind="stable")].astype(np.int32)


class _Capacities:
    """Room for candidates that was enough so far, for every length of query and number of probes:
    whoever comes next need not find it out again."""

    def __init__(self, arrays: IndexArrays, shards: int):
        self._list_lengths, self._shards = list_lengths(arrays), shards
        self._known: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()

    def learn(self, other: _Capacities) -> None:
        """What was enough for the same index when it was smaller."""
        with other._lock:
            self._known.update(other._known)

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
