"""The jitted forms against a numpy definition of three lines."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import unit_rows

from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.scoring import maxsim, maxsim_all_pairs, maxsim_nway, maxsim_ragged


def definition(query, document) -> float:
    if len(document) == 0:
        return -np.inf
    return float((query.astype(np.float64) @ document.T.astype(np.float64)).max(axis=1).sum())


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    lengths = [5, 0, 12, 1, 7]
    documents = DocumentEmbeddings.from_lengths(unit_rows(rng, sum(lengths), 16), lengths)
    return unit_rows(rng, 3, 6, 16), documents


def test_all_pairs(data):
    queries, documents = data
    expected = [[definition(q, d) for d in documents] for q in queries]
    np.testing.assert_allclose(maxsim_all_pairs(queries, *documents.padded()), expected, rtol=1e-5)


def test_nway(data):
    queries, documents = data
    block, mask = documents.padded()
    own = np.array([[0, 2], [3, 1], [4, 0]])
    expected = [
        [definition(q, documents[j]) for j in row] for q, row in zip(queries, own, strict=True)
    ]
    np.testing.assert_allclose(maxsim_nway(queries, block[own], mask[own]), expected, rtol=1e-5)


def test_ragged_candidates(data):
    queries, documents = data
    ids = np.array([[0, 2, 5], [4, -1, 1], [3, 3, 5]], np.int32)  # -1 and 5 are padding
    expected = [
        [definition(q, documents[j]) if 0 <= j < 5 else -np.inf for j in row]
        for q, row in zip(queries, ids, strict=True)
    ]
    offsets = documents.offsets.astype(np.int32)
    for length in (12, 16):
        scores = maxsim_ragged(queries, documents.values, offsets, ids, length=length)
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_padding_changes_nothing(data):
    queries, documents = data
    a = maxsim_all_pairs(queries, *documents.padded())
    b = maxsim_all_pairs(queries, *documents.padded(40))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_negative_maxima_are_kept():
    """No floor at zero: the only document token points away from the query."""
    query, document = jnp.eye(2)[:1], -jnp.eye(2)[:1]
    assert maxsim(query, document, jnp.ones(1, bool)) == -1.0


def test_a_zero_query_row_adds_nothing(data):
    queries, documents = data
    wider = np.pad(queries, [(0, 0), (0, 3), (0, 0)])
    a, b = (maxsim_all_pairs(q, *documents.padded()) for q in (queries, wider))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_half_precision_inputs_sum_in_float32():
    """2,048 query rows of similarity 1: a bfloat16 sum would stop at 256."""
    query = jnp.ones((2048, 1), jnp.bfloat16)
    score = maxsim(query, jnp.ones((1, 1), jnp.bfloat16), jnp.ones(1, bool))
    assert score.dtype == jnp.float32 and score == 2048
