"""Fixed point against floats: errors within their bound, results the same to the bit."""

import numpy as np
import pytest

pytest.importorskip("numba")

from plaid_reference import random_index, random_queries

from colbert_jax.compression import fixed_point
from colbert_jax.compression.codec import unpack
from colbert_jax.config import SearchConfig
from colbert_jax.search import cpu
from colbert_jax.search.cpu import cpu_arrays, cpu_exact, cpu_search, with_fixed_point

if not fixed_point.is_fast():
    pytest.skip("this CPU has no AVX-512: scores are in floats alone", allow_module_level=True)

SHAPES = [(1, 128), (1, 256), (2, 64), (2, 192), (4, 32), (4, 128)]


def made(nbits, dim, seed=0, **settings):
    rng = np.random.default_rng(seed)
    arrays, lengths = random_index(
        rng, nbits=nbits, dim=dim, num_documents=150, longest=90, long_document=300, **settings
    )
    return with_fixed_point(cpu_arrays(arrays)), random_queries(rng, arrays, 3, 19), lengths


def scored(arrays, rows):
    """Scores of all documents in floats and in fixed point, and the bound on their difference."""
    everything = np.arange(len(arrays.offsets) - 1).astype(np.int32)
    floats, fixed = np.empty((2, 1, len(everything)), np.float32)
    (query,), work = cpu._in_fixed_point(arrays, [rows])
    work(everything, 0, len(everything), fixed)
    columns, parts = cpu._columns(rows), np.array([0, len(rows)])
    cpu._score_exactly(arrays, columns, parts, everything, 0, len(everything), floats)
    return floats[0], fixed[0], query.error


@pytest.mark.parametrize(("nbits", "dim"), SHAPES)
def test_errors_are_within_their_bound(nbits, dim):
    arrays, queries, lengths = made(nbits, dim)
    for size in (1.0, 30.0):  # queries that are no unit vectors, too
        floats, fixed, error = scored(arrays, size * queries[0])
        assert np.isneginf(fixed[lengths == 0]).all()
        sure = np.isfinite(fixed)
        assert sure.sum() > 100
        differences = np.abs(floats[sure] - fixed[sure])
        assert 0 < differences.max() < error < 0.05 * size * len(queries[0])


def test_short_token_embeddings_are_left_to_floats():
    """Before normalisation: there, rounding turns a direction by more than the bound says."""
    arrays, queries, lengths = made(4, 128)
    centroids = arrays.centroids.copy()
    centroids[3] = -unpacked(arrays, np.flatnonzero(arrays.codes == 3)[0])  # that token is zero
    arrays = with_fixed_point(arrays._replace(centroids=centroids))
    owners = np.repeat(np.arange(len(lengths)), lengths)
    zero = np.flatnonzero(arrays.codes == 3)[0]
    _, fixed, _ = scored(arrays, queries[0])
    assert fixed[owners[zero]] == np.inf
    same(arrays, queries, 5)


def unpacked(arrays, token):
    table = arrays.table.view(np.float32).reshape(256, -1)
    return table[arrays.residuals[token]].ravel()


def same(arrays, queries, k, allowed=None):
    floats = arrays._replace(fixed=None)
    for search in (
        lambda arrays: cpu_exact(arrays, queries, k, allowed),
        lambda arrays: cpu_search(arrays, queries, k, SearchConfig(4, 0.2, 400), allowed),
        lambda arrays: cpu_search(arrays, queries[:1], k, SearchConfig(4, -1.0, 400), allowed),
    ):
        for ours, theirs in zip(search(arrays), search(floats), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("nbits", "dim"), SHAPES)
def test_results_are_those_of_floats(nbits, dim):
    arrays, queries, lengths = made(nbits, dim, seed=nbits, copies=0.5)
    for k in (1, 10):
        same(arrays, queries, k)
    same(arrays, queries, 5, (np.arange(len(lengths)) % 3 == 0) & (lengths > 0))


def test_what_fixed_point_can_not_do():
    for nbits, dim in ((8, 128), (4, 24), (2, 32), (1, 64)):
        arrays, queries, _ = made(nbits, dim)
        assert arrays.fixed is None
        assert (cpu_exact(arrays, queries, 3)[0] >= 0).all()
    arrays, _, _ = made(4, 128)
    table = arrays.table.view(np.float32).reshape(256, -1)
    assert fixed_point.fixed_point(arrays.centroids * np.float32("inf"), table) is None


@pytest.mark.parametrize(("nbits", "dim"), SHAPES)
def test_order_is_that_of_packed_fields(nbits, dim):
    packed = np.random.default_rng(0).integers(0, 256, dim * nbits // 8).astype(np.uint8)
    buckets = unpack(packed[None], nbits)[0][fixed_point.order_of(dim, nbits)]
    shifts = 8 - nbits * (np.arange(8 // nbits) + 1)
    fields = (packed.reshape(-1, 1, fixed_point.CHUNK) >> shifts[:, None]) & ((1 << nbits) - 1)
    values = unpack((np.arange(1 << nbits) << (8 - nbits)).astype(np.uint8)[:, None], nbits)[:, 0]
    np.testing.assert_array_equal(values[fields.ravel()], buckets)
