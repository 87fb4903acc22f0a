"""Search over an index that is sharded by documents over the devices of a mesh.

Each device holds a contiguous range of documents, in arrays of common sizes, and all centroids. It
runs the program of one device (`search.plaid`) on its range; every cut, and the final ranking, is
taken over the documents of all devices, so that results do not depend on the number of devices.
Several processes (`jax.distributed`) each read their devices' ranges from disk, call search with
the same queries and get the same full results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from colbert_jax.batching import ladder_length, next_power_of_two
from colbert_jax.compression.sharding import auto_mesh, replicate
from colbert_jax.config import SearchConfig
from colbert_jax.embeddings import document_ranges
from colbert_jax.progress import progress_bar
from colbert_jax.search import plaid
from colbert_jax.search.arrays import (
    Hits,
    IndexArrays,
    best_of,
    check_lists,
    check_placed,
    concatenate_hits,
    join_lists,
    result_size,
    token_inverse_norms,
)
from colbert_jax.search.exact import QUERIES, TOKENS, score_documents
from colbert_jax.search.learned import LearnedArrays

_INT32 = np.iinfo(np.int32).max
_LIST_BLOCK = 1 << 22  # entries of the inverted lists read at a time
_REPLICATED = ("centroids", "bucket_weights")
_JOINED = ("recent_lists", "recent_list_offsets")  # in no placed arrays


@dataclass(frozen=True)
class ShardedArrays:
    """An index on the devices of a mesh.

    Attributes:
      arrays: each array is that of device 0, then of device 1 and so on; offsets, lists and
        positions count from a device's first token and document. Centroids and bucket weights are
        on every device.
      bounds: int[S+1] on the host; device s holds documents bounds[s]..bounds[s+1]-1.
      first: int32[S], sharded, the first document of each device.
      mesh: of one axis, over which the documents are sharded.
      learned: vectors and scales as `arrays`, the rest on every device; None: there are none.
    """

    arrays: IndexArrays
    bounds: np.ndarray
    first: jax.Array
    mesh: Mesh
    learned: LearnedArrays | None = None

    @property
    def axis(self) -> str:
        """The name of the mesh axis."""
        return self.mesh.axis_names[0]


def shard_arrays(
    arrays: IndexArrays, mesh: Mesh, learned: LearnedArrays | None = None
) -> ShardedArrays:
    """Place an index on a mesh, in ranges of documents with about equally many tokens.

    A process reads only the parts of its devices, and copies one of them into its memory at a time.

    Args:
      arrays: on the host, mapped from disk; offsets may be int64, without `inverse_norms`.
      mesh: of one axis.
      learned: on the host.

    Raises:
      ValueError: the mesh has several axes, or a device would hold more than 2^31 - 1 tokens.
      DamagedArrayError: a value out of range.
    """
    mesh = auto_mesh(mesh)
    arrays = join_lists(arrays)
    shards = mesh.devices.size
    offsets = np.asarray(arrays.offsets, np.int64)
    bounds = document_ranges(offsets, shards)
    starts, stops = offsets[bounds[:-1]], offsets[bounds[1:]]
    tokens, documents = int((stops - starts).max()), int(np.diff(bounds).max())
    if tokens > _INT32:
        raise ValueError(
            f"{offsets[-1]} tokens on {shards} devices put {tokens} on one of them; the most is "
            f"{_INT32}: use more devices"
        )
    # All ranges are read with the largest size, so some end with tokens of the next, never used.
    starts = np.minimum(starts, offsets[-1] - tokens)

    def local_offsets(s: int) -> np.ndarray:
        local = offsets[bounds[s] : bounds[s + 1] + 1] - starts[s]
        return np.pad(local, (0, documents + 1 - len(local)), mode="edge").astype(np.int32)

    lists: Any = arrays.lists
    list_offsets = np.asarray(arrays.list_offsets)
    entries = int(max(_count_entries(lists, bounds).max(), 1))

    def local_lists(s: int) -> tuple[np.ndarray, np.ndarray]:
        local, local_starts = split_lists(lists, list_offsets, bounds[s], bounds[s + 1])
        return np.pad(local, (0, entries - len(local))), local_starts

    place = partial(_place, mesh)
    placed = IndexArrays(
        *(replicate(mesh, getattr(arrays, name)) for name in _REPLICATED),
        *place(lambda s: (arrays.codes[starts[s] : starts[s] + tokens],), 1),
        *place(lambda s: (arrays.residuals[starts[s] : starts[s] + tokens],), 1),
        *place(lambda s: (local_offsets(s),), 1),
        *place(local_lists, 2),
    )
    check_placed(placed, int(bounds[-1]))
    placed = placed._replace(inverse_norms=_norms(placed, mesh=mesh))
    (first,) = place(lambda s: (bounds[s : s + 1].astype(np.int32),), 1)
    if learned is None:
        return ShardedArrays(placed, bounds, first, mesh)

    def local_rows(s: int) -> tuple[np.ndarray, np.ndarray]:
        rows = (column[bounds[s] : bounds[s + 1]] for column in (learned.vectors, learned.scales))
        vectors, scales = map(np.asarray, rows)
        pad = documents - len(scales)
        return np.pad(vectors, [(0, pad), (0, 0)]), np.pad(scales, (0, pad))

    same = replicate(mesh, (learned.landmarks, learned.projection))
    return ShardedArrays(placed, bounds, first, mesh, LearnedArrays(*same, *place(local_rows, 2)))


def split_lists(
    lists: np.ndarray, list_offsets: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Take the entries of inverted lists that are documents start..stop-1.

    Args:
      lists, list_offsets: as in `IndexArrays`, on the host.

    Returns:
      int32[n], positions counted from `start`, and the list offsets int32[K + 1].
    """
    parts, counts, total = [np.zeros(0, np.int32)], np.zeros(len(list_offsets), np.int64), 0
    for at in range(0, len(lists), _LIST_BLOCK):
        block = np.asarray(lists[at : at + _LIST_BLOCK])
        local = (block >= start) & (block < stop)
        before = np.concatenate([[0], np.cumsum(local)])
        ends = (list_offsets > at) & (list_offsets <= at + len(block))
        counts[ends] = total + before[list_offsets[ends] - at]
        total += int(before[-1])
        parts.append((block[local] - start).astype(np.int32))
    return np.concatenate(parts), counts.astype(np.int32)


def sharded_plaid_search(
    sharded: ShardedArrays,
    queries: np.ndarray,
    k: int,
    settings: SearchConfig,
    capacity: int,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Run `plaid.plaid_search` over all devices; `capacity` is that of each device."""
    ndocs, size, counts = plaid.sizes_of(settings, k)
    ncells = int(settings.ncells or 1)
    static: dict[str, Any] = dict(ncells=ncells, ndocs=ndocs, k=size, counts=counts)
    if allowed is not None:
        static["allowed"] = _shard_allowed(sharded, allowed)
    return _widening(sharded, queries, k, settings, capacity, static)


def sharded_learned_search(
    sharded: ShardedArrays,
    queries: np.ndarray,
    k: int,
    settings: SearchConfig,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Run `plaid.learned_search` over all devices."""
    ndocs, size, counts = plaid.sizes_of(settings, k, share=1)
    static: dict[str, Any] = dict(ncells=1, ndocs=ndocs, k=size, counts=counts)
    static["learned"] = sharded.learned
    if allowed is not None:
        static["allowed"] = _shard_allowed(sharded, allowed)
    return _widening(sharded, queries, k, settings, max(ndocs, size), static)[:2]


def _shard_allowed(sharded: ShardedArrays, allowed: np.ndarray) -> jax.Array:
    documents = (len(sharded.arrays.offsets) // sharded.mesh.devices.size) - 1
    (placed,) = _place(sharded.mesh, lambda s: (_part(allowed, sharded.bounds, s, documents),), 1)
    return placed


def sharded_score_few(
    sharded: ShardedArrays,
    queries: np.ndarray,
    k: int,
    settings: SearchConfig,
    given: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Run `plaid.score_few` over all devices, each with those of the documents that it has."""
    room, size = plaid.room_for_few(settings, k)
    bounds = sharded.bounds

    def local(s: int) -> tuple[np.ndarray]:
        own = given[(given >= bounds[s]) & (given < bounds[s + 1])] - bounds[s]
        return _padded([own], room, 0)

    (placed,) = _place(sharded.mesh, local, 1)
    static = dict(ncells=1, ndocs=1, k=size, given=placed)
    return _widening(sharded, queries, k, settings, room, static)[:2]


def _widening(
    sharded: ShardedArrays,
    queries: np.ndarray,
    k: int,
    settings: SearchConfig,
    capacity: int,
    arguments: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray, int]:
    memory = plaid.memory_of(sharded.first)

    def search(queries: np.ndarray, threshold: np.float32, capacity: int) -> plaid.SearchResult:
        return _plaid(
            sharded.arrays,
            sharded.first,
            replicate(sharded.mesh, queries),
            threshold,
            capacity=capacity,
            mesh=sharded.mesh,
            memory=memory,
            **arguments,
        )

    positions, scores, capacity = plaid.widening(search, queries, settings, capacity)
    positions = np.minimum(positions[:, :k], sharded.bounds[-1]).astype(np.int32)
    return positions, scores[:, :k], capacity


def _part(allowed: np.ndarray, bounds: np.ndarray, s: int, documents: int) -> np.ndarray:
    """bool[documents], the s-th device's part, padded."""
    own = allowed[bounds[s] : bounds[s + 1]]
    return np.pad(own, (0, documents - len(own)))


def sharded_exact_search(
    sharded: ShardedArrays,
    lengths: np.ndarray,
    queries: np.ndarray,
    k: int,
    allowed: np.ndarray | None = None,
    *,
    progress: bool | None = False,
) -> Hits:
    """Run `exact.exact_search` over all devices, each going through its documents by length.

    Args:
      lengths: int[N], tokens of each document, on the host.
      queries: float32[B, Lq, D].
      k: at most the number of allowed documents that have a token.
      allowed: bool[N], the documents to score. If None, all.
    """
    if len(queries) > QUERIES:
        parts = [queries[i : i + QUERIES] for i in range(0, len(queries), QUERIES)]
        return concatenate_hits(
            [
                sharded_exact_search(sharded, lengths, part, k, allowed, progress=progress)
                for part in parts
            ]
        )
    mesh, bounds = sharded.mesh, sharded.bounds
    batch, size_k = next_power_of_two(len(queries)), result_size(k)
    padded = np.pad(queries, [(0, batch - len(queries)), (0, 0), (0, 0)]).astype(np.float32)
    replicated = replicate(mesh, padded)
    local = [lengths[bounds[s] : bounds[s + 1]] for s in range(len(bounds) - 1)]
    best = _place(mesh, lambda s: (np.full((batch, size_k), np.inf, np.float32),), 1) + _place(
        mesh, lambda s: (np.full((batch, size_k), _INT32, np.int32),), 1
    )
    with progress_bar(int((lengths > 0).sum()), "exact scoring", "doc", progress) as bar:
        for length, rows in _steps(local):
            size = max(map(len, rows))
            size = min(next_power_of_two(size), max(TOKENS // length, 1))
            if allowed is not None:  # in the sizes of a search in all documents
                rows = [row[allowed[bounds[s] + row]] for s, row in enumerate(rows)]
            for at in range(0, max(map(len, rows)), size):
                chosen = [row[at : at + size] for row in rows]
                positions = _place(mesh, partial(_padded, chosen, size), 1)
                best = _merge(
                    sharded.arrays,
                    sharded.first,
                    replicated,
                    *positions,
                    *best,
                    length=length,
                    mesh=mesh,
                )
                bar.update(sum(map(len, chosen)))
    negated, positions = jax.device_get(_gather(*best, mesh=mesh))
    return Hits(positions[: len(queries), :k], -negated[: len(queries), :k])


def _steps(lengths: Sequence[np.ndarray]) -> list[tuple[int, list[np.ndarray]]]:
    """Padded lengths, and for each the documents of every device that have it."""
    padded = [np.array([ladder_length(int(n)) if n else 0 for n in part], int) for part in lengths]
    steps = sorted({int(length) for part in padded for length in np.unique(part)} - {0})
    return [(step, [np.flatnonzero(part == step) for part in padded]) for step in steps]


def _padded(chosen: Sequence[np.ndarray], size: int, s: int) -> tuple[np.ndarray]:
    padding = size - len(chosen[s])
    return (np.pad(chosen[s], (0, padding), constant_values=_INT32).astype(np.int32),)


def _place(mesh: Mesh, part: Callable[[int], tuple[Any, ...]], count: int) -> list[Any]:
    """Arrays whose s-th part is on device s, made for this process's devices in turn.

    Args:
      part: s -> `count` arrays, of the same shapes for every s.
    """
    (axis,) = mesh.axis_names
    sharding = NamedSharding(mesh, P(axis))
    columns: list[list[jax.Array]] = [[] for _ in range(count)]
    for s, device in enumerate(mesh.devices.flat):
        if device.process_index == jax.process_index():
            for column, array in zip(columns, part(s), strict=True):
                column.append(jax.block_until_ready(jax.device_put(array, device)))
    shards = mesh.devices.size
    return [
        jax.make_array_from_single_device_arrays(
            (shards * column[0].shape[0], *column[0].shape[1:]), sharding, column
        )
        for column in columns
    ]


def _count_entries(lists: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """int64[S], entries of the inverted lists in each range of documents.

    Raises DamagedArrayError for one that is in none.
    """
    counts = np.zeros(len(bounds) - 1, np.int64)
    for at in range(0, len(lists), _LIST_BLOCK):
        block = lists[at : at + _LIST_BLOCK]
        check_lists(block.min() >= 0 and block.max() < bounds[-1], int(bounds[-1]))
        owners = np.searchsorted(bounds, block, side="right") - 1
        counts += np.bincount(owners, minlength=len(counts))
    return counts


def _specs(axis: str) -> Any:
    specs = {name: P() if name in _REPLICATED else P(axis) for name in IndexArrays._fields}
    return IndexArrays(**specs | dict.fromkeys(_JOINED))  # type: ignore[arg-type]


def _shard_map(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    # The results of an all_gather are equal on all devices, which the check cannot know.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


@partial(jax.jit, static_argnames="mesh")
def _norms(arrays, *, mesh):
    (axis,) = mesh.axis_names
    specs = _specs(axis)._replace(inverse_norms=None)
    return _shard_map(token_inverse_norms, mesh, (specs,), P(axis))(arrays)


@partial(jax.jit, static_argnames=("mesh", "ncells", "ndocs", "k", "capacity", "memory"))
def _plaid(
    arrays,
    first,
    queries,
    threshold,
    counts=None,
    allowed=None,
    given=None,
    learned=None,
    *,
    mesh,
    **settings,
):
    (axis,) = mesh.axis_names

    def search(arrays, first, queries, threshold, counts, allowed, given, learned):
        local = dict(counts=counts, allowed=allowed, given=given, learned=learned)
        return plaid.search_batch(
            arrays, queries, threshold, first=first[0], axis=axis, **local, **settings
        )

    vectors: Any = P() if learned is None else (P(), P(), P(axis), P(axis))
    vectors = vectors if learned is None else LearnedArrays(*vectors)
    in_specs = (_specs(axis), P(axis), P(), P(), P(), P(axis), P(axis), vectors)
    return _shard_map(search, mesh, in_specs, P())(
        arrays, first, queries, threshold, counts, allowed, given, learned
    )


@partial(jax.jit, static_argnames=("length", "mesh"))
def _merge(arrays, first, queries, positions, best_negated, best_positions, *, length, mesh):
    """The running top k of each device with n more of its documents."""
    (axis,) = mesh.axis_names

    def merge(arrays, first, queries, positions, best_negated, best_positions):
        scores = score_documents(arrays, queries, positions, length=length)
        positions = jnp.where(positions < len(arrays.offsets) - 1, first[0] + positions, _INT32)
        negated = jnp.concatenate([best_negated, -scores], axis=1)
        merged = jnp.concatenate(
            [best_positions, jnp.broadcast_to(positions, scores.shape)], axis=1
        )
        return best_of(negated, merged, best_positions.shape[1])

    specs = (_specs(axis), P(axis), P(), P(axis), P(axis), P(axis))
    return _shard_map(merge, mesh, specs, (P(axis), P(axis)))(
        arrays, first, queries, positions, best_negated, best_positions
    )


@partial(jax.jit, static_argnames="mesh")
def _gather(negated, positions, *, mesh):
    (axis,) = mesh.axis_names
    merge = partial(best_of, k=negated.shape[1], axis=axis)
    return _shard_map(merge, mesh, (P(axis), P(axis)), (P(), P()))(negated, positions)
