"""Token pooling (Clavié et al., 2024): fewer token embeddings a document, means of similar ones."""

from __future__ import annotations

import numpy as np

from colbert_jax import runtime
from colbert_jax.config import check_pooling
from colbert_jax.embeddings import DocumentEmbeddings


def pool_tokens(
    documents: DocumentEmbeddings, factor: float, *, protected: int = 1, normalize: bool = True
) -> DocumentEmbeddings:
    """Replace the token embeddings of each document by the means of clusters of them.

    Clusters are hierarchical, by Ward's criterion over cosine distances: equal to SciPy's linkage
    and fcluster, and to HierarchicalTokenPooling of sentence-transformers.

    Args:
      factor: of n token embeddings n // factor are left, at least 1. At 1, none are merged.
      protected: so many first ones of a document stay as they are, in front ([CLS], the marker).
      normalize: whether to divide by the length, all of them.

    Raises:
      ValueError: a factor below 1, or a negative number.
    """
    check_pooling(factor, protected)
    rows: list[np.ndarray] = list(documents)
    threads = min(runtime.num_threads(), max(len(rows), 1))

    def worker(lane: int) -> None:
        for i in range(lane, len(rows), threads):
            rows[i] = _pool(rows[i], factor, protected, normalize)

    runtime.spread(worker, threads)
    return DocumentEmbeddings.from_list(rows, documents.values.shape[1])


def _pool(rows: np.ndarray, factor: float, protected: int, normalize: bool) -> np.ndarray:
    """Pool one document, float32[Ld, D]."""
    first, rest = rows[:protected], rows[protected:]
    clusters = max(int(len(rest) // factor), 1)
    if clusters < len(rest):
        labels, count = ward_clusters(1 - rest @ rest.T, clusters)
        sums = np.zeros((count, rows.shape[1]), np.float32)
        np.add.at(sums, labels, rest)
        means = sums / np.bincount(labels, minlength=count)[:, None].astype(np.float32)
        rows = np.concatenate([first, means])
    if normalize:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows


def ward_clusters(distances: np.ndarray, clusters: int) -> tuple[np.ndarray, int]:
    """Cluster points hierarchically by Ward's criterion.

    Args:
      distances: float[n, n], of which the part above the diagonal is read; limited to 0..2.
      clusters: the most that there may be; below n.

    Returns:
      int64[n], the number of each point's cluster, and how many there are: fewer than `clusters`
      where distances are equal.
    """
    from colbert_jax.compression import pooling_kernels

    n = len(distances)
    above = np.clip(distances[np.triu_indices(n, 1)], 0, 2).astype(np.float64)
    left, right = np.empty(n - 1, np.int64), np.empty(n - 1, np.int64)
    heights = np.empty(n - 1)
    pooling_kernels.ward_merges(above, n, left, right, heights)
    order = np.argsort(heights, kind="stable")
    left, right, heights = left[order], right[order], heights[order]
    labels = np.empty(n, np.int64)
    cut = heights[n - 1 - clusters]
    count = pooling_kernels.flat_clusters(left, right, heights, cut, labels)
    return labels, int(count)
