import jax.numpy as jnp
import numpy as np
import pytest
from support import unit_rows

from colbert_jax.search import exact, raw
from colbert_jax.search.arrays import RawArrays
from colbert_jax.search.exact import exact_search
from colbert_jax.search.raw import RawSearch


@pytest.fixture(params=[exact.TOKENS, 64], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(exact, "TOKENS", request.param)


def ranking(queries, documents, k):
    scores = np.array(
        [[(q @ d.T).max(axis=1).sum() if len(d) else -np.inf for d in documents] for q in queries]
    )
    order = np.lexsort((np.broadcast_to(np.arange(len(documents)), scores.shape), -scores))
    return order[:, :k], np.take_along_axis(scores, order, axis=1)[:, :k]


def test_equals_brute_force(blocks):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 70, 60)
    values = unit_rows(rng, lengths.sum(), 16)
    documents = np.split(values, np.cumsum(lengths)[:-1])
    arrays = RawArrays(jnp.asarray(values), jnp.asarray(np.r_[0, np.cumsum(lengths)], jnp.int32))
    queries = unit_rows(rng, 3, 7, 16)
    k = int((lengths > 0).sum())
    hits = exact_search(arrays, lengths, queries, k)
    ids, scores = ranking(queries, documents, k)
    np.testing.assert_array_equal(hits.positions, ids)
    np.testing.assert_allclose(hits.scores, scores, rtol=1e-5)


def test_equal_scores_by_smaller_id(blocks):
    """Copies of two documents of different lengths, so that they meet in different blocks."""
    rng = np.random.default_rng(1)
    one = unit_rows(rng, 4, 8)
    twice = np.concatenate([one, one, one, one, one])  # the same maxima with 20 tokens
    values = np.concatenate([twice, one, twice, one])
    lengths = np.array([20, 4, 20, 4])
    arrays = RawArrays(jnp.asarray(values), jnp.asarray(np.r_[0, np.cumsum(lengths)], jnp.int32))
    hits = exact_search(arrays, lengths, unit_rows(rng, 2, 5, 8), 4)
    assert hits.positions.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("kernels", ["0", "1"], ids=["xla", "numba"])
def test_without_an_index(monkeypatch, kernels):
    """Documents with no token, more queries than one pass takes, shorter ones, equal scores."""
    monkeypatch.setenv("COLBERT_JAX_CPU_KERNELS", kernels)
    monkeypatch.setattr(raw, "QUERIES", 2)
    rng = np.random.default_rng(0)
    documents = [unit_rows(rng, n, 16) for n in (5, 70, 0, 16, 150, 1)]
    documents[4:4] = [documents[1], documents[0]]
    queries = unit_rows(rng, 3, 7, 16)
    queries[1, 5:] = 0
    offsets = np.cumsum([0, *map(len, documents)])
    hits = RawSearch(np.concatenate(documents), offsets).search(queries, 7)
    ids, scores = ranking(queries, documents, 7)
    np.testing.assert_array_equal(hits.positions, ids)
    np.testing.assert_allclose(hits.scores, scores, rtol=1e-5, atol=1e-6)
