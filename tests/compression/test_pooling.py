"""Token pooling against SciPy's hierarchical clustering."""

import numpy as np
import pytest
from support import unit_rows

from colbert_jax.compression.pooling import pool_tokens, ward_clusters
from colbert_jax.embeddings import DocumentEmbeddings


def scipy_labels(distances, clusters):
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    condensed = np.clip(distances, 0, 2)[np.triu_indices(len(distances), 1)]
    linkage = hierarchy.linkage(condensed, method="ward")
    return hierarchy.fcluster(linkage, t=clusters, criterion="maxclust") - 1


@pytest.mark.parametrize("kind", ["random", "near each other", "ties", "all equal"])
def test_clusters_are_scipys(kind):
    rng = np.random.default_rng(5)
    for n in (2, 3, 5, 8, 31, 180):
        x = unit_rows(rng, n, 16)
        if kind == "near each other":
            x = unit_rows(rng, 1, 16) + 0.2 * x
            x /= np.linalg.norm(x, axis=1, keepdims=True)
        elif kind == "ties":
            x = np.eye(4, dtype=np.float32)[rng.integers(0, 4, n)]
        elif kind == "all equal":
            x = np.repeat(x[:1], n, axis=0)
        distances = 1 - x @ x.T
        for clusters in {1, n // 2, n // 3, n - 1} - {0}:
            expected = scipy_labels(distances, clusters)
            labels, count = ward_clusters(distances, clusters)
            np.testing.assert_array_equal(labels, expected)
            assert count == len(set(expected)) <= clusters


@pytest.mark.parametrize(
    ("factor", "protected", "normalize"),
    [(2, 1, True), (1.5, 0, False), (3, 2, False), (99, 1, True)],
)
def test_pooled_documents(factor, protected, normalize):
    rng = np.random.default_rng(2)
    documents = [unit_rows(rng, n, 8) for n in (1, 2, 3, 40, 17, 0)]
    pooled = pool_tokens(
        DocumentEmbeddings.from_list(documents, 8), factor, protected=protected, normalize=normalize
    )
    for rows, ours in zip(documents, pooled, strict=True):
        first, rest = rows[:protected], rows[protected:]
        clusters = max(int(len(rest) // factor), 1)
        expected = rows
        if clusters < len(rest):
            labels = scipy_labels(1 - rest @ rest.T, clusters)
            means = [rest[labels == label].mean(axis=0) for label in range(labels.max() + 1)]
            expected = np.concatenate([first, means])
        if normalize:
            expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_nothing_to_pool():
    documents = DocumentEmbeddings.from_list([unit_rows(np.random.default_rng(0), 5, 4)], 4)
    np.testing.assert_array_equal(
        pool_tokens(documents, 1, normalize=False).values, documents.values
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(factor=0.5), "pool_factor must be at least 1 and finite, got 0.5"),
        (dict(factor=float("nan")), "pool_factor must be"),
        (dict(factor=2, protected=-1), "pool_protected must be >= 0, got -1"),
    ],
)
def test_bad_settings(settings, message):
    documents = DocumentEmbeddings.from_list([unit_rows(np.random.default_rng(0), 5, 4)], 4)
    with pytest.raises(ValueError, match=message):
        pool_tokens(documents, **settings)
