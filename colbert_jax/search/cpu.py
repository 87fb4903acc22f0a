"""PLAID on a CPU: the stages of `search.plaid` over mapped arrays, without copying them.

The loops are in `search.cpu_kernels`. A single query is spread over the threads stage by stage; in
a batch, each thread takes whole queries.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from colbert_jax.compression.codec import nbits_of, unpack
from colbert_jax.compression.fixed_point import (
    SHORTEST,
    FixedPoint,
    FixedQuery,
    fixed_point,
    fixed_query,
    is_fast,
    weights_of_fields,
)
from colbert_jax.compression.learned import SHARPNESS, rounded
from colbert_jax.config import SearchConfig
from colbert_jax.runtime import num_threads, spread, spread_evenly
from colbert_jax.search.arrays import IndexArrays, check_codes, check_lists
from colbert_jax.search.learned import LearnedArrays

_TOKENS = 32  # tokens of a document that are decompressed at a time
_VECTOR = 16  # bucket weights that loops look up at a time
_SMALL = 256  # candidates of a thread, below which one thread is faster
_WORTHWHILE = 3  # times k documents, from which scores in fixed point come first


class CpuArrays(NamedTuple):
    """A compressed index in the host's memory, mapped or not; see `IndexArrays`.

    centroids: float32[K, D].
    table: [256, m] words of memory: the 8 / b bucket weights for each value of a residual byte.
    weights: float32[16], the bucket weight of each value of a residual's field, where loops look
      it up in registers; else of length 0, and they look at the table.
    codes: int32[T].
    residuals: uint8[T, D * b / 8].
    offsets: int64[N+1].
    lists: int32[sum].
    list_offsets: int64[at most K+1]; further lists are empty.
    recent_lists, recent_list_offsets: as these; of no list, offsets [0], where `lists` covers all.
    fixed: the centroids in fixed point, where that is faster (`with_fixed_point`).
    """

    centroids: np.ndarray
    table: np.ndarray
    weights: np.ndarray
    codes: np.ndarray
    residuals: np.ndarray
    offsets: np.ndarray
    lists: np.ndarray
    list_offsets: np.ndarray
    recent_lists: np.ndarray
    recent_list_offsets: np.ndarray
    fixed: FixedPoint | None = None


def cpu_arrays(arrays: IndexArrays) -> CpuArrays:
    """Make views of an index's arrays on the host, of the types that kernels are compiled for."""
    weights = np.ascontiguousarray(arrays.bucket_weights, np.float32)
    nbits = nbits_of(weights)
    table = weights[unpack(np.arange(256, dtype=np.uint8)[:, None], nbits)]
    in_registers = nbits < 8 and arrays.centroids.shape[1] % _VECTOR == 0
    word = np.uint64 if nbits < 8 else np.float32  # two weights at a time, where a byte has them
    return CpuArrays(
        _view(arrays.centroids, np.float32),
        _view(table.view(word), word),
        _view(weights_of_fields(table) if in_registers else [], np.float32),
        _view(arrays.codes, np.int32),
        _view(arrays.residuals, np.uint8),
        _view(arrays.offsets, np.int64),
        _view(arrays.lists, np.int32),
        _view(arrays.list_offsets, np.int64),
        _view([] if arrays.recent_lists is None else arrays.recent_lists, np.int32),
        _view([0] if arrays.recent_lists is None else arrays.recent_list_offsets, np.int64),
    )


def with_fixed_point(arrays: CpuArrays) -> CpuArrays:
    """Prepare the arrays for scores in fixed point, where this CPU and this index allow it.

    All centroids must be finite.
    """
    if not is_fast():
        return arrays
    table = arrays.table.view(np.float32).reshape(256, -1)
    return arrays._replace(fixed=fixed_point(arrays.centroids, table))


def _view(array: Any, dtype: type) -> np.ndarray:
    view = np.ascontiguousarray(array, dtype).view(np.ndarray)
    view.flags.writeable = False
    return view


def cpu_search(
    arrays: CpuArrays,
    queries: np.ndarray,
    k: int,
    settings: SearchConfig,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Search a batch of queries.

    Args:
      queries: float32[B, Lq, D]; rows of zeros are padding.
      k: results for each query.
      settings: resolved (`SearchConfig.resolve`).
      allowed: bool[N], the documents that may be candidates. If None, all.

    Returns:
      positions int32[B, k] and scores float32[B, k], best first, equal scores by the smaller
      position; a query with fewer than k candidates is filled up with position N and -inf.

    Raises:
      DamagedArrayError: what the search met is out of range.
    """
    num_documents = len(arrays.offsets) - 1
    positions = np.full((len(queries), k), num_documents, np.int32)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    threads = min(num_threads(), len(queries)) if len(queries) > 1 else 1
    allowed = _view([] if allowed is None else allowed, bool)

    def worker(lane: int) -> None:
        for i in range(lane, len(queries), threads):
            best = _search_one(arrays, queries[i], k, settings, allowed, threads == 1)
            n = len(best[0])
            positions[i, :n], scores[i, :n] = best

    spread(worker, threads)
    return positions, scores


def cpu_learned(
    arrays: CpuArrays,
    learned: LearnedArrays,
    queries: np.ndarray,
    k: int,
    settings: SearchConfig,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Score exactly the documents that learned vectors predict to be the best.

    Args:
      learned: on the host.
      queries, k, settings: as for `cpu_search`; of the settings `ndocs`, how many are scored.
      allowed: bool[N], the documents that may be found, all with a token and at least k of them. If
        None, all have one.

    Returns:
      positions and scores, as `cpu_search`.
    """
    from colbert_jax.compression.cpu_kernels import products
    from colbert_jax.search import cpu_kernels

    num_documents = len(arrays.offsets) - 1
    landmarks, projection = (_view(array, np.float32) for array in learned[:2])
    vectors, scales = _view(learned.vectors, np.int8), _view(learned.scales, np.float32)
    chosen = np.arange(num_documents) if allowed is None else np.flatnonzero(allowed)
    chosen = chosen.astype(np.int32)
    positions = np.empty((len(queries), k), np.int32)
    scores = np.empty((len(queries), k), np.float32)
    threads = min(num_threads(), len(queries)) if len(queries) > 1 else 1
    inner = num_threads() if threads == 1 else 1
    keep = max(int(settings.ndocs or 1), k)

    def vector_of(columns: np.ndarray, length: int) -> np.ndarray:
        # Not by BLAS, whose threads wait for each other in so small products.
        cosines = products(landmarks, columns)[:, :length]
        features = np.exp(np.float32(SHARPNESS) * (cosines - np.float32(1)))
        vector = np.empty((1, projection.shape[1]), np.float32)
        cpu_kernels.weighted_sum(features.sum(axis=1), projection, vector[0])
        return rounded(vector)[0][0].astype(np.float32)

    def search(i: int) -> None:
        rows = queries[i][queries[i].any(axis=1)]
        columns = _columns(rows)
        units = vector_of(columns, len(rows))
        found = _scratch("positions", (len(chosen),), np.int32)
        found[:] = chosen
        predicted = _scratch("scores", (len(chosen),), np.float32)
        _split(
            lambda start, stop: cpu_kernels.predict(
                vectors, scales, units, found, start, stop, predicted
            ),
            len(chosen),
            inner,
        )
        count = cpu_kernels.keep_best(found, predicted, len(chosen), keep)
        positions[i], scores[i] = _best_exactly(arrays, rows, columns, found[:count], k, inner)

    def worker(lane: int) -> None:
        for i in range(lane, len(queries), threads):
            search(i)

    spread(worker, threads)
    return positions, scores


def cpu_exact(
    arrays: CpuArrays, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k best documents by exact scores; arguments and result as for `cpu_search`.

    At least k documents have a token, of those that are allowed.
    """
    rows, documents = _rows(queries), _with_token(arrays.offsets, allowed)
    if arrays.fixed is None or len(documents) < _WORTHWHILE * k:
        return _best_of_all(partial(_score_exactly, arrays), arrays.offsets, documents, rows, k)
    prepared, work = _in_fixed_point(arrays, rows)
    best = []
    scores = _score_by_lanes(work, arrays.offsets, documents, len(rows))
    for query, row, fixed in zip(rows, scores, prepared, strict=True):
        few = documents[_may_be_best(row, k, fixed.error)]
        best.append(_score_all(arrays, query, few, k, num_threads()))
    return _stacked(best)


def cpu_exact_raw(
    values: np.ndarray,
    offsets: np.ndarray,
    queries: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """As `cpu_exact` among all documents, for token embeddings float32[T, D], not compressed."""
    values, offsets = _view(values, np.float32), _view(offsets, np.int64)

    def score(*args: Any) -> None:
        from colbert_jax.search import cpu_kernels

        columns, parts, documents, start, stop, scores = args
        cpu_kernels.score_raw(values, columns, parts, offsets, documents, start, stop, scores)

    return _best_of_all(score, offsets, _with_token(offsets, None), _rows(queries), k)


def _best_of_all(
    score: Callable[..., None],
    offsets: np.ndarray,
    documents: np.ndarray,
    rows: list[np.ndarray],
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best by `score`, which takes what `_score_exactly` takes after the arrays."""
    parts = np.cumsum([0, *map(len, rows)])
    work = partial(score, _columns(np.concatenate(rows)), parts)
    scores = _score_by_lanes(work, offsets, documents, len(rows))
    return _stacked([_sorted(documents, row, k) for row in scores])


def _rows(queries: np.ndarray) -> list[np.ndarray]:
    """The rows of each query that are not padding."""
    return [query[query.any(axis=1)] for query in queries]


def _with_token(offsets: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
    """int32, the documents that have a token, of those that are allowed."""
    documents = np.arange(len(offsets) - 1) if allowed is None else np.flatnonzero(allowed)
    return documents[offsets[documents + 1] > offsets[documents]].astype(np.int32)


def _score_by_lanes(
    work: Callable[[np.ndarray, int, int, np.ndarray], None],
    offsets: np.ndarray,
    documents: np.ndarray,
    num_queries: int,
) -> np.ndarray:
    """float32[num_queries, n], by work(documents, start, stop, scores): as many tokens a thread."""
    scores = np.empty((num_queries, len(documents)), np.float32)
    ends = np.cumsum(offsets[documents + 1] - offsets[documents])
    spread_evenly(lambda start, stop: work(documents, start, stop, scores), ends)
    return scores


def _stacked(best: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([positions for positions, _ in best]), np.stack([row for _, row in best])


def _best_exactly(
    arrays: CpuArrays,
    rows: np.ndarray,
    columns: np.ndarray,
    positions: np.ndarray,
    k: int,
    threads: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the documents `positions`, ascending, for the rows of one query."""
    if arrays.fixed is not None and len(positions) >= _WORTHWHILE * k:
        scores = _scratch("exact", (1, len(positions)), np.float32)
        (prepared,), work = _in_fixed_point(arrays, [rows])
        _split(
            lambda start, stop: work(positions, start, stop, scores), len(positions), threads, 16
        )
        positions = positions[_may_be_best(scores[0], k, prepared.error)]
    return _score_all(arrays, rows, positions, k, threads, columns)


def _score_all(
    arrays: CpuArrays,
    rows: np.ndarray,
    positions: np.ndarray,
    k: int,
    threads: int,
    columns: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    columns = _columns(rows) if columns is None else columns
    scores = _scratch("exact", (1, len(positions)), np.float32)
    parts = np.array([0, len(rows)])
    _split(
        lambda start, stop: _score_exactly(arrays, columns, parts, positions, start, stop, scores),
        len(positions),
        threads,
        16,
    )
    return _sorted(positions, scores[0], k)


def _in_fixed_point(
    arrays: CpuArrays, queries: list[np.ndarray]
) -> tuple[list[FixedQuery], Callable[[np.ndarray, int, int, np.ndarray], None]]:
    """Prepare queries of these rows.

    Returns:
      how exact each is, and work(positions, start, stop, scores), as `_score_exactly`.
    """
    from colbert_jax.compression.fixed_tiles import pack_fixed
    from colbert_jax.search import cpu_kernels

    fixed = arrays.fixed
    assert fixed is not None
    parts = np.cumsum([0, *map(len, queries)])
    prepared = [fixed_query(fixed, rows) for rows in queries]
    units = np.array([query.unit for query in prepared], np.float32)
    dim = arrays.centroids.shape[1]
    shape = (-(-int(parts[-1]) // cpu_kernels.LANES), dim // 2, cpu_kernels.LANES, 2)
    columns = np.zeros(shape, np.int16)
    for rows, first, unit in zip(queries, parts.tolist(), units, strict=False):
        pack_fixed(rows, first, unit, 8 // fixed.nbits, columns)
    least = np.int32((SHORTEST * fixed.scale) ** 2)

    def work(positions: np.ndarray, start: int, stop: int, scores: np.ndarray) -> None:
        tokens = _scratch("fixed tokens", (_TOKENS, arrays.centroids.shape[1]), np.int16)
        right = cpu_kernels.score_fixed(
            fixed.centroids,
            fixed.weights,
            fixed.nbits,
            least,
            columns,
            parts,
            units,
            arrays.codes,
            arrays.residuals,
            arrays.offsets,
            positions,
            start,
            stop,
            tokens,
            scores,
        )
        check_codes(right, len(arrays.centroids))

    return prepared, work


def _may_be_best(scores: np.ndarray, k: int, error: float) -> np.ndarray:
    """bool[n]: whose scores in fixed point [n] leave room for being among the k best."""
    sure = np.where(scores == np.inf, -np.inf, scores)
    least = np.partition(sure, len(sure) - k)[len(sure) - k]
    return scores >= least - 2 * error


class _Scratch(threading.local):
    """Arrays that a thread uses again for its next query: fresh memory costs page faults."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        size = int(np.prod(shape))
        array = self._arrays.get(name)
        if array is None or array.size < size or array.dtype != dtype:
            array = self._arrays[name] = np.zeros(size, dtype)
        return array[:size].reshape(shape)


_scratch = _Scratch()


def _search_one(
    arrays: CpuArrays,
    query: np.ndarray,
    k: int,
    settings: SearchConfig,
    allowed: np.ndarray,
    parallel: bool,
) -> tuple[np.ndarray, np.ndarray]:
    from colbert_jax.search import cpu_kernels

    rows = query[query.any(axis=1)]
    num_rows = len(rows)
    if num_rows == 0:
        return np.empty(0, np.int32), np.empty(0, np.float32)
    columns = _columns(rows)
    width = columns.shape[0] * columns.shape[2]
    num_centroids, num_documents = len(arrays.centroids), len(arrays.offsets) - 1
    ncells = min(int(settings.ncells or 1), num_centroids)
    threads = num_threads() if parallel else 1

    num_blocks = -(-num_centroids // cpu_kernels.BLOCK)
    keys = _scratch("keys", (num_centroids, width), np.int32)
    block_best = _scratch("block_best", (num_blocks, width), np.int32)

    def centroid_scores(start: int, stop: int) -> None:
        start, stop = start * cpu_kernels.BLOCK, min(stop * cpu_kernels.BLOCK, num_centroids)
        cpu_kernels.score_centroids(arrays.centroids, columns, start, stop, keys, block_best)

    _split(centroid_scores, num_blocks, threads)
    cells = _scratch("cells", (num_rows, ncells), np.int32)
    cpu_kernels.probe(keys, block_best, num_rows, ncells, cells)

    marks = _scratch("marks", (-(-(num_documents + 1) // 8) * 8,), np.uint8)
    positions = _scratch("positions", (num_documents,), np.int32)
    count = cpu_kernels.candidates(
        cells,
        arrays.lists,
        arrays.list_offsets,
        arrays.recent_lists,
        arrays.recent_list_offsets,
        allowed,
        marks,
        marks.view(np.uint64),
        positions,
    )
    check_lists(count >= 0, num_documents)
    approximate = _scratch("scores", (num_documents,), np.float32)
    centroid_best = _scratch("centroid_best", (num_centroids,), np.int32)

    def interaction(threshold: np.int32) -> Callable[[int, int], None]:
        def work(start: int, stop: int) -> None:
            right = cpu_kernels.interact(
                keys,
                centroid_best,
                threshold,
                arrays.codes,
                arrays.offsets,
                positions,
                start,
                stop,
                approximate,
            )
            check_codes(right, num_centroids)

        return work

    pruning = _key(settings.centroid_score_threshold)
    ndocs = int(settings.ndocs or 1)
    # Where nothing would be cut, or nothing pruned, the second cut alone gives the same.
    if count > max(ndocs, k) and pruning > cpu_kernels.LOWEST:
        cpu_kernels.best_of_centroids(keys, num_rows, centroid_best)
        if centroid_best.min() < pruning:
            _split(interaction(pruning), count, threads)
            count = cpu_kernels.keep_best(positions, approximate, count, max(ndocs, k))
    if count > max(ndocs // 4, k):
        _split(interaction(cpu_kernels.LOWEST), count, threads)
        count = cpu_kernels.keep_best(positions, approximate, count, max(ndocs // 4, k))

    best = _best_exactly(arrays, rows, columns, positions[:count], k, threads)
    found = np.isfinite(best[1])  # converted lists may hold documents without a token
    return best[0][found], best[1][found]


def _columns(rows: np.ndarray) -> np.ndarray:
    """The rows [n, D] of a query, or of several, see `tiles.pack`."""
    from colbert_jax.compression import tiles

    return tiles.packed(np.ascontiguousarray(rows, np.float32))


def _key(threshold: float | None) -> np.int32:
    from colbert_jax.search import cpu_kernels

    bits = np.float32(-np.inf if threshold is None else threshold).view(np.int32)
    return np.int32(cpu_kernels.as_key(bits))


def _score_exactly(
    arrays: CpuArrays,
    columns: np.ndarray,
    bounds: np.ndarray,
    positions: np.ndarray,
    start: int,
    stop: int,
    scores: np.ndarray,
) -> None:
    from colbert_jax.search import cpu_kernels

    tokens = _scratch("tokens", (_TOKENS, arrays.centroids.shape[1]), np.float32)
    right = cpu_kernels.score_exactly(
        arrays.centroids,
        arrays.table,
        arrays.weights,
        columns,
        bounds,
        arrays.codes,
        arrays.residuals,
        arrays.offsets,
        positions,
        start,
        stop,
        tokens,
        tokens.view(arrays.table.dtype),
        scores,
    )
    check_codes(right, len(arrays.centroids))


def _sorted(positions: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best, best first; a stable sort of ascending positions puts the smaller tie first."""
    if len(positions) > 4 * k:
        least = np.partition(scores, len(positions) - k)[len(positions) - k]
        chosen = scores >= least
        positions, scores = positions[chosen], scores[chosen]
    order = np.argsort(-scores, kind="stable")[:k]
    return positions[order].copy(), scores[order].copy()


def _split(work: Callable[[int, int], None], total: int, threads: int, small: int = _SMALL) -> None:
    """Run work(start, stop) over parts of 0..total, one for each thread if they are not small."""
    if threads == 1 or total < 2 * small:
        work(0, total)
        return
    bounds = np.linspace(0, total, threads + 1).astype(int).tolist()
    spread(lambda lane: work(bounds[lane], bounds[lane + 1]), threads)
