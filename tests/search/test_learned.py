"""Learned candidates, by every backend, against their definition."""

import jax
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from plaid_reference import (
    NearTie,
    exact_reference,
    learned_units,
    random_index,
    random_queries,
)

from colbert_jax.config import SearchConfig
from colbert_jax.search.arrays import DamagedArrayError
from colbert_jax.search.backend import CpuBackend, DeviceBackend, ShardedBackend
from colbert_jax.search.learned import LearnedArrays

N = 200
WAYS = ["numba", "xla", "one device", pytest.param("mesh", marks=pytest.mark.slow)]


def make(way, arrays, learned):
    if way == "numba":
        pytest.importorskip("numba")
        return CpuBackend(arrays, learned)
    if way == "xla":
        return DeviceBackend(arrays, None, learned)
    devices = jax.devices()[: 1 if way == "one device" else 8]
    mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    return ShardedBackend(arrays, mesh, learned)


def index(seed=0, lengths=None):
    """Vectors that are no good at predicting, so that what they choose is seen; with equal ones."""
    rng = np.random.default_rng(seed)
    arrays, lengths = random_index(
        rng, num_documents=N, num_centroids=20, longest=40, lengths=lengths
    )
    dim = arrays.centroids.shape[1]
    vectors = rng.integers(-127, 128, (N, 32)).astype(np.int8)
    vectors[50:60] = vectors[40:50]
    scales = rng.random(N).astype(np.float32) * (lengths > 0)
    scales[50:60] = scales[40:50]
    landmarks = rng.normal(size=(24, dim)).astype(np.float32)
    landmarks /= np.linalg.norm(landmarks, axis=1, keepdims=True)
    projection = rng.normal(size=(24, 32)).astype(np.float32)
    learned = LearnedArrays(landmarks, projection, vectors, scales)
    return arrays, lengths, learned, random_queries(rng, arrays, 3, 8)


def reference(arrays, lengths, learned, query, k, ndocs, allowed):
    units = learned_units(learned, query[None])[0].astype(np.int64)
    scores = (learned.vectors.astype(np.int64) @ units).astype(np.float32) * learned.scales
    eligible = np.flatnonzero((lengths > 0) & allowed)
    order = eligible[np.lexsort([eligible, -scores[eligible]])]
    chosen = np.isin(np.arange(N), order[: max(ndocs, k)])
    return exact_reference(arrays, query, k, chosen)


@pytest.mark.parametrize("way", WAYS)
def test_equals_the_definition(way):
    arrays, lengths, learned, queries = index()
    backend = make(way, arrays, learned)
    rng = np.random.default_rng(1)
    for share, k, ndocs in ((1.0, 5, 16), (1.0, 30, 16), (0.5, 5, 16), (0.05, 3, 16)):
        allowed = rng.random(N) < share
        k = min(k, int((allowed & (lengths > 0)).sum()))
        hits = backend.learned(queries, k, SearchConfig(ndocs=ndocs).resolve(k), allowed)
        for row, query in enumerate(queries):
            positions, scores = reference(arrays, lengths, learned, query, k, ndocs, allowed)
            if np.count_nonzero(allowed) <= max(ndocs, k):  # all of them are scored
                positions, scores = exact_reference(arrays, query, k, allowed)
            assert hits.positions[row].tolist() == positions.tolist()
            np.testing.assert_allclose(hits.scores[row], scores, rtol=1e-5, atol=1e-5)


@settings(max_examples=12, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12), share=st.sampled_from([0.6, 0.3]))
@pytest.mark.parametrize("way", ["numba", pytest.param("xla", marks=pytest.mark.slow)])
def test_any_collection(way, seed, k, share):
    """Of one shape, so that one program serves all."""
    arrays, lengths, learned, queries = index(seed, np.full(N, 3))
    allowed = np.random.default_rng(seed).random(N) < share
    k = min(k, int(allowed.sum()))
    hits = make(way, arrays, learned).learned(
        queries[:1], k, SearchConfig(ndocs=16).resolve(k), allowed
    )
    try:
        positions, scores = reference(arrays, lengths, learned, queries[0], k, 16, allowed)
    except NearTie:
        reject()
    assert hits.positions[0].tolist() == positions.tolist()
    np.testing.assert_allclose(hits.scores[0], scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_exact_where_all_are_candidates(way):
    arrays, _, learned, queries = index(1)
    queries[1] = 0  # nothing but padding
    backend, config = make(way, arrays, learned), SearchConfig(ndocs=256).resolve(10)
    hits, exact = backend.learned(queries, 10, config), backend.exact(queries, 10)
    np.testing.assert_array_equal(hits.positions, exact.positions)
    np.testing.assert_allclose(hits.scores, exact.scores, rtol=1e-5, atol=1e-5)


def test_grown_on_a_device():
    arrays, _, learned, queries = index()
    backend, config = make("xla", arrays, learned), SearchConfig(ndocs=16).resolve(5)
    first = backend.learned(queries, 5, config)
    again = backend.grown(arrays, learned).learned(queries, 5, config)
    np.testing.assert_array_equal(first.positions, again.positions)


@pytest.mark.parametrize("way", WAYS[:2])
def test_damage_is_named(way):
    arrays, _, learned, queries = index()
    learned.scales[3] = np.nan
    with pytest.raises(DamagedArrayError, match="learned_scales: damaged: holds NaN"):
        make(way, arrays, learned).learned(queries, 5, SearchConfig(ndocs=16).resolve(5))
