"""PLAID (Santhanam et al., 2022, section 4): centroids find candidates, residuals score a few.

For each query:
  1. probe: the `ncells` best centroids of each query token; the documents of their inverted lists
     are the candidates;
  2. pruned centroid interaction: MaxSim with each token replaced by its centroid, without tokens
     whose centroid scores below the threshold for every query token; the best `ndocs` go on;
  3. full centroid interaction; the best `ndocs / 4` go on;
  4. decompression and exact MaxSim.

Shapes are static: candidates live in an array of fixed capacity, ascending by id and padded with N.
Work is done in blocks of it, as many as are filled. What does not fit is reported, never dropped:
`plaid_search` then runs again with room for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.batching import next_power_of_two
from colbert_jax.config import SearchConfig
from colbert_jax.scoring.maxsim import block_rows, maxsim, token_rows
from colbert_jax.search.arrays import IndexArrays, load_tokens

_PRUNED = -9999.0  # per query token, for a document without a token left: ColBERT's constant
_INTERACTION_BLOCK = 64  # documents
_DECOMPRESS_BLOCK = 16


class Capacity(NamedTuple):
    """Static sizes of a search program.

    entries: entries of the probed inverted lists, repetitions included.
    length: tokens of the longest document, padded.
    """

    entries: int
    length: int


def plaid_search(
    arrays: IndexArrays,
    queries: jax.Array,
    k: int,
    settings: SearchConfig,
    capacity: Capacity,
) -> tuple[np.ndarray, np.ndarray, Capacity]:
    """Search a batch of queries, widening the capacity until every candidate fits.

    Args:
      queries: float32[B, Lq, D]; rows of zeros are padding.
      k: results wanted.
      settings: resolved (`SearchConfig.resolve`).

    Returns:
      ids int32[B, k] and scores float32[B, k], where a query has fewer than k candidates filled up
      with id N and -inf; and the capacity that was enough.
    """
    arguments = (int(settings.ncells), int(settings.ndocs), k)  # type: ignore[arg-type]
    while True:
        ids, scores, entries = _search_batch(
            arrays, queries, settings.centroid_score_threshold, *arguments, capacity
        )
        needed = int(np.asarray(entries).max(initial=0))
        if needed <= capacity.entries:
            return np.asarray(ids), np.asarray(scores), capacity
        capacity = capacity._replace(entries=next_power_of_two(needed))


def initial_capacity(
    list_lengths: np.ndarray, length: int, query_length: int, ncells: int
) -> Capacity:
    """Room for twice the expected entries, never more than there can be.

    A probe hits a list about in proportion to the list's length.
    """
    probes = min(query_length * ncells, len(list_lengths))
    total = max(int(list_lengths.sum()), 1)
    expected = 2 * probes * float(np.square(list_lengths, dtype=np.float64).sum()) / total
    longest = np.partition(list_lengths, -probes)[-probes:].sum()
    entries = next_power_of_two(int(min(expected, longest)))
    return Capacity(max(entries, _INTERACTION_BLOCK), length)


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _search_batch(arrays, queries, threshold, ncells, ndocs, k, capacity):
    search = partial(
        search_one,
        arrays,
        threshold=threshold,
        ncells=ncells,
        ndocs=ndocs,
        k=k,
        capacity=capacity,
    )
    return jax.lax.map(search, queries)


def search_one(
    arrays: IndexArrays,
    query: jax.Array,
    *,
    threshold: float | jax.Array,
    ncells: int,
    ndocs: int,
    k: int,
    capacity: Capacity,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All stages for one query [Lq, D]: ids int32[k], scores float32[k], entries needed int32[]."""
    length = capacity.length
    scores = centroid_scores(arrays.centroids, query)
    cells = probe(scores, query, ncells)
    ids, entries = candidates(arrays, cells, capacity.entries)

    real = jnp.any(query != 0, axis=1)
    kept = scores.max(axis=1, where=real, initial=-jnp.inf) >= threshold
    approximate = partial(centroid_interaction, arrays, scores, length=length)
    ids = best(ids, approximate(ids, kept), max(ndocs, k))
    ids = best(ids, approximate(ids, None), max(ndocs // 4, k))

    block = min(_DECOMPRESS_BLOCK, block_rows(length * query.shape[1], len(ids)))
    exact = by_blocks(partial(_score_exactly, arrays, query, length), ids, arrays, block)
    exact, place = jax.lax.top_k(exact, min(k, len(ids)))
    missing = k - len(place)
    ids = jnp.pad(ids[place], (0, missing), constant_values=len(arrays.offsets) - 1)
    return ids, jnp.pad(exact, (0, missing), constant_values=-jnp.inf), entries


def centroid_scores(centroids: jax.Array, query: jax.Array) -> jax.Array:
    """[K, Lq], the dot product of every centroid with every query token."""
    return jnp.einsum("kd,qd->kq", centroids, query, precision=jax.lax.Precision.HIGHEST)


def probe(scores: jax.Array, query: jax.Array, ncells: int) -> jax.Array:
    """The best `ncells` centroids of each query token, ascending, repetitions replaced by K.

    A query row of zeros is padding and probes nothing.
    """
    num_centroids = scores.shape[0]
    _, cells = jax.lax.top_k(scores.T, min(ncells, num_centroids))
    real = jnp.any(query != 0, axis=1)
    cells = jnp.sort(jnp.where(real[:, None], cells, num_centroids).reshape(-1))
    return jnp.where(cells == jnp.roll(cells, 1).at[0].set(-1), num_centroids, cells)


def candidates(arrays: IndexArrays, cells: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """The distinct documents of the probed inverted lists, ascending, padded with N.

    Returns:
      int32[capacity], and how many entries the lists have: more than `capacity` means that some
      were left out.
    """
    num_documents = len(arrays.offsets) - 1
    num_centroids = len(arrays.list_offsets) - 1
    real = cells < num_centroids
    cells = jnp.minimum(cells, num_centroids - 1)
    start = arrays.list_offsets[cells]
    sizes = jnp.where(real, arrays.list_offsets[cells + 1] - start, 0)
    ends = jnp.cumsum(sizes)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    cell = jnp.minimum(jnp.searchsorted(ends, slot, side="right"), len(cells) - 1)
    entry = start[cell] + slot - (ends - sizes)[cell]
    ids = jnp.where(
        slot < ends[-1], arrays.lists[jnp.where(slot < ends[-1], entry, 0)], num_documents
    )
    ids = jnp.sort(ids)
    first = ids != jnp.roll(ids, 1).at[0].set(-1)
    place = jnp.where(first, jnp.cumsum(first) - 1, capacity)
    unique = jnp.full(capacity, num_documents, jnp.int32).at[place].set(ids, mode="drop")
    return unique, ends[-1]


def centroid_interaction(
    arrays: IndexArrays,
    scores: jax.Array,
    ids: jax.Array,
    kept: jax.Array | None,
    *,
    length: int,
) -> jax.Array:
    """Approximate scores float32[n] of documents ids [n], from centroid scores [K, Lq] alone.

    Args:
      kept: bool[K], the centroids that count (pruning); None: all.
    """

    def block(ids: jax.Array) -> jax.Array:
        rows, mask = token_rows(arrays.offsets, ids, length)
        codes = arrays.codes[rows]
        if kept is not None:
            mask = mask & kept[codes]
        similarity = jnp.where(mask[..., None], scores[codes], _PRUNED)
        return similarity.max(axis=1).sum(axis=-1)

    size = min(_INTERACTION_BLOCK, block_rows(length * scores.shape[1], len(ids)))
    return by_blocks(block, ids, arrays, size)


def best(ids: jax.Array, scores: jax.Array, n: int) -> jax.Array:
    """The n best of candidates, ascending by id again and padded with N.

    Equal scores go to the smaller id, since `top_k` prefers the earlier place.
    """
    _, place = jax.lax.top_k(scores, min(n, len(ids)))
    return jnp.sort(ids[place])


def by_blocks(
    score: Callable[[jax.Array], jax.Array], ids: jax.Array, arrays: IndexArrays, block: int
) -> jax.Array:
    """Scores of candidates [n], a block at a time, over the filled part of the array only.

    Padding scores -inf.
    """
    num_documents = len(arrays.offsets) - 1
    n, block = len(ids), min(block, len(ids))
    padded = jnp.pad(ids, (0, -n % block), constant_values=num_documents)
    filled = (ids < num_documents).sum()

    def step(i: jax.Array, scores: jax.Array) -> jax.Array:
        part = score(jax.lax.dynamic_slice_in_dim(padded, i * block, block))
        return jax.lax.dynamic_update_slice_in_dim(scores, part, i * block, 0)

    nothing = jnp.full(padded.shape, -jnp.inf, jnp.float32)
    scores = jax.lax.fori_loop(0, (filled + block - 1) // block, step, nothing)
    return jnp.where(ids < num_documents, scores[:n], -jnp.inf)


def _score_exactly(arrays: IndexArrays, query: jax.Array, length: int, ids: jax.Array) -> jax.Array:
    tokens, mask = load_tokens(arrays, ids, length)
    return jax.vmap(maxsim, in_axes=(None, 0, 0))(query, tokens, mask)
