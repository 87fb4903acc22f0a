"""The arrays a search works on, and what it returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.compression.codec import decompress
from colbert_jax.scoring.maxsim import token_rows


class Hits(NamedTuple):
    """The best documents of each query, best first, equal scores by the smaller id.

    ids: int32[B, k], positions of documents in the collection.
    scores: float32[B, k].
    """

    ids: np.ndarray
    scores: np.ndarray


def check_k(k: Any) -> int:
    """A number of results as int. Raises ValueError unless it is a whole number >= 1."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k must be a whole number >= 1, got {k!r}")
    return int(k)


def concatenate_hits(parts: list[Hits]) -> Hits:
    """Hits of several batches as one; at least one batch."""
    return Hits(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class RawArrays(NamedTuple):
    """Uncompressed token embeddings: values [T, D] and offsets int32[N+1]."""

    values: jax.Array
    offsets: jax.Array


class IndexArrays(NamedTuple):
    """A compressed index.

    centroids: float32[K, D].
    bucket_weights: float32[2^b].
    codes: int32[T], the centroid of every token.
    residuals: uint8[T, D * b / 8].
    offsets: int32[N+1], document i holds tokens offsets[i]..offsets[i+1]-1.
    lists: int32[sum], for each centroid the ascending ids of the documents that have a token there.
    list_offsets: int32[K+1].
    """

    centroids: jax.Array
    bucket_weights: jax.Array
    codes: jax.Array
    residuals: jax.Array
    offsets: jax.Array
    lists: jax.Array
    list_offsets: jax.Array


def load_tokens(
    arrays: RawArrays | IndexArrays, ids: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """Token embeddings of documents, decompressed where they are compressed.

    Args:
      ids: int32[n]; an id outside 0..N-1 has no token.
      length: at least the longest of them.

    Returns:
      float32[n, length, D] and the mask bool[n, length].
    """
    rows, mask = token_rows(arrays.offsets, ids, length)
    if isinstance(arrays, RawArrays):
        return arrays.values[rows].astype(jnp.float32), mask
    return decompress(arrays, arrays.codes[rows], arrays.residuals[rows]), mask
