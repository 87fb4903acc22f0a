"""MaxSim on compressed tokens, without making their embeddings (PLAID, section 4.5: stage 4).

The embedding of a token is (c + w) / |c + w|: c is its centroid, w the bucket weights of its packed
residual. The earlier stages have computed the centroid scores S = C . q, so the score of a token
for a query row q is

    (S[code] + q . w) / |c + w|

The centroids are not read again; only w, b bits a dimension, is decompressed.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from colbert_jax import runtime
from colbert_jax.compression.codec import unpack_weights
from colbert_jax.scoring.slots import slot_weights

KERNELS = ("xla", "pallas", "mosaic_gpu")


def token_maxima(
    queries: jax.Array,
    similarity: jax.Array,
    residuals: jax.Array,
    scale: jax.Array,
    weights: jax.Array,
    *,
    kernel: str | None = None,
) -> jax.Array:
    """Take the best score of each document's tokens for each query row.

    Args:
      queries: float32[B, Lq, D], dimensions in the order of `slots.slot_major`.
      similarity: float32[B, n, L, Lq], the score of each token's centroid for each query row.
      residuals: uint8[B, n, L, D * b / 8], packed (see `compression.codec`).
      scale: float32[B, n, L], see `inverse_norms`; 0 where there is no token.
      weights: float32[2^b], in the order of `slots.field_weights`.
      kernel: "pallas" (the fused kernel for TPUs), "mosaic_gpu" (that for GPUs) or "xla". If None,
        the fused kernel where the program is compiled for a TPU, or for a GPU if
        `runtime.use_gpu_kernels`; XLA elsewhere.

    Returns:
      float32[B, n, Lq], -inf for a document without a token.

    Raises:
      ValueError: an unknown kernel.
    """
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS} or None, got {kernel!r}")
    operands = (queries, similarity, residuals, scale, weights)
    if kernel is not None:
        return _BY_NAME[kernel](*operands)
    fused = {"tpu": _by_pallas} | ({"cuda": _by_mosaic_gpu} if runtime.use_gpu_kernels() else {})
    return jax.lax.platform_dependent(*operands, **fused, default=_by_xla)


def _by_pallas(*operands: jax.Array) -> jax.Array:
    from colbert_jax.scoring import residual_tpu  # Pallas takes a while to import

    return residual_tpu.token_maxima(*operands)


def _by_mosaic_gpu(*operands: jax.Array) -> jax.Array:
    from colbert_jax.scoring import residual_gpu

    return residual_gpu.token_maxima(*operands)


def _by_xla(
    queries: jax.Array,
    similarity: jax.Array,
    residuals: jax.Array,
    scale: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    tokens = weights[residuals] if len(weights) == 256 else slot_weights(residuals, list(weights))
    products = jnp.einsum(
        "bqd,bnld->bnlq",
        queries,
        tokens,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    scores = (similarity + products) * scale[..., None]
    scores = jnp.where(scale[..., None] > 0, scores, -jnp.inf)
    return scores.max(axis=2, initial=-jnp.inf)


_BY_NAME: dict[str, Callable[..., jax.Array]] = {
    "xla": _by_xla,
    "pallas": _by_pallas,
    "mosaic_gpu": _by_mosaic_gpu,
}


def inverse_norms(
    centroids: jax.Array, codes: jax.Array, residuals: jax.Array, bucket_weights: jax.Array
) -> jax.Array:
    """Compute 1 / |centroid + bucket weights| of each token, the norm being at least 1e-12.

    Args:
      centroids: float32[K, D].
      codes: int32[...].
      residuals: uint8[..., D * b / 8].
      bucket_weights: float32[2^b].

    Returns:
      float32[...].
    """
    values = centroids[codes] + unpack_weights(bucket_weights, residuals)
    return 1 / jnp.maximum(jnp.linalg.norm(values, axis=-1), 1e-12)
