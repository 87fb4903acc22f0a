"""Exact search: MaxSim of every query with every document."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.batching import ladder_length, next_power_of_two
from colbert_jax.progress import progress_bar
from colbert_jax.scoring.maxsim import block_rows, maxsim
from colbert_jax.search.arrays import (
    Hits,
    IndexArrays,
    RawArrays,
    best_of,
    concatenate_hits,
    load_tokens,
    result_size,
)

QUERIES = 256  # of one pass over the documents
TOKENS = 1 << 17  # document tokens of one call, padding included


def exact_search(
    arrays: RawArrays | IndexArrays,
    lengths: np.ndarray,
    queries: jax.Array | np.ndarray,
    k: int,
    allowed: np.ndarray | None = None,
    *,
    progress: bool | None = False,
) -> Hits:
    """The k best documents of each query by their exact scores.

    Documents are taken in order of length, so that padding is small, and a running top k is kept on
    the device: memory does not grow with their number.

    Args:
      arrays: raw or compressed token embeddings.
      lengths: int[N], tokens of each document, on the host.
      queries: float32[B, Lq, D].
      k: at most the number of allowed documents that have a token.
      allowed: bool[N], the documents to score. If None, all.
    """
    if len(queries) > QUERIES:
        parts = [queries[i : i + QUERIES] for i in range(0, len(queries), QUERIES)]
        return concatenate_hits(
            [exact_search(arrays, lengths, part, k, allowed, progress=progress) for part in parts]
        )
    # A few numbers of queries and of results, so that calls of any size share a few programs.
    batch, results = next_power_of_two(len(queries)), result_size(k)
    padded_queries = jnp.pad(jnp.asarray(queries), [(0, batch - len(queries)), (0, 0), (0, 0)])
    best = (
        jnp.full((batch, results), jnp.inf, jnp.float32),
        jnp.full((batch, results), len(lengths), jnp.int32),
    )
    order = np.argsort(lengths, kind="stable").astype(np.int32)
    order = order[np.searchsorted(lengths[order], 1) :]  # a document without tokens is no result
    with progress_bar(len(order), "exact scoring", "doc", progress) as bar:
        start = 0
        while start < len(order):
            length = ladder_length(int(lengths[order[start]]))
            limit = max(TOKENS // length, 1)
            stop = np.searchsorted(lengths[order], length, side="right")
            alike = order[start:stop]
            if allowed is not None:
                # The sizes of a search in all documents: no program for these ones alone.
                limit = min(limit, next_power_of_two(len(alike)))
                alike = alike[allowed[alike]]
            for at in range(0, len(alike), limit):
                positions = alike[at : at + limit]
                size = limit if allowed is not None else next_power_of_two(len(positions))
                padding = (0, min(limit, size) - len(positions))
                padded = np.pad(positions, padding, constant_values=len(lengths))
                best = _merge(arrays, padded_queries, padded, *best, length=length)
            bar.update(int(stop) - start)
            start = int(stop)
    negated, positions = (np.asarray(part)[: len(queries), :k] for part in best)
    return Hits(positions, -negated)


@partial(jax.jit, static_argnames="length")
def score_documents(
    arrays: RawArrays | IndexArrays, queries: jax.Array, positions: jax.Array, *, length: int
) -> jax.Array:
    """Exact scores float32[B, n] of queries [B, Lq, D] with the same n documents."""

    def score(doc: jax.Array) -> jax.Array:
        tokens, mask = load_tokens(arrays, doc[None], length)
        return jax.vmap(maxsim, in_axes=(0, None, None))(queries, tokens[0], mask[0])

    step = block_rows(
        length * max(queries.shape[0] * queries.shape[1], queries.shape[2]), len(positions)
    )
    return jax.lax.map(score, positions, batch_size=step).T


@partial(jax.jit, static_argnames="length")
def _merge(arrays, queries, positions, best_negated, best_positions, *, length: int):
    """The running top k with n more documents: sorted by falling score, then by rising position."""
    scores = score_documents(arrays, queries, positions, length=length)
    negated = jnp.concatenate([best_negated, -scores], axis=1)
    merged = jnp.concatenate([best_positions, jnp.broadcast_to(positions, scores.shape)], axis=1)
    return best_of(negated, merged, best_positions.shape[1])
