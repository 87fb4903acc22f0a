"""k-means over token embeddings (Lloyd), on the device, over points that stay on the host.

Only a block of points is on the device at a time, so the points may be a memory-mapped file of any
size; the centroids, their sums and counts stay there.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from colbert_jax.compression.assign import nearest, pad_block
from colbert_jax.progress import progress_bar

_BLOCK = 1 << 16  # points per step
_SPLIT = 1 / 1024  # how far the two halves of a split cluster move apart


def sample_size_for(num_documents: int) -> int:
    """Documents to train on: Stanford's rule, `1 + 16 sqrt(120 N)`, at most N.

    120 stands for a typical document length.
    """
    return min(1 + int(16 * math.sqrt(120 * num_documents)), num_documents)


def num_centroids_for(num_tokens: float) -> int:
    """Stanford's rule: the largest power of two not above `16 sqrt(tokens)`."""
    return 1 << int(math.log2(16 * math.sqrt(max(num_tokens, 1))))


def train_kmeans(
    points: np.ndarray,
    num_centroids: int,
    *,
    rows: np.ndarray | None = None,
    iterations: int = 4,
    max_points_per_centroid: int = 256,
    seed: int = 123,
    progress: bool | None = None,
) -> np.ndarray:
    """Centroids of unit length.

    Euclidean Lloyd iterations from randomly chosen points; a cluster that loses all its points is
    refilled by splitting one of the largest; normalised at the end, as Stanford's are.

    Args:
      points: [n, D], float16 or float32, in memory or mapped; n >= 1.
      num_centroids: K; at most n are made.
      rows: int[m], ascending: train on these points only; None: on all.
      max_points_per_centroid: above this many times K, a random subset is trained on.
      seed: of the subset and the initial centroids.

    Returns:
      float32[min(K, n), D].

    Raises:
      ValueError: no points.
    """
    rows = np.arange(len(points)) if rows is None else rows
    if len(rows) == 0:
        raise ValueError("k-means needs at least one point, got none")
    num_centroids = min(num_centroids, len(rows))
    rng = np.random.default_rng(seed)
    most = max_points_per_centroid * num_centroids
    if len(rows) > most:
        rows = np.sort(rng.choice(rows, most, replace=False))
    n = len(rows)
    initial = np.sort(rng.choice(rows, num_centroids, replace=False))
    centroids = jnp.asarray(points[initial], jnp.float32)

    blocks = range(0, n, _BLOCK)
    with progress_bar(
        iterations * n, f"k-means, {num_centroids} centroids", "tok", progress
    ) as bar:
        for _ in range(iterations):
            sums = jnp.zeros_like(centroids)
            counts = jnp.zeros(num_centroids, jnp.float32)
            bias = -0.5 * (centroids**2).sum(axis=1)
            for start in blocks:
                stop = min(start + _BLOCK, n)
                padded = pad_block(points[rows[start:stop]], _BLOCK)
                sums, counts = _accumulate(centroids, bias, sums, counts, padded, stop - start)
                counts.block_until_ready()
                bar.update(stop - start)
            means = sums / jnp.maximum(counts, 1)[:, None]
            centroids = jnp.asarray(_refill(np.asarray(means), np.asarray(counts)))
    norms = jnp.linalg.norm(centroids, axis=1, keepdims=True)
    return np.asarray(centroids / jnp.maximum(norms, 1e-12))


@partial(jax.jit, donate_argnames=("sums", "counts"))
def _accumulate(
    centroids: jax.Array,
    bias: jax.Array,
    sums: jax.Array,
    counts: jax.Array,
    points: jax.Array,
    valid: int,
) -> tuple[jax.Array, jax.Array]:
    """Add a block of points [b, D], of which the first `valid` count, to their clusters."""
    weight = (jnp.arange(points.shape[0]) < valid).astype(jnp.float32)
    points = points.astype(jnp.float32)
    codes = nearest(points, centroids, bias)
    sums = sums.at[codes].add(points * weight[:, None])
    return sums, counts.at[codes].add(weight)


def _refill(means: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Give each empty cluster half of one of the largest: two copies, moved slightly apart."""
    empty = np.flatnonzero(counts == 0)
    if len(empty) == 0:
        return means
    means, counts = means.copy(), counts.copy()
    nudge = _SPLIT * np.where(np.arange(means.shape[1]) % 2 == 0, 1, -1).astype(means.dtype)
    # The largest clusters in order; several rounds where there are more empty ones than others.
    for start in range(0, len(empty), len(counts) - len(empty)):
        targets = empty[start : start + len(counts) - len(empty)]
        donors = np.argsort(-counts, kind="stable")[: len(targets)]
        means[targets] = means[donors] * (1 + nudge)
        means[donors] *= 1 - nudge
        counts[targets] = counts[donors] / 2
        counts[donors] /= 2
    return means
