"""MaxSim (Khattab and Zaharia, 2020, eq. 3): score(q, d) = sum over i of max over j of q_i . d_j.

A masked document token takes no part in the maximum; a document without any token scores minus
infinity. A query row of zeros adds nothing. Sums are float32 whatever the inputs are.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

# Elements of the block of token similarities that one step of a blocked form holds: 4 MiB of
# float32, which stays in a CPU's cache.
_BLOCK_ELEMENTS = 1 << 20


def maxsim(query: jax.Array, document: jax.Array, mask: jax.Array) -> jax.Array:
    """The definition: one query, one document.

    Args:
      query: [Lq, D].
      document: [Ld, D].
      mask: bool[Ld], the document's tokens.

    Returns:
      float32[], the score.
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
    """Every query with every document.

    Args:
      queries: [B, Lq, D].
      documents: [N, Ld, D].
      mask: bool[N, Ld].

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
    """Every query with its own documents: training tuples, or padded candidates of a search.

    Args:
      queries: [B, Lq, D].
      documents: [B, W, Ld, D].
      mask: bool[B, W, Ld]; a candidate that is padding is masked altogether and scores -inf.

    Returns:
      float32[B, W].
    """
    return jax.vmap(jax.vmap(maxsim, in_axes=(None, 0, 0)))(queries, documents, mask)


@partial(jax.jit, static_argnames="length")
def maxsim_ragged(
    queries: jax.Array, values: jax.Array, offsets: jax.Array, ids: jax.Array, *, length: int
) -> jax.Array:
    """Every query with its padded list of candidates out of ragged documents.

    Args:
      queries: [B, Lq, D].
      values, offsets: [T, D] and int32[N+1], see `embeddings.DocumentEmbeddings`.
      ids: int32[B, C], candidates; an id outside 0..N-1 is padding and scores -inf.
      length: at least the length of the longest candidate.

    Returns:
      float32[B, C].
    """

    def score(query: jax.Array, candidate: jax.Array) -> jax.Array:
        rows, mask = token_rows(offsets, candidate, length)
        return maxsim(query, values[rows], mask)

    step = block_rows(length * values.shape[1], ids.shape[1])
    return jax.lax.map(
        lambda pair: jax.lax.map(partial(score, pair[0]), pair[1], batch_size=step), (queries, ids)
    )


def token_rows(offsets: jax.Array, ids: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Rows of the flat token arrays that belong to documents, padded to `length` columns.

    Args:
      offsets: int32[N+1].
      ids: int32[...], documents; an id outside 0..N-1 has no token.

    Returns:
      rows int32[..., length] (any valid row where there is no token) and mask bool[..., length].
    """
    last = offsets.shape[0] - 2
    known = (ids >= 0) & (ids <= last)
    ids = jnp.clip(ids, 0, last)
    start, stop = offsets[ids], offsets[ids + 1]
    rows = start[..., None] + jnp.arange(length, dtype=offsets.dtype)
    mask = (rows < stop[..., None]) & known[..., None]
    return jnp.where(mask, rows, 0), mask


def block_rows(elements_per_row: int, rows: int) -> int:
    """How many rows of that many elements a block takes, at least 1 and at most `rows`."""
    return int(np.clip(_BLOCK_ELEMENTS // max(elements_per_row, 1), 1, max(rows, 1)))
