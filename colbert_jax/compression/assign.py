"""Find the nearest centroid of every point, the main cost of compressing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_POINTS = 256  # points of a block, whose scores [256, K] stay in a CPU's cache for the usual K
_SCORES = 1 << 27  # scores of one matmul on an accelerator: 512 MiB, 16,384 points at K = 8,192
_WIDTH = 256


def argmax(x: jax.Array) -> jax.Array:
    """Compute `jnp.argmax` over the last axis in two steps; of equal values the first.

    XLA's CPU backend takes 20 times longer for an arg-max over a long axis than for a maximum, so
    this takes the maxima of blocks and the arg-max of one block only.

    Args:
      x: float[..., n].

    Returns:
      int32[...].
    """
    n = x.shape[-1]
    if n <= _WIDTH:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % _WIDTH)], constant_values=-jnp.inf)
    blocks = x.reshape(*x.shape[:-1], -1, _WIDTH)
    block = jnp.argmax(blocks.max(axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return (block * _WIDTH + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


@jax.jit
def nearest(points: jax.Array, centroids: jax.Array, bias: jax.Array) -> jax.Array:
    """Find the centroid with the largest `point . centroid + bias` for each point.

    It computes in float32 on every backend (no bfloat16 or TF32 passes). Of equal scores the
    smaller centroid is nearer.

    Args:
      points: [n, D].
      centroids: [K, D].
      bias: [K]; zeros for the largest dot product, -|c|^2 / 2 for the smallest distance.

    Returns:
      int32[n].
    """
    arguments = points.astype(jnp.float32), centroids, bias
    # Chosen where the program is lowered for a platform.
    return jax.lax.platform_dependent(*arguments, cpu=nearest_in_cache, default=nearest_by_matmul)


def nearest_in_cache(points: jax.Array, centroids: jax.Array, bias: jax.Array) -> jax.Array:
    """Compute `nearest` on a CPU, a few points at a time, so that scores stay in its cache."""

    def one(point: jax.Array) -> jax.Array:
        scores = jnp.einsum("d,kd->k", point, centroids, precision=jax.lax.Precision.HIGHEST)
        return argmax(scores + bias)

    return jax.lax.map(one, points, batch_size=min(_POINTS, points.shape[0]))


def nearest_by_matmul(points: jax.Array, centroids: jax.Array, bias: jax.Array) -> jax.Array:
    """Compute `nearest` on an accelerator, by matrix products as large as `_SCORES` allows."""
    n, dim = points.shape
    size = min(n, max(_POINTS, _SCORES // len(centroids)))

    def block(points: jax.Array) -> jax.Array:
        scores = jnp.einsum("nd,kd->nk", points, centroids, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmax(scores + bias, axis=-1).astype(jnp.int32)

    if size == n:
        return block(points)
    blocks = jnp.pad(points, [(0, -n % size), (0, 0)]).reshape(-1, size, dim)
    return jax.lax.map(block, blocks).reshape(-1)[:n]


def nearest_blocks(points: np.ndarray, centroids: jax.Array, block: int = 1 << 16) -> np.ndarray:
    """Find the centroid with the largest dot product for each point, a block of points at a time.

    Args:
      points: [n, D], on the host.
      centroids: [K, D].

    Returns:
      int32[n].
    """
    bias = jnp.zeros(centroids.shape[0], jnp.float32)
    codes = np.empty(len(points), np.int32)
    for start in range(0, len(points), block):
        chunk = points[start : start + block]
        codes[start : start + block] = nearest(pad_block(chunk, block), centroids, bias)[
            : len(chunk)
        ]
    return codes


def block_size(rows: int, block: int) -> int:
    """Return a power of two from `rows` to `block`, so that few shapes are compiled."""
    return min(block, max(8, 1 << (rows - 1).bit_length()))


def pad_block(chunk: np.ndarray, block: int) -> np.ndarray:
    """Append rows of zeros up to `block_size`."""
    return pad_to(chunk, block_size(len(chunk), block))


def pad_to(chunk: np.ndarray, size: int) -> np.ndarray:
    """Append rows of zeros up to `size` rows."""
    if len(chunk) == size:
        return chunk
    return np.concatenate([chunk, np.zeros((size - len(chunk), *chunk.shape[1:]), chunk.dtype)])
