"""PLAID (Santhanam et al., 2022, section 4): centroids find candidates, residuals score a few.

For each query:
  1. probe: the `ncells` best centroids of each query token; the documents of their inverted lists
     are the candidates;
  2. pruned centroid interaction: MaxSim with each token replaced by its centroid, without tokens
     whose centroid scores below the threshold for every query token; the best `ndocs` go on;
  3. full centroid interaction; the best `ndocs / 4` go on;
  4. exact MaxSim on the compressed tokens (`scoring.residual`).

Where an index has learned vectors (`search.learned`), stages 1 to 3 can be one product with them,
and its best `ndocs` are scored exactly.

A batch of queries is one program of static shapes. Documents are positions in the index, from 0.
The candidates of a query fill the front of its row of [B, C], short documents first, and are scored
in blocks of documents and tiles of tokens: as many blocks as are filled, as many tiles as the
longest document of a block has. If candidates do not fit, none is dropped: the program reports how
many there are, and `plaid_search` runs it again with room for them.

Over an index that is sharded by documents the same program runs on every device (`axis` names the
mesh axis): each device has candidates among its documents, and each cut keeps the best of all
devices.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.batching import next_power_of_two
from colbert_jax.config import SearchConfig
from colbert_jax.scoring.residual import token_maxima
from colbert_jax.scoring.slots import field_weights, slot_major
from colbert_jax.search.arrays import IndexArrays, best_of, result_size
from colbert_jax.search.learned import LearnedArrays, predicted_scores

PRUNED = -9999.0  # a query token's best score where pruning left no token: ColBERT's constant
_TILE = 32  # tokens
_CLASSES = 31  # classes of document lengths in tiles, the last for all longer documents
_FEWEST_ENTRIES = 64
_FEWEST_RESULTS = 16
_MOST_ENTRIES = 1 << 26  # so that class * entries + index stays below 2^31
_PADDING = np.iinfo(np.int32).max  # in place of a position: no document
# Where it exists: a `top_k` that is faster on GPUs and returns equal values in any order.
_UNSTABLE = (
    {"is_stable": False} if "is_stable" in inspect.signature(jax.lax.top_k).parameters else {}
)


class Memory(NamedTuple):
    """Limits on the memory of a search program, for a kind of device.

    batch: bytes of centroid scores and candidates; queries that exceed it are searched in turn.
    block: token similarities of a block of documents.
    """

    batch: int
    block: int


# A CPU's blocks stay in its cache; an accelerator wants few and large ones.
_CPU = Memory(1 << 26, 1 << 19)
_ACCELERATOR = Memory(1 << 30, 1 << 24)


class SearchResult(NamedTuple):
    """The best documents of each query, best first.

    positions: int32[B, k].
    scores: float32[B, k].
    entries: int32[], the most entries of inverted lists that a query probed.
    """

    positions: jax.Array
    scores: jax.Array
    entries: jax.Array


def plaid_search(
    arrays: IndexArrays,
    queries: jax.Array | np.ndarray,
    k: int,
    settings: SearchConfig,
    capacity: int,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Search a batch of queries, widening the capacity until every candidate fits.

    Args:
      arrays: with `inverse_norms`.
      queries: float32[B, Lq, D], B >= 1; rows of zeros are padding.
      k: results for each query.
      settings: resolved (`SearchConfig.resolve`).
      capacity: room for this many entries of the inverted lists that a query probes, repetitions
        included: a power of two, see `initial_capacity`.
      allowed: bool[N], the documents that may be candidates. If None, all.

    Returns:
      positions int32[B, k] and scores float32[B, k], best first, equal scores by the smaller
      position; a query with fewer than k candidates is filled up with position N and -inf. And the
      capacity that was enough.

    Raises:
      ValueError: the inverted lists that a query probes have more than 2^26 entries.
    """
    memory = memory_of(arrays.codes)
    ndocs, size, counts = sizes_of(settings, k)

    def search(queries: np.ndarray, threshold: np.float32, capacity: int) -> SearchResult:
        static = (int(settings.ncells or 1), ndocs, size, capacity, memory)
        return _search_batch(arrays, queries, threshold, *static, counts, allowed)

    positions, scores, capacity = widening(search, queries, settings, capacity)
    return positions[:, :k], scores[:, :k], capacity


def score_few(
    arrays: IndexArrays,
    queries: jax.Array | np.ndarray,
    k: int,
    settings: SearchConfig,
    given: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Score a few documents exactly, as PLAID's last stage does.

    Args:
      arrays, queries, settings: as for `plaid_search`.
      k: results for each query, at most as many as are given.
      given: int32[n], documents with a token; n at most what `room_for_few` says.

    Returns:
      positions and scores, as `plaid_search`.
    """
    room, size = room_for_few(settings, k)
    given = np.pad(given, (0, room - len(given)), constant_values=_PADDING)
    static = (1, 1, size, room, memory_of(arrays.codes), None, None, given)
    positions, scores, _ = widening(
        lambda queries, threshold, _: _search_batch(arrays, queries, threshold, *static),
        queries,
        settings,
        room,
    )
    return positions[:, :k], scores[:, :k]


def learned_search(
    arrays: IndexArrays,
    learned: LearnedArrays,
    queries: jax.Array | np.ndarray,
    k: int,
    settings: SearchConfig,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Score exactly the documents that learned vectors predict to be the best.

    Args:
      arrays, queries, allowed: as for `plaid_search`.
      learned: of as many documents as `arrays`.
      k: results for each query, at most the number of documents with a token that are allowed.
      settings: resolved; of these `ndocs`, how many are scored exactly.

    Returns:
      positions and scores, as `plaid_search`.
    """
    ndocs, size, counts = sizes_of(settings, k, share=1)
    static = (1, ndocs, size, max(ndocs, size), memory_of(arrays.codes))
    positions, scores, _ = widening(
        lambda queries, threshold, _: _search_batch(
            arrays, queries, threshold, *static, counts, allowed, None, learned
        ),
        queries,
        settings,
        static[3],
    )
    return positions[:, :k], scores[:, :k]


def room_for_few(settings: SearchConfig, k: int) -> tuple[int, int]:
    """How many documents, and results, a program of `score_few` has room for.

    At least as many documents as PLAID scores exactly.
    """
    ndocs, size, _ = sizes_of(settings, k)
    return max(ndocs // 4, size), size


def sizes_of(settings: SearchConfig, k: int, share: int = 4) -> tuple[int, int, np.ndarray | None]:
    """What a program for k results is compiled for, so that all k share a few programs.

    Args:
      share: of `ndocs`, which part is scored exactly.

    Returns:
      ndocs and k of the program; and how many candidates its two cuts keep, int32[2], where these
      depend on k. If None, as many as ndocs says, whatever k is: shapes, and results to the bit,
      are then those of a program for this k alone.
    """
    ndocs = int(settings.ndocs or 1)
    exact = ndocs // share
    if k < exact:
        return ndocs, min(result_size(k), exact), None
    counts = np.array([max(ndocs, k), max(exact, k)], np.int32)
    size = _FEWEST_RESULTS
    while size < k:
        size *= 4
    return next_power_of_two(ndocs), size, counts


def widening(
    search: Callable[[np.ndarray, np.float32, int], SearchResult],
    queries: jax.Array | np.ndarray,
    settings: SearchConfig,
    capacity: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Run a search program, and run it again with more room if candidates did not fit.

    The number of queries is padded to a power of two and their rows to a multiple of eight, so that
    batches of any size share a few programs. The host waits for the device once in each run.

    Args:
      search: (queries, threshold, capacity) -> result.
      queries, settings, capacity: as for `plaid_search`.

    Returns, raises: as `plaid_search`.
    """
    batch, length, _ = queries.shape
    padded = np.pad(
        np.asarray(queries, np.float32),
        [(0, next_power_of_two(batch) - batch), (0, -length % 8), (0, 0)],
    )
    threshold = np.float32(settings.centroid_score_threshold)
    while True:
        positions, scores, entries = jax.device_get(search(padded, threshold, capacity))
        if entries <= capacity:
            return positions[:batch], scores[:batch], capacity
        if entries > _MOST_ENTRIES:
            raise ValueError(
                f"ncells={settings.ncells} probes inverted lists of {entries} entries, more than "
                f"{_MOST_ENTRIES}: use a smaller ncells, or exact search"
            )
        capacity = next_power_of_two(int(entries))


def initial_capacity(
    list_lengths: np.ndarray, query_length: int, ncells: int, shards: int = 1
) -> int:
    """Choose a capacity: twice the expected entries of a query in a shard, at most all of them.

    The chance that a list is probed is taken to be in proportion to its length.

    Args:
      list_lengths: int[K], entries of each inverted list.
      query_length: Lq.
      ncells: inverted lists that are probed for each query token.
      shards: devices that the documents are spread over.
    """
    probes = min(query_length * ncells, len(list_lengths))
    total = max(int(list_lengths.sum()), 1)
    expected = 2 * probes * float(np.square(list_lengths, dtype=np.float64).sum()) / total
    longest = np.partition(list_lengths, -probes)[-probes:].sum()
    entries = next_power_of_two(int(min(expected / shards, longest)))
    return min(max(entries, _FEWEST_ENTRIES), _MOST_ENTRIES)


def memory_of(array: jax.Array) -> Memory:
    """Return the limits on the memory of a program on the devices of `array`."""
    platform = next(iter(array.devices())).platform
    return _CPU if platform == "cpu" else _ACCELERATOR


@partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _search_batch(
    arrays,
    queries,
    threshold,
    ncells,
    ndocs,
    k,
    capacity,
    memory,
    counts=None,
    allowed=None,
    given=None,
    learned=None,
):
    return search_batch(
        arrays,
        queries,
        threshold,
        ncells=ncells,
        ndocs=ndocs,
        k=k,
        capacity=capacity,
        memory=memory,
        counts=counts,
        allowed=allowed,
        given=given,
        learned=learned,
    )


def search_batch(
    arrays: IndexArrays,
    queries: jax.Array,
    threshold: jax.Array,
    *,
    ncells: int,
    ndocs: int,
    k: int,
    capacity: int,
    memory: Memory,
    counts: jax.Array | None = None,
    allowed: jax.Array | None = None,
    given: jax.Array | None = None,
    learned: LearnedArrays | None = None,
    first: jax.Array | int = 0,
    axis: str | None = None,
) -> SearchResult:
    """Run all stages for queries [B, Lq, D], as many at a time as `memory` allows.

    Args:
      arrays, queries, k, capacity: as for `plaid_search`.
      threshold: float32[], see `SearchConfig`; so are ncells and ndocs.
      counts: int32[2], see `sizes_of`; at most what ndocs and k make of them, which it is if None.
      allowed: bool[N], the documents in `arrays` that may be candidates. If None, all.
      given: int32[capacity], documents to score exactly, padded; if None, they are found.
      learned: finds candidates in place of PLAID's first stages; if None, these do.
      first: int32[], position in the collection of the first document in `arrays`.
      axis: the mesh axis that the documents are sharded over, inside `jax.shard_map`. If None, one
        device has them all.

    Returns:
      positions in the collection. Where there is no result they are the number of documents in
      `arrays` (with an axis, the largest int32), and the score is -inf.
    """
    num_centroids, batch, length = len(arrays.centroids), *queries.shape[:2]
    each = 8 * num_centroids * length + 32 * capacity
    if learned is not None:
        each += 16 * len(learned.scales)
    size = min(batch, max(next_power_of_two(memory.batch // each + 1) // 2, 1))
    search = partial(
        _search_part,
        arrays,
        threshold=threshold,
        ncells=ncells,
        ndocs=ndocs,
        k=k,
        capacity=capacity,
        block=memory.block,
        counts=counts,
        allowed=allowed,
        given=given,
        learned=learned,
        first=first,
        axis=axis,
    )
    parts = jax.lax.map(search, queries.reshape(-1, size, *queries.shape[1:]))
    positions, scores, entries = parts
    return SearchResult(positions.reshape(batch, -1), scores.reshape(batch, -1), entries.max())


def _search_part(
    arrays,
    queries,
    *,
    threshold,
    ncells,
    ndocs,
    k,
    capacity,
    block,
    counts,
    allowed,
    given,
    learned,
    first,
    axis,
) -> SearchResult:
    num_documents = len(arrays.offsets) - 1
    table = centroid_scores(arrays.centroids, queries)
    entries = jnp.zeros(len(queries), jnp.int32)
    if given is not None:
        positions = jnp.broadcast_to(given, (len(queries), capacity))
    elif learned is not None:
        n, count = max(ndocs, k), None if counts is None else counts[0]
        positions = predicted_best(arrays, learned, queries, n, count, allowed, first, axis)
    else:
        cells = probe(table, queries, ncells)
        positions, entries = candidates(arrays, cells, capacity, allowed)
        real = (queries != 0).any(axis=-1)
        kept = table.max(axis=-1, where=real[:, None], initial=-jnp.inf) >= threshold
        for i, (n, counted) in enumerate(((ndocs, kept), (ndocs // 4, None))):
            approximate = centroid_interaction(arrays, table, positions, counted, block)
            size, count = max(n, k), None if counts is None else counts[i]
            positions = cut(positions, approximate, size, num_documents, first, axis, count=count)
    exact = exact_scores(arrays, queries, table, positions, block)

    positions = jnp.where(positions < num_documents, first + positions, _PADDING)
    negated, positions = best_of(-exact, positions, k, axis)
    missing = [(0, 0), (0, k - positions.shape[1])]
    positions = jnp.pad(positions, missing, constant_values=_PADDING)
    scores = jnp.pad(-negated, missing, constant_values=-jnp.inf)
    entries = entries.max()
    if axis is None:
        return SearchResult(jnp.minimum(positions, num_documents), scores, entries)
    return SearchResult(positions, scores, jax.lax.pmax(entries, axis))


def centroid_scores(centroids: jax.Array, queries: jax.Array) -> jax.Array:
    """Multiply every centroid with every query token: float32[B, K, Lq]."""
    return jnp.einsum(
        "kd,bqd->bkq",
        centroids,
        queries,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def probe(table: jax.Array, queries: jax.Array, ncells: int) -> jax.Array:
    """Find the best `ncells` centroids of each query token.

    A query row of zeros is padding and probes nothing.

    Args:
      table: float32[B, K, Lq], centroid scores.

    Returns:
      int32[B, Lq * ncells], ascending, repetitions and padding replaced by K.
    """
    batch, num_centroids, _ = table.shape
    _, cells = jax.lax.top_k(table.swapaxes(1, 2), min(ncells, num_centroids))
    real = (queries != 0).any(axis=-1, keepdims=True)
    cells = jnp.sort(jnp.where(real, cells, num_centroids).reshape(batch, -1))
    return jnp.where(_is_first(cells), cells, num_centroids)


def candidates(
    arrays: IndexArrays, cells: jax.Array, capacity: int, allowed: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Collect the distinct documents of the probed inverted lists.

    It takes two sorts, the second of keys that combine a document's length class and its rank.

    Args:
      cells: int32[B, ...], centroids, ascending; K stands for no centroid.
      allowed: bool[N], no others are collected. If None, all are allowed.

    Returns:
      int32[B, capacity], short documents first, then by position, padded with N; and int32[B], the
      entries that the lists of each query have. If these exceed `capacity`, documents are missing.
    """
    num_documents = len(arrays.offsets) - 1
    positions, entries = jax.vmap(partial(_list_entries, arrays, capacity=capacity))(cells)
    positions = jnp.sort(positions)
    chosen = _is_first(positions)
    if allowed is not None:
        chosen &= allowed[jnp.minimum(positions, num_documents - 1)]
    return _short_first(arrays.offsets, positions, chosen), entries


def _short_first(offsets: jax.Array, positions: jax.Array, chosen: jax.Array) -> jax.Array:
    """The chosen documents that have a token, short ones first, then in their order.

    Args:
      positions: int32[B, C]; those from N on are padding.
      chosen: bool[B, C].

    Returns:
      int32[B, C], padded with N.
    """
    capacity = positions.shape[1]
    _, length = token_spans(offsets, positions)
    classes = jnp.minimum((length - 1) // _TILE, _CLASSES - 1)
    classes = jnp.where(chosen & (length > 0), classes, _CLASSES)
    key = jnp.sort(classes * capacity + jnp.arange(capacity, dtype=jnp.int32))
    positions = jnp.take_along_axis(positions, key % capacity, axis=1)
    return jnp.where(key < _CLASSES * capacity, positions, len(offsets) - 1)


def predicted_best(
    arrays: IndexArrays,
    learned: LearnedArrays,
    queries: jax.Array,
    n: int,
    count: jax.Array | None,
    allowed: jax.Array | None,
    first: jax.Array | int,
    axis: str | None,
) -> jax.Array:
    """Find the n documents with the best predicted scores; of equal ones the smaller position.

    Args:
      queries: float32[B, Lq, D].
      n, count, first, axis: as for `cut`.
      allowed: as for `candidates`.

    Returns:
      int32[B, min(n, N)], short documents first, padded with N.
    """
    num_documents = len(arrays.offsets) - 1
    scores = predicted_scores(learned, queries)
    eligible = jnp.diff(arrays.offsets) > 0
    if allowed is not None:
        eligible &= allowed
    positions = jnp.where(eligible, jnp.arange(num_documents, dtype=jnp.int32), num_documents)
    positions = jnp.broadcast_to(positions, scores.shape)
    scores = jnp.where(eligible, scores, -jnp.inf)
    best = cut(positions, scores, n, num_documents, first, axis, count=count)
    return _short_first(arrays.offsets, best, best < num_documents)


def _list_entries(
    arrays: IndexArrays, cells: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """The entries of some inverted lists in a row, padded with N, and their number."""
    num_documents, num_centroids = len(arrays.offsets) - 1, len(arrays.list_offsets) - 1
    real = cells < num_centroids
    cells = jnp.minimum(cells, num_centroids - 1)
    start = arrays.list_offsets[cells]
    sizes = jnp.where(real, arrays.list_offsets[cells + 1] - start, 0)
    ends = jnp.cumsum(sizes)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    cell = jnp.minimum(jnp.searchsorted(ends, slot, side="right"), len(cells) - 1)
    entry = (start - ends + sizes)[cell] + slot
    filled = slot < ends[-1]
    return jnp.where(filled, arrays.lists[jnp.where(filled, entry, 0)], num_documents), ends[-1]


def token_spans(offsets: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first token and the number of tokens of documents, 0 for positions from N on."""
    known = positions < len(offsets) - 1
    positions = jnp.minimum(positions, len(offsets) - 2)
    return offsets[positions], jnp.where(known, offsets[positions + 1] - offsets[positions], 0)


def centroid_interaction(
    arrays: IndexArrays, table: jax.Array, positions: jax.Array, kept: jax.Array | None, block: int
) -> jax.Array:
    """Score documents approximately, from centroid scores alone.

    Args:
      table: float32[B, K, Lq], centroid scores.
      positions: int32[B, C], documents; those from N on are padding.
      kept: bool[B, K], the centroids that count (pruning). If None, all.
      block: see `Memory`.

    Returns:
      float32[B, C], -inf for padding.
    """

    def maxima(rows: jax.Array, mask: jax.Array) -> jax.Array:
        codes = arrays.codes[rows]
        if kept is not None:
            mask = mask & _rows_of(kept, codes)
        return jnp.where(mask[..., None], _rows_of(table, codes), PRUNED).max(axis=2)

    return by_tiles(maxima, arrays.offsets, positions, table.shape[-1], PRUNED, block)


def exact_scores(
    arrays: IndexArrays, queries: jax.Array, table: jax.Array, positions: jax.Array, block: int
) -> jax.Array:
    """Score documents exactly: MaxSim on compressed tokens; see `centroid_interaction`."""
    norms = arrays.inverse_norms
    if norms is None:
        raise ValueError("the arrays have no inverse_norms: call with_inverse_norms first")
    slots = slot_major(queries, arrays.bucket_weights)
    weights = field_weights(arrays.bucket_weights)

    def maxima(rows: jax.Array, mask: jax.Array) -> jax.Array:
        similarity = _rows_of(table, arrays.codes[rows])
        scale = jnp.where(mask, norms[rows], 0)
        return token_maxima(slots, similarity, arrays.residuals[rows], scale, weights)

    return by_tiles(maxima, arrays.offsets, positions, queries.shape[1], -jnp.inf, block)


def by_tiles(
    maxima: Callable[[jax.Array, jax.Array], jax.Array],
    offsets: jax.Array,
    positions: jax.Array,
    rows: int,
    least: float,
    block: int,
) -> jax.Array:
    """Sum, over the query rows, the maxima over each document's tokens.

    Only the part of `positions` that is filled is computed, in blocks of documents.

    Args:
      maxima: (rows of the token arrays int32[B, n, tile], their mask) -> the best of these tokens
        for each query row, float32[B, n, Lq].
      positions: int32[B, C], documents; those from N on are padding.
      rows: Lq.
      least: what maxima start from.
      block: token similarities in one block.

    Returns:
      float32[B, C], -inf for padding.
    """
    batch, capacity = positions.shape
    size = min(max(block // (batch * _TILE * rows), 1), capacity)
    padded = jnp.pad(positions, [(0, 0), (0, -capacity % size)], constant_values=_PADDING)
    real = positions < len(offsets) - 1
    filled = real.sum(axis=1).max()

    def score(i: jax.Array, scores: jax.Array) -> jax.Array:
        documents = jax.lax.dynamic_slice_in_dim(padded, i * size, size, axis=1)
        start, length = token_spans(offsets, documents)

        def tile(t: jax.Array, best: jax.Array) -> jax.Array:
            place = t * _TILE + jnp.arange(_TILE, dtype=jnp.int32)
            mask = place < length[..., None]
            return jnp.maximum(best, maxima(jnp.where(mask, start[..., None] + place, 0), mask))

        nothing = jnp.full((batch, size, rows), least, jnp.float32)
        best = jax.lax.fori_loop(0, (length.max() + _TILE - 1) // _TILE, tile, nothing)
        return jax.lax.dynamic_update_slice_in_dim(scores, best.sum(axis=-1), i * size, axis=1)

    nothing = jnp.full(padded.shape, -jnp.inf, jnp.float32)
    scores = jax.lax.fori_loop(0, (filled + size - 1) // size, score, nothing)
    return jnp.where(real, scores[:, :capacity], -jnp.inf)


def cut(
    positions: jax.Array,
    scores: jax.Array,
    n: int,
    num_documents: int,
    first: jax.Array | int = 0,
    axis: str | None = None,
    count: jax.Array | None = None,
) -> jax.Array:
    """Keep the n best candidates in their order, of all devices together.

    Of equal scores the smaller position is better.

    Args:
      positions: int32[B, C]; those from `num_documents` on are padding.
      scores: float32[B, C].
      first, axis: as for `search_batch`. Each device keeps those of the n best that it has.
      count: int32[], 1 to n: keep so many, in the same shape.

    Returns:
      int32[B, min(n, C)], padded.
    """
    capacity = positions.shape[1]
    if capacity <= n and axis is None and count is None:
        return positions
    size = min(n, capacity)
    best = jax.lax.top_k(scores, size, **_UNSTABLE)[0]
    last = best[:, -1:] if count is None or axis is not None else _column(best, count)
    # First all that beat the n-th score, then those that equal it, by position.
    rank = jnp.where(scores > last, -1, jnp.where(scores == last, positions, _PADDING))
    _, place = jax.lax.top_k(-rank, size, **_UNSTABLE)
    if axis is None and count is not None:
        place = jnp.where(jnp.arange(size) < count, place, capacity)
    if axis is not None:
        local = jnp.where(positions < num_documents, first + positions, _PADDING)
        local, scores = (jnp.take_along_axis(array, place, axis=1) for array in (local, scores))
        gathered = [jax.lax.all_gather(a, axis, axis=1, tiled=True) for a in (-scores, local)]
        ranked = jax.lax.sort(gathered, num_keys=2)
        negated, order = (_column(a, n if count is None else count) for a in ranked)
        kept = (scores > -negated) | ((scores == -negated) & (local <= order))
        place = jnp.where(kept, place, capacity)
    padded = jnp.pad(positions, [(0, 0), (0, 1)], constant_values=_PADDING)
    return jnp.take_along_axis(padded, jnp.sort(place), axis=1)


def _column(rows: jax.Array, n: jax.Array | int) -> jax.Array:
    """[B, 1], the n-th of each row, counted from 1; the last where there are fewer."""
    return jax.lax.dynamic_slice_in_dim(rows, jnp.minimum(n, rows.shape[1]) - 1, 1, axis=1)


def _is_first(values: jax.Array) -> jax.Array:
    """bool[B, n]: which of ascending values differ from the one before."""
    return jnp.pad(values[:, 1:] != values[:, :-1], [(0, 0), (1, 0)], constant_values=True)


def _rows_of(table: jax.Array, codes: jax.Array) -> jax.Array:
    """Rows of a table [B, K, ...] for codes [B, ...], query by query."""
    batch, num_centroids = table.shape[:2]
    base = jnp.arange(batch, dtype=jnp.int32) * num_centroids
    flat = table.reshape(batch * num_centroids, *table.shape[2:])
    return flat[codes + base.reshape(-1, *[1] * (codes.ndim - 1))]
