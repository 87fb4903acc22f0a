"""MaxSim on compressed tokens, without making their embeddings (PLAID, section 4.5: stage 4).

The embedding of a token is (c + w) / |c + w|: its centroid c, and w, the bucket weights that its
packed residual stands for. With the centroid scores S = C . q known from the earlier stages, a
query row scores it

    (S[code] + q . w) / |c + w|

so that the centroids are not read again, and only w, b bits a dimension, is decompressed.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from colbert_jax.compression.codec import reversed_bits, unpack_weights

KERNELS = ("xla", "pallas")


def residual_maxsim(
    queries: jax.Array,
    similarity: jax.Array,
    residuals: jax.Array,
    inverse_norms: jax.Array,
    mask: jax.Array,
    bucket_weights: jax.Array,
    *,
    kernel: str | None = None,
) -> jax.Array:
    """Every query with its own compressed documents.

    Args:
      queries: float32[B, Lq, D].
      similarity: float32[B, n, L, Lq], each token's centroid with each query row: S[code].
      residuals: uint8[B, n, L, D * b / 8], packed (see `compression.codec`).
      inverse_norms: float32[B, n, L], positive, see `inverse_norms`.
      mask: bool[B, n, L], the documents' tokens.
      bucket_weights: float32[2^b].
      kernel: "pallas" (a TPU's fused kernel), "xla", or None: the fused kernel where the program is
        compiled for a TPU, XLA elsewhere.

    Returns:
      float32[B, n]: the maximum over the tokens, summed over the query rows. A document without a
      token scores -inf, a query row of zeros adds nothing.

    Raises:
      ValueError: a shape does not fit the others, or there is no such kernel.
    """
    _check(queries, similarity, residuals, inverse_norms, mask, bucket_weights, kernel)
    # A norm is finite, so that no token has an inverse of 0: it can stand for "no token here".
    scale = jnp.where(mask, inverse_norms, 0.0).astype(jnp.float32)
    weights = bucket_weights.astype(jnp.float32)
    operands = (slot_major(queries, weights), similarity, residuals, scale, field_weights(weights))
    return token_maxima(*operands, kernel=kernel).sum(axis=-1)


def token_maxima(
    queries: jax.Array,
    similarity: jax.Array,
    residuals: jax.Array,
    scale: jax.Array,
    weights: jax.Array,
    *,
    kernel: str | None = None,
) -> jax.Array:
    """The best token of each document for each query row, of arguments that are prepared already.

    Args:
      queries: float32[B, Lq, D], dimensions in the order of `slot_major`.
      similarity, residuals, kernel: as `residual_maxsim`.
      scale: float32[B, n, L], the inverse norm of a token, 0 where there is none.
      weights: float32[2^b], in the order of `field_weights`.

    Returns:
      float32[B, n, Lq], -inf for a document without a token.
    """
    operands = (queries, similarity, residuals, scale, weights)
    if kernel is None:
        return jax.lax.platform_dependent(*operands, tpu=_by_pallas, default=_by_xla)
    return (_by_pallas if kernel == "pallas" else _by_xla)(*operands)


def _by_pallas(*operands: jax.Array) -> jax.Array:
    from colbert_jax.scoring import residual_tpu  # Pallas takes a while to import

    return residual_tpu.token_maxima(*operands)


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


def slot_major(values: jax.Array, bucket_weights: jax.Array) -> jax.Array:
    """[..., D] with the dimensions reordered: first those that a byte holds first, and so on.

    In this order the weights of a residual are 8 / b runs of its bytes, one for each shift, and
    nothing is interleaved.
    """
    slots = 8 // _nbits(bucket_weights)
    parts = values.reshape(*values.shape[:-1], values.shape[-1] // slots, slots)
    return parts.swapaxes(-1, -2).reshape(values.shape)


def slot_weights(residuals: jax.Array, values: Sequence[jax.Array]) -> jax.Array:
    """Packed residuals uint8[..., P] to bucket weights float32[..., P * 8 / b], slot-major.

    A lookup is a tree of selects, one level for each bit: a TPU has no fast gather, and elsewhere
    it costs no more for up to 4 bits.

    Args:
      values: the 2^b weights in the order of `field_weights`, each float32[].
    """
    nbits = len(values).bit_length() - 1
    packed = residuals.astype(jnp.int32)
    fields = jnp.concatenate([packed >> shift for shift in range(8 - nbits, -1, -nbits)], axis=-1)
    for bit in range(nbits):
        odd = (fields & (1 << bit)) != 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(odd, high, low) for low, high in pairs]
    return values[0]


def field_weights(bucket_weights: jax.Array) -> jax.Array:
    """float32[2^b], the weight of each value of b bits read as the byte has them.

    A bucket is written with its least significant bit first, in a byte whose first bit is the most
    significant: read out of the byte, its bits are in reverse.
    """
    return bucket_weights[reversed_bits(_nbits(bucket_weights))]


def inverse_norms(
    centroids: jax.Array, codes: jax.Array, residuals: jax.Array, bucket_weights: jax.Array
) -> jax.Array:
    """1 / |centroid + bucket weights| of each token, the norm taken as at least 1e-12.

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


def _nbits(bucket_weights: jax.Array) -> int:
    return bucket_weights.shape[0].bit_length() - 1


def _check(queries, similarity, residuals, inverse_norms, mask, bucket_weights, kernel) -> None:
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS} or None, got {kernel!r}")
    nbits = _nbits(bucket_weights)
    if bucket_weights.shape != (1 << nbits,) or nbits not in (1, 2, 4, 8):
        raise ValueError(
            f"bucket_weights must be 2, 4, 16 or 256 numbers (1, 2, 4 or 8 bits), got an array of "
            f"shape {bucket_weights.shape}"
        )
    b, lq, dim = queries.shape
    n, length = mask.shape[1:]
    expected = {
        "similarity": (similarity, (b, n, length, lq)),
        "residuals": (residuals, (b, n, length, dim * nbits // 8)),
        "inverse_norms": (inverse_norms, (b, n, length)),
        "mask": (mask, (b, n, length)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(
                f"{name} must be {shape} for queries {queries.shape}, a mask {mask.shape} and "
                f"{nbits} bits, got {array.shape}"
            )
    if residuals.dtype != jnp.uint8:
        raise ValueError(f"residuals must be packed in uint8, got {residuals.dtype}")
