"""Examples of compressed documents, and their scores by definition."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.compression.codec import pack
from colbert_jax.scoring import residual, slots


def residual_maxsim(
    queries, similarity, residuals, inverse_norms, mask, bucket_weights, *, maxima=None
):
    """Scores float32[B, n] of compressed documents, by `token_maxima` or another function."""
    maxima = maxima or residual.token_maxima
    scale = jnp.where(mask, inverse_norms, 0)
    queries = slots.slot_major(queries, bucket_weights)
    weights = slots.field_weights(bucket_weights)
    return maxima(queries, similarity, residuals, scale, weights).sum(axis=-1)


def example(nbits, batch, n, length, lq, dim, seed=0):
    """Arguments of `residual_maxsim`, and the scores by its definition, in float64."""
    rng = np.random.default_rng(seed)
    centroids = rng.normal(size=(13, dim)).astype(np.float32)
    weights = np.sort(rng.normal(0, 0.3, 1 << nbits)).astype(np.float32)
    queries = rng.normal(size=(batch, lq, dim)).astype(np.float32)
    queries[0, -1] *= lq == 1  # a row of padding
    codes = rng.integers(0, 13, (batch, n, length))
    buckets = rng.integers(0, 1 << nbits, (batch, n, length, dim))
    lengths = rng.integers(0, length + 1, (batch, n))
    lengths[:, 0], lengths[0, -1] = length, min(length, 1)
    lengths[:, 1:8] = np.minimum(lengths[:, 1:8], 100)
    mask = (np.arange(length) < lengths[..., None]) & (rng.random((batch, n, length)) < 0.8)
    mask[0, 0] &= n == 1  # a document without a token

    tokens = centroids[codes].astype(np.float64) + weights[buckets]
    inverse = 1 / np.linalg.norm(tokens, axis=-1)
    scores = np.einsum("bqd,bnld->bnlq", queries, tokens * inverse[..., None])
    expected = np.where(mask[..., None], scores, -np.inf).max(axis=2).sum(axis=-1)

    similarity = np.einsum("bqd,bnld->bnlq", queries, centroids[codes])
    arguments = SimpleNamespace(
        queries=queries,
        similarity=similarity,
        residuals=np.asarray(pack(jnp.asarray(buckets), nbits)),
        inverse_norms=inverse.astype(np.float32),
        mask=mask,
        bucket_weights=weights,
    )
    return arguments, expected


def shapes(nbits=2, n=16):
    f32 = jnp.float32
    sizes = ((2, 8, 16), f32), ((2, n, 20, 8), f32), ((2, n, 20, 2 * nbits), jnp.uint8)
    sizes += ((2, n, 20), f32), ((2, n, 20), bool), ((1 << nbits,), f32)
    return [jax.ShapeDtypeStruct(*size) for size in sizes]


def lowered(function, platform, arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
