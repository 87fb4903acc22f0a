"""The CPU's path against PLAID's definition, and against the program that accelerators run."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from plaid_reference import NearTie, exact_reference, plaid_reference, random_index, random_queries

from colbert_jax.config import SearchConfig
from colbert_jax.search import cpu, cpu_kernels
from colbert_jax.search.cpu import cpu_arrays, cpu_exact, cpu_search, with_fixed_point


def on_host(arrays):
    return with_fixed_point(cpu_arrays(arrays))


def check(arrays, queries, k, ncells, threshold, ndocs, allowed):
    config = SearchConfig(ncells, threshold, ndocs)
    ids, scores = cpu_search(on_host(arrays), queries, k, config, allowed)
    for row, query in enumerate(queries):
        expected = plaid_reference(arrays, query, k, ncells, threshold, ndocs, allowed)
        n = len(expected[0])
        assert ids[row, :n].tolist() == expected[0].tolist()
        np.testing.assert_allclose(scores[row, :n], expected[1], rtol=1e-5, atol=1e-5)
        assert (ids[row, n:] == len(arrays.offsets) - 1).all()
        assert np.isneginf(scores[row, n:]).all()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    nbits=st.sampled_from([1, 2, 4, 8]),
    num_documents=st.integers(1, 60),
    num_centroids=st.sampled_from([1, 7, 64, 150]),
    long_document=st.sampled_from([0, 700]),
    batch=st.integers(1, 3),
    length=st.integers(1, 33),
    everything=st.booleans(),
    ncells=st.integers(1, 5),
    threshold=st.sampled_from([-2.0, -0.3, 0.4, 0.8, 2.0]),
    ndocs=st.sampled_from([1, 8, 40]),
    share=st.sampled_from([None, 0.0, 0.1, 0.5, 0.9, 1.0]),
    whole_chunks=st.booleans(),
)
def test_equals_the_definition(
    seed,
    nbits,
    num_documents,
    num_centroids,
    long_document,
    batch,
    length,
    everything,
    ncells,
    threshold,
    ndocs,
    share,
    whole_chunks,
):
    rng = np.random.default_rng(seed)
    arrays, _ = random_index(
        rng,
        nbits=nbits,
        num_documents=num_documents,
        num_centroids=num_centroids,
        dim=128 // nbits if whole_chunks else 8 * 3,  # of the residuals of fixed point, or not
        long_document=long_document,
    )
    assume(len(arrays.codes) > 0)  # no index is built without a token
    queries = random_queries(rng, arrays, batch, length)
    k = num_documents if everything else min(5, num_documents)
    allowed = None if share is None else rng.random(num_documents) < share
    try:
        check(arrays, queries, k, min(ncells, num_centroids), threshold, ndocs, allowed)
    except NearTie:
        assume(False)


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
@pytest.mark.parametrize("batch", [1, 5])
def test_exact_equals_the_definition(nbits, batch):
    rng = np.random.default_rng(nbits)
    arrays, lengths = random_index(rng, nbits=nbits, num_documents=70, long_document=300)
    queries = random_queries(rng, arrays, batch, 9)
    k = int((lengths > 0).sum())
    ids, scores = cpu_exact(on_host(arrays), queries, k)
    for row, query in enumerate(queries):
        expected = exact_reference(arrays, query, k)
        assert ids[row].tolist() == expected[0].tolist()
        np.testing.assert_allclose(scores[row], expected[1], rtol=1e-5, atol=1e-5)


def test_threads_change_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    arrays, _ = random_index(rng, num_documents=900, num_centroids=300)
    queries = random_queries(rng, arrays, 7, 12)
    config = SearchConfig(8, 0.3, 256)
    monkeypatch.setattr(cpu, "_SMALL", 4)  # so that a single query is spread too
    alone = [cpu_search(on_host(arrays), query[None], 20, config) for query in queries]
    monkeypatch.setattr(cpu, "num_threads", lambda: 1)
    batch = cpu_search(on_host(arrays), queries, 20, config)
    for row, (ids, scores) in enumerate(alone):
        np.testing.assert_array_equal(ids[0], batch[0][row])
        np.testing.assert_array_equal(scores[0], batch[1][row])


def test_a_query_of_zeros_finds_nothing():
    arrays, _ = random_index(np.random.default_rng(0))
    nothing = np.zeros((1, 4, 16), np.float32)
    ids, scores = cpu_search(on_host(arrays), nothing, 3, SearchConfig(1, 0.5, 8))
    assert (ids == len(arrays.offsets) - 1).all() and np.isneginf(scores).all()


def test_keys_keep_the_order_of_floats():
    values = np.sort(np.array([-np.inf, -2.5, -1e-30, 0.0, 1e-38, 0.3, 7.0], np.float32))
    keys = np.array([cpu_kernels.as_key(bits) for bits in values.view(np.int32)])
    assert (np.diff(keys) > 0).all()
    back = np.array([cpu_kernels.as_key(np.int32(key)) for key in keys], np.int32)
    np.testing.assert_array_equal(back.view(np.float32), values)
