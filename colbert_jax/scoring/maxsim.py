"""MaxSim (Khattab and Zaharia, 2020, eq. 3): score(q, d) = sum over i of max over j of q_i . d_j.

A masked document token takes no part in the maximum; a document without a token scores minus
infinity. A query row of zeros adds nothing. Sums are float32 for all inputs.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

# Token similarities in one block: 4 MiB of float32, which stay in a CPU's cache.
_BLOCK_ELEMENTS = 1 << 20


def maxsim(query: jax.Array, document: jax.Array, mask: jax.Array) -> jax.Array:
    """Score one query with one document: the definition.

    Args:
      query: [Lq, D].
      document: [Ld, D].
      mask: bool[Ld], the document's tokens.

    Returns:
      float32[].
    """
    similarity = jnp.einsum(
        "qd,ld->lq",
        query,
        document,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    similarity = jnp.where(mask[:, None], similarity, -jnp.inf)
    return similarity.max(axis=0, initial=-jnp.inf).sum()


@jax.jit
def maxsim_all_pairs(queries: jax.Array, documents: jax.Array, mask: jax.Array) -> jax.Array:
    """Score every query with every document.

    Args:
      queries: [B, Lq, D].
      documents: [N, Ld, D].
      mask: bool[N, Ld], the documents' tokens.

    Returns:
      float32[B, N].
    """
    n, length = mask.shape
    step = block_rows(length * queries.shape[0] * queries.shape[1], n)
    score = jax.vmap(maxsim, in_axes=(0, None, None))
    scores = jax.lax.map(lambda pair: score(queries, *pair), (documents, mask), batch_size=step)
    return scores.T


@jax.jit
def maxsim_nway(queries: jax.Array, documents: jax.Array, mask: jax.Array) -> jax.Array:
    """Score every query with its W documents: training tuples, or padded candidates of a search.

    Args:
      queries: [B, Lq, D].
      documents: [B, W, Ld, D].
      mask: bool[B, W, Ld], the documents' tokens. A document without a token scores -inf.

    Returns:
      float32[B, W].
    """
    return jax.vmap(jax.vmap(maxsim, in_axes=(None, 0, 0)))(queries, documents, mask)


@partial(jax.jit, static_argnames="length")
def maxsim_ragged(
    queries: jax.Array, values: jax.Array, offsets: jax.Array, positions: jax.Array, *, length: int
) -> jax.Array:
    """Score every query with its candidates out of ragged documents.

    Args:
      queries: [B, Lq, D].
      values, offsets: [T, D] and int32[N+1], see `embeddings.DocumentEmbeddings`.
      positions: int32[B, C], candidates. Those outside 0..N-1 are padding and score -inf.
      length: tokens of the longest candidate, or more.

    Returns:
      float32[B, C].
    """

    def score(query: jax.Array, candidate: jax.Array) -> jax.Array:
        rows, mask = token_rows(offsets, candidate, length)
        return maxsim(query, values[rows], mask)

    step = block_rows(length * values.shape[1], positions.shape[1])
    return jax.lax.map(
        lambda pair: jax.lax.map(partial(score, pair[0]), pair[1], batch_size=step),
        (queries, positions),
    )


def token_rows(
    offsets: jax.Array, positions: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """Find the rows of documents in the flat token arrays, padded to `length` columns.

    Args:
      offsets: int32[N+1].
      positions: int32[...], documents. Those outside 0..N-1 have no token.

    Returns:
      rows int32[..., length], and mask bool[..., length], the columns that are tokens; the rows of
      other columns are any valid ones.
    """
    last = offsets.shape[0] - 2
    known = (positions >= 0) & (positions <= last)
    positions = jnp.clip(positions, 0, last)
    start, stop = offsets[positions], offsets[positions + 1]
    rows = start[..., None] + jnp.arange(length, dtype=offsets.dtype)
    mask = (rows < stop[..., None]) & known[..., None]
    return jnp.where(mask, rows, 0), mask


def block_rows(elements_per_row: int, rows: int) -> int:
    """Return the number of rows in a block, from 1 to `rows`, by the elements that a row takes."""
    return int(np.clip(_BLOCK_ELEMENTS // max(elements_per_row, 1), 1, max(rows, 1)))
