"""Candidates by learned vectors: the largest products of a query's vector with the documents'.

`compression.learned` says what the vectors are. Both are rounded to 8 bits, so that a product is a
whole number, the same on every device and in whatever order it is added up.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.compression.learned import LEVELS, SHARPNESS
from colbert_jax.search.arrays import DamagedArrayError

_HIGHEST = jax.lax.Precision.HIGHEST


class LearnedArrays(NamedTuple):
    """Learned vectors of an index, and what makes those of queries.

    landmarks: float32[M, D].
    projection: float32[M, F].
    vectors: int8[N, F], F at most 1,024.
    scales: float32[N]; 0 for a document without a token.
    """

    landmarks: jax.Array
    projection: jax.Array
    vectors: jax.Array
    scales: jax.Array


def check_learned(arrays: LearnedArrays) -> None:
    """Raise DamagedArrayError for values, on the host, that no build writes."""
    for name in ("landmarks", "projection", "scales"):
        if not np.isfinite(getattr(arrays, name)).all():
            raise DamagedArrayError(f"learned_{name}", "NaN or infinite values")


def predicted_scores(arrays: LearnedArrays, queries: jax.Array) -> jax.Array:
    """Predict MaxSim, up to a factor and a summand of each query.

    Args:
      queries: float32[B, Lq, D]; rows of zeros are padding.

    Returns:
      float32[B, N].
    """
    products = jnp.einsum("bqd,md->bqm", queries, arrays.landmarks, precision=_HIGHEST)
    real = (queries != 0).any(axis=-1)
    sums = jnp.where(real[..., None], jnp.exp(SHARPNESS * (products - 1)), 0).sum(axis=1)
    vectors = jnp.matmul(sums, arrays.projection, precision=_HIGHEST)
    scales = jnp.abs(vectors).max(axis=1, keepdims=True) / LEVELS
    units = jnp.rint(vectors / jnp.where(scales > 0, scales, 1)).astype(jnp.int8)
    products = jax.lax.platform_dependent(
        units, arrays.vectors, cpu=_by_floats, default=_by_integers
    )
    return products * arrays.scales


def _by_integers(units: jax.Array, vectors: jax.Array) -> jax.Array:
    products = jnp.einsum("bf,nf->bn", units, vectors, preferred_element_type=jnp.int32)
    return products.astype(jnp.float32)


def _by_floats(units: jax.Array, vectors: jax.Array) -> jax.Array:
    """As exact: no sum of up to 1,024 products exceeds 2^24."""
    units, vectors = units.astype(jnp.float32), vectors.astype(jnp.float32)
    return jnp.einsum("bf,nf->bn", units, vectors, precision=_HIGHEST)
