"""The residual codec (Santhanam et al., 2022, section 3.3): a centroid and b bits per dimension.

Bytes equal Stanford ColBERT's. A dimension's bucket takes b consecutive bits, the least significant
first; eight consecutive bits make a byte, the first of them the most significant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.compression.assign import nearest, nearest_blocks, pad_block
from colbert_jax.config import NBITS

_BLOCK = 1 << 14  # tokens compressed in one step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidualCodec:
    """
    centroids: float32[K, D].
    bucket_cutoffs: float32[2^b - 1], ascending.
    bucket_weights: float32[2^b], the value that stands for each bucket.
    """

    centroids: jax.Array
    bucket_cutoffs: jax.Array
    bucket_weights: jax.Array

    @property
    def nbits(self) -> int:
        return self.bucket_weights.shape[0].bit_length() - 1


def check_packable(dim: int, nbits: int) -> None:
    """Raise ValueError unless `dim` values of `nbits` fill whole bytes."""
    if nbits not in NBITS:
        raise ValueError(f"nbits must be one of {NBITS}, got {nbits}")
    if dim * nbits % 8:
        raise ValueError(
            f"embeddings of {dim} dimensions at {nbits} bits do not fill whole bytes; "
            f"the dimension must be a multiple of {8 // nbits}"
        )


def train_codec(centroids: np.ndarray, heldout: np.ndarray, nbits: int) -> ResidualCodec:
    """Bucket cutoffs and weights from the residuals of held-out embeddings.

    One codebook for all dimensions: with q_i = i / 2^b the cutoffs are the quantiles q_1.. of the
    residuals, and the weights the quantiles in the middle between.

    Args:
      centroids: float32[K, D].
      heldout: [n, D], n >= 1.
    """
    check_packable(centroids.shape[1], nbits)
    codes = nearest_blocks(heldout, jnp.asarray(centroids))
    residuals = (np.asarray(heldout, np.float32) - centroids[codes]).ravel()
    levels = np.arange(1 << nbits) / (1 << nbits)
    cutoffs = np.quantile(residuals, levels[1:]).astype(np.float32)
    weights = np.quantile(residuals, levels + 0.5 / (1 << nbits)).astype(np.float32)
    return ResidualCodec(jnp.asarray(centroids), jnp.asarray(cutoffs), jnp.asarray(weights))


def compress(codec: ResidualCodec, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings to codes and packed residuals.

    Args:
      values: [n, D].

    Returns:
      codes int32[n], the centroids with the largest dot product, and residuals uint8[n, D * b / 8].
    """
    dim = codec.centroids.shape[1]
    codes = np.empty(len(values), np.int32)
    packed = np.empty((len(values), dim * codec.nbits // 8), np.uint8)
    for start in range(0, len(values), _BLOCK):
        chunk = values[start : start + _BLOCK]
        block = _compress_block(codec, pad_block(chunk, _BLOCK))
        rows = slice(start, start + len(chunk))
        codes[rows], packed[rows] = (np.asarray(part)[: len(chunk)] for part in block)
    return codes, packed


@jax.jit
def _compress_block(codec: ResidualCodec, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    values = values.astype(jnp.float32)
    codes = nearest(values, codec.centroids, jnp.zeros(codec.centroids.shape[0], jnp.float32))
    residuals = values - codec.centroids[codes]
    # A value equal to a cutoff stays below it. Comparing with all is fastest for few cutoffs.
    method = "compare_all" if codec.nbits <= 4 else "scan"
    buckets = jnp.searchsorted(codec.bucket_cutoffs, residuals, side="left", method=method)
    return codes, pack(buckets, codec.nbits)


def decompress(codec: Any, codes: jax.Array, residuals: jax.Array) -> jax.Array:
    """Codes [...] and packed residuals uint8[..., D * b / 8] to unit embeddings float32[..., D].

    `codec` is whatever has `centroids` and `bucket_weights`: a ResidualCodec, an index's arrays.
    """
    values = codec.centroids[codes] + unpack_weights(codec.bucket_weights, residuals)
    return values / jnp.maximum(jnp.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


def unpack_weights(bucket_weights: jax.Array, residuals: jax.Array) -> jax.Array:
    """Packed residuals uint8[..., P] to the weights of their buckets float32[..., P * 8 / b]."""
    nbits = bucket_weights.shape[0].bit_length() - 1
    table = bucket_weights[unpack(np.arange(256, dtype=np.uint8)[:, None], nbits)]
    return table[residuals].reshape(*residuals.shape[:-1], residuals.shape[-1] * 8 // nbits)


def pack(buckets: jax.Array, nbits: int) -> jax.Array:
    """Buckets int[..., D] in 0..2^b-1 to uint8[..., D * b / 8]."""
    bits = (buckets[..., None] >> jnp.arange(nbits)) & 1
    bits = bits.reshape(*buckets.shape[:-1], -1, 8)
    return (bits << jnp.arange(7, -1, -1)).sum(axis=-1).astype(jnp.uint8)


def unpack(packed: np.ndarray, nbits: int) -> np.ndarray:
    """The inverse of `pack`: uint8[..., P] to int32[..., P * 8 / b]."""
    bits = (packed[..., None].astype(np.int32) >> np.arange(7, -1, -1)) & 1
    bits = bits.reshape(*packed.shape[:-1], -1, nbits)
    return (bits << np.arange(nbits)).sum(axis=-1)
