"""Refill the clusters of k-means that lost all their points."""

from __future__ import annotations

import numpy as np

_SPLIT = 1 / 1024  # how far the two halves of a split cluster move apart


def refill(means: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Give each empty cluster half of one of the largest: two copies, moved slightly apart.

    Args:
      means: float32[K, D].
      counts: float32[K], points of each cluster.

    Returns:
      float32[K, D].
    """
    empty = np.flatnonzero(counts == 0)
    if len(empty) == 0:
        return means
    means, counts = means.copy(), counts.copy()
    nudge = _SPLIT * np.where(np.arange(means.shape[1]) % 2 == 0, 1, -1).astype(means.dtype)
    # The largest clusters in order; in several rounds if there are more empty clusters than others.
    for start in range(0, len(empty), len(counts) - len(empty)):
        targets = empty[start : start + len(counts) - len(empty)]
        donors = np.argsort(-counts, kind="stable")[: len(targets)]
        means[targets] = means[donors] * (1 + nudge)
        means[donors] *= 1 - nudge
        counts[targets] = counts[donors] / 2
        counts[donors] /= 2
    return means
