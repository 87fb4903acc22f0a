"""The bucket weights of packed residuals, in an order of the dimensions that needs no interleaving.

A byte holds 8 / b buckets of b bits. Slot-major order takes first the dimensions that each byte
holds first, then those that it holds second, and so on: the weights of a residual are then 8 / b
runs over its bytes, one for each shift.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from colbert_jax.compression.codec import nbits_of, reversed_bits


def slot_major(values: jax.Array, bucket_weights: jax.Array) -> jax.Array:
    """Reorder the dimensions of [..., D] to slot-major order.

    Args:
      values: [..., D].
      bucket_weights: float32[2^b], for b alone.
    """
    slots = 8 // nbits_of(bucket_weights)
    parts = values.reshape(*values.shape[:-1], values.shape[-1] // slots, slots)
    return parts.swapaxes(-1, -2).reshape(values.shape)


def slot_weights(residuals: jax.Array, values: Sequence[jax.Array]) -> jax.Array:
    """Unpack residuals uint8[..., P] to bucket weights float32[..., P * 8 / b], slot-major.

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
    """Reorder bucket weights float32[2^b] by the value of a bucket's bits as a byte holds them.

    A bucket is written with its least significant bit first, in a byte whose first bit is the most
    significant: read out of the byte, its bits are reversed.
    """
    return bucket_weights[reversed_bits(nbits_of(bucket_weights))]
