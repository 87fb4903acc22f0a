"""Learned vectors: what they predict, and that every way of making them makes the same ones."""

import numpy as np
import pytest
from plaid_reference import learned_units

from colbert_jax.compression import learned
from colbert_jax.search.learned import LearnedArrays, predicted_scores

DIM = 16


def collection(seed=0, documents=300, topics=30):
    """Documents about one of some topics each, a few of them without a token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 12, documents)
    centres = rng.normal(size=(topics, DIM))
    values = np.repeat(centres[rng.integers(0, topics, documents)], lengths, axis=0)
    values = (values + 0.7 * rng.normal(size=values.shape)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True), lengths


@pytest.fixture(scope="module")
def fitted():
    values, lengths = collection()
    return learned.fit(values, lengths, 64, seed=1), values, lengths


def maxsim(values, lengths, queries):
    """float[B, N], -inf for documents without a token."""
    ends = np.cumsum(lengths)
    scores = np.full((len(queries), len(lengths)), -np.inf)
    for i in np.flatnonzero(lengths):
        rows = values[ends[i] - lengths[i] : ends[i]]
        scores[:, i] = (queries @ rows.T).max(axis=-1).sum(axis=-1)
    return scores


def arrays_of(predictor, vectors, scales):
    return LearnedArrays(predictor.landmarks, predictor.projection, vectors, scales)


def test_the_best_are_predicted(fitted):
    """The ten best of 300 are nearly all among the 60 with the best predicted scores."""
    predictor, values, lengths = fitted
    arrays = arrays_of(predictor, *learned.document_vectors(predictor, values, lengths))
    rng = np.random.default_rng(2)
    picked = values[rng.integers(0, len(values), (40, 3))]
    queries = picked + 0.3 * rng.normal(size=picked.shape)
    queries = (queries / np.linalg.norm(queries, axis=-1, keepdims=True)).astype(np.float32)
    exact = np.argsort(-maxsim(values, lengths, queries), axis=1)[:, :10]
    predicted = np.where(lengths > 0, np.asarray(predicted_scores(arrays, queries)), -np.inf)
    best = np.argsort(-predicted, axis=1)[:, :60]
    assert np.mean([np.isin(e, b).mean() for e, b in zip(exact, best, strict=True)]) > 0.95


def test_targets_are_maxima(fitted):
    predictor, values, lengths = fitted
    full = lengths[lengths > 0]
    found = learned.targets(predictor.tokens, values, full)
    expected = maxsim(values, full, predictor.tokens[:, None])
    np.testing.assert_allclose(found, expected.T, atol=1e-5)
    assert learned.targets(predictor.tokens, values[:0], full[:0]).shape == (0, len(found[0]))


def test_equal_by_kernels_and_by_xla(fitted):
    predictor, values, lengths = fitted
    full = lengths[lengths > 0]
    ways = learned._vectors_by_kernels, learned._vectors_by_xla
    (own, scales), (other, other_scales) = (
        tuple(np.concatenate(column) for column in zip(*way(predictor, values, full), strict=True))
        for way in ways
    )
    np.testing.assert_allclose(scales, other_scales, rtol=1e-3)
    assert np.abs(own.astype(int) - other).max() <= 1
    assert (own != other).mean() < 0.01


def test_a_document_alone_has_the_same_vector(fitted):
    predictor, values, lengths = fitted
    vectors, scales = learned.document_vectors(predictor, values, lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for i in (0, 7, 133, 299):
        rows = values[starts[i] : starts[i + 1]]
        own, scale = learned.document_vectors(predictor, rows, lengths[i : i + 1])
        assert np.abs(own[0].astype(int) - vectors[i]).max() <= 1
        np.testing.assert_allclose(scale[0], scales[i], rtol=1e-3)
    assert not vectors[lengths == 0].any() and not scales[lengths == 0].any()


def test_the_seed_decides(fitted):
    predictor, values, lengths = fitted
    again = learned.fit(values, lengths, 64, seed=1)
    other = learned.fit(values, lengths, 64, seed=2)
    for name in learned.Predictor._fields:
        np.testing.assert_array_equal(getattr(again, name), getattr(predictor, name))
    assert not np.array_equal(other.solver, predictor.solver)


def test_tiny_collections():
    """A width that there are no directions for is cut; one token is enough."""
    values, lengths = collection(documents=2, topics=1)
    values, lengths = values[:1], np.array([0, 1, 0])
    predictor = learned.fit(values, lengths, 512, seed=0)
    assert predictor.sizes == {"landmarks": 1, "tokens": 1, "width": 1}
    vectors, scales = learned.document_vectors(predictor, values, lengths)
    assert vectors.shape == (3, 1) and np.isfinite(scales).all()


def test_predicted_scores_of_padded_queries(fitted):
    """Rows of zeros are padding, wherever they are; a query of nothing else predicts nothing."""
    predictor, values, lengths = fitted
    arrays = arrays_of(predictor, *learned.document_vectors(predictor, values, lengths))
    queries = np.zeros((3, 6, DIM), np.float32)
    queries[0, :4], queries[1, 2:5] = values[:4], values[9:12]
    found = predicted_scores(arrays, queries)
    padded = np.pad(queries, [(0, 0), (2, 3), (0, 0)])
    np.testing.assert_allclose(predicted_scores(arrays, padded), found, rtol=0.05, atol=0.5)
    assert not np.asarray(found[2]).any()
    expected = learned_units(arrays, queries).astype(int) @ arrays.vectors.T.astype(int)
    np.testing.assert_allclose(found, expected * arrays.scales, rtol=0.05, atol=0.5)
