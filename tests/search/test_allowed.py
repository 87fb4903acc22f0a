"""Searches in some of the documents, by every backend; and in none."""

import jax
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from plaid_reference import NearTie, exact_reference, random_index, random_queries

from colbert_jax.config import SearchConfig
from colbert_jax.search.backend import CpuBackend, DeviceBackend, ShardedBackend

N, LONGEST = 200, 6
WAYS = ["numba", "xla", pytest.param("mesh", marks=pytest.mark.slow)]


@pytest.fixture
def backend(request, eight_devices):
    def make(arrays, way):
        if way == "numba":
            pytest.importorskip("numba")
            return CpuBackend(arrays)
        if way == "xla":
            return DeviceBackend(arrays)
        mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=eight_devices)
        return ShardedBackend(arrays, mesh)

    return make


def index(seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    arrays, lengths = random_index(
        rng, num_documents=N, num_centroids=20, longest=LONGEST, copies=0.4, **kwargs
    )
    return arrays, lengths, random_queries(rng, arrays, 3, 8)


def masks(lengths):
    """Bitmaps of many and of few documents, of one, of a single length, and of all."""
    rng = np.random.default_rng(1)
    for share in (0.9, 0.5, 0.2, 0.05):
        yield rng.random(N) < share
    yield np.arange(N) == np.flatnonzero(lengths)[17]
    yield lengths == 3
    yield np.ones(N, bool)


@pytest.mark.parametrize("way", WAYS)
def test_always_the_best_of_the_allowed(backend, way):
    """Exact search is that of the allowed documents alone; PLAID finds k of them, whatever k is."""
    arrays, lengths, queries = index()
    searched = backend(arrays, way)
    for allowed in masks(lengths):
        most = int((allowed & (lengths > 0)).sum())
        for k in {1, min(7, most), most}:
            hits = searched.exact(queries, k, allowed)
            for row, query in enumerate(queries):
                positions, scores = exact_reference(arrays, query, k, allowed)
                assert hits.positions[row].tolist() == positions.tolist()
                np.testing.assert_allclose(hits.scores[row], scores, rtol=1e-5)
            for config in (SearchConfig(1, 0.5, 16), SearchConfig(20, -2.0, 4 * N)):
                found = searched.plaid(queries, k, config, allowed)
                assert found.positions.shape == (len(queries), k) == found.scores.shape
                assert all(len(set(row)) == k for row in found.positions.tolist())
                assert allowed[found.positions].all()
            # All lists, nothing pruned, nothing cut.
            np.testing.assert_array_equal(found.positions, hits.positions)
            np.testing.assert_allclose(found.scores, hits.scores, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_all_allowed_is_no_filter(backend, way):
    arrays, _, queries = index()
    searched, everyone = backend(arrays, way), np.ones(N, bool)
    config = SearchConfig(2, 0.5, 16)
    for with_, without in (
        (searched.plaid(queries, 5, config, everyone), searched.plaid(queries, 5, config)),
        (searched.exact(queries, 5, everyone), searched.exact(queries, 5)),
    ):
        np.testing.assert_array_equal(with_.positions, without.positions)
        np.testing.assert_array_equal(with_.scores, without.scores)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), ncells=st.integers(1, 20))
def test_the_kernels_find_the_best_of_the_allowed(seed, share, ncells):
    pytest.importorskip("numba")
    arrays, lengths, queries = index(seed)
    allowed = np.random.default_rng(seed).random(N) < share
    most = int((allowed & (lengths > 0)).sum())
    backend = CpuBackend(arrays)
    found = backend.plaid(queries, most, SearchConfig(ncells, 0.4, 8), allowed)
    for row, query in enumerate(queries):
        try:
            positions, scores = exact_reference(arrays, query, most, allowed)
        except NearTie:
            reject()
        assert found.positions[row].tolist() == positions.tolist()
        np.testing.assert_allclose(found.scores[row], scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_find(backend, way):
    """No document, no document with a token, none that is allowed."""
    arrays, _, queries = index()
    none = arrays._replace(
        codes=arrays.codes[:0],
        residuals=arrays.residuals[:0],
        lists=arrays.lists[:0],
        list_offsets=np.zeros_like(arrays.list_offsets),
    )
    empty = none._replace(offsets=np.zeros(1, np.int64))
    without = empty._replace(
        centroids=arrays.centroids[:0], list_offsets=np.zeros(1, np.int64), recent_lists=None
    )
    blank = none._replace(offsets=np.zeros(4, np.int64))
    config = SearchConfig(1, 0.5, 8)
    for those, count in ((empty, 0), (without, 0), (blank, 3), (arrays, N)):
        searched = backend(those, way)
        for allowed in (None, np.zeros(count, bool)):
            for hits in (
                searched.exact(queries, 0, allowed),
                searched.plaid(queries, 0, config, allowed),
            ):
                assert hits.positions.shape == hits.scores.shape == (3, 0)
                assert (hits.positions.dtype, hits.scores.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("way", WAYS)
def test_another_shape(backend, way):
    arrays, _, queries = index()
    with pytest.raises(ValueError, match=r"allowed must be \[200\].*got \[199\]"):
        backend(arrays, way).exact(queries, 1, np.ones(199, bool))


@pytest.mark.parametrize("way", ["xla", pytest.param("mesh", marks=pytest.mark.slow)])
def test_another_bitmap_compiles_nothing(backend, way):
    arrays, lengths, queries = index()
    searched = backend(arrays, way)
    rng = np.random.default_rng(5)
    compiled = []

    def searches(few, many):
        for allowed in (few, many):
            searched.plaid(queries, 2, SearchConfig(2, 0.5, 64), allowed)
            searched.exact(queries, 2, allowed)

    def bitmaps():
        few = np.zeros(N, bool)
        few[rng.choice(np.flatnonzero(lengths), rng.integers(4, 16), replace=False)] = True
        return few, rng.random(N) < rng.uniform(0.6, 0.95)

    searched.exact(queries, 2)
    searches(*bitmaps())
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        for _ in range(5):
            searches(*bitmaps())
        assert not compiled
        jax.jit(lambda x: x + 1.5)(1)
        assert compiled  # the listener does listen
    finally:
        jax.monitoring.clear_event_listeners()
