"""An index on several devices: how it is cut, and that `Index` answers the same from it."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from plaid_reference import random_index, random_queries

from colbert_jax import Index
from colbert_jax.config import SearchConfig
from colbert_jax.search import plaid_search, sharded
from colbert_jax.search.arrays import IndexArrays, with_inverse_norms


def mesh_of(devices, axis="data"):
    return jax.make_mesh((len(devices),), (axis,), (AxisType.Auto,), devices=devices)


@pytest.mark.parametrize("block", [7, 1 << 22])
def test_split_lists(monkeypatch, block):
    monkeypatch.setattr(sharded, "_LIST_BLOCK", block)
    arrays, _ = random_index(np.random.default_rng(0))
    starts = arrays.list_offsets
    bounds = np.array([0, 9, 9, 30, 40])
    counts = sharded._count_entries(arrays.lists, bounds)
    for s, (start, stop) in enumerate(pairwise(bounds)):
        lists, list_offsets = sharded.split_lists(arrays.lists, starts, start, stop)
        assert len(lists) == list_offsets[-1] == counts[s]
        for c in range(len(starts) - 1):
            whole = arrays.lists[starts[c] : starts[c + 1]]
            own = whole[(whole >= start) & (whole < stop)] - start
            assert lists[list_offsets[c] : list_offsets[c + 1]].tolist() == own.tolist()


def test_document_ranges_have_about_equal_tokens():
    lengths = np.random.default_rng(0).integers(0, 50, 1000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    bounds = sharded.document_ranges(offsets, 8)
    assert bounds[0] == 0 and bounds[-1] == 1000 and (np.diff(bounds) > 0).all()
    tokens = np.diff(offsets[bounds])
    assert np.ptp(tokens) < 100
    assert sharded.document_ranges(np.array([0, 5]), 4).tolist() == [0, 1, 1, 1, 1]


def test_shards_hold_each_token_once(eight_devices):
    """The parts of the devices, put together, are the index."""
    arrays, lengths = random_index(np.random.default_rng(1), long_document=100)
    placed = sharded.shard_arrays(arrays, mesh_of(eight_devices))
    bounds = placed.bounds
    codes, offsets = [], []
    for s in range(8):
        own = {
            name: np.asarray(getattr(placed.arrays, name).addressable_shards[s].data)
            for name in ("codes", "offsets")
        }
        used = own["offsets"][: bounds[s + 1] - bounds[s] + 1]
        codes.append(own["codes"][used[0] : used[-1]])
        offsets.append(np.diff(used))
    np.testing.assert_array_equal(np.concatenate(codes), arrays.codes)
    np.testing.assert_array_equal(np.concatenate(offsets), lengths)


@pytest.mark.parametrize("devices", [1, 8])
def test_index_on_a_mesh(index, model, eight_devices, devices):
    mesh = mesh_of(eight_devices[:devices], "documents")
    other = Index.open(index.path, mesh=mesh)
    queries = model.encode_queries(["running cats", "the heat of the sun"])
    for settings in (dict(k=10), dict(k=10, mode="exact")):
        here, there = index.search(queries, **settings), other.search(queries, **settings)
        np.testing.assert_array_equal(here.positions, there.positions)
        np.testing.assert_allclose(here.scores, there.scores, rtol=1e-5)
    np.testing.assert_array_equal(other.document_embeddings(3), index.document_embeddings(3))


def test_more_devices_than_documents(tmp_path, eight_devices):
    values = np.eye(4, 16, dtype=np.float32)
    index = Index.build(tmp_path / "i", embeddings=values, lengths=[2, 0, 2])
    there = Index.open(index.path, mesh=mesh_of(eight_devices))
    hits = there.search(values[None, 2:], k=5)
    assert hits.positions.tolist() == [[2, 0]]
    np.testing.assert_allclose(hits.scores, [[2, 0]], atol=0.2)


def test_a_mesh_of_two_axes_is_refused(index, eight_devices):
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2, devices=eight_devices)
    with pytest.raises(ValueError, match=r"a mesh of one axis, got .*'a': 2, 'b': 4"):
        Index.open(index.path, mesh=mesh)


def test_too_many_tokens_for_a_device(eight_devices):
    """Offsets alone, of a collection that no test could hold."""
    arrays, _ = random_index(np.random.default_rng(0), num_documents=4, empty=0)
    huge = arrays._replace(offsets=np.array([0, 2**31, 2**32, 2**33, 2**34]))
    with pytest.raises(ValueError, match=r"tokens on 8 devices put .* use more devices"):
        sharded.shard_arrays(huge, mesh_of(eight_devices))


@pytest.mark.parametrize("ndocs", [256, 8])
@pytest.mark.slow
def test_few_programs_for_every_k(eight_devices, ndocs):
    """As of one device, with its results."""
    rng = np.random.default_rng(0)
    arrays, _ = random_index(rng, num_documents=150)
    placed = sharded.shard_arrays(arrays, mesh_of(eight_devices[:2]))
    queries, config = random_queries(rng, arrays, 4, 8), SearchConfig(2, 0.3, ndocs)
    before, found = sharded._plaid._cache_size(), {}
    ks = [1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15, 16, 20, 25, 30]
    for k in ks:
        found[k] = sharded.sharded_plaid_search(placed, queries, k, config, 1024)
    assert sharded._plaid._cache_size() - before <= 3
    single = with_inverse_norms(IndexArrays(*map(jnp.asarray, arrays[:7])))
    for k in ks:
        positions, scores, _ = plaid_search(single, queries, k, config, 1024)
        np.testing.assert_array_equal(found[k][0], positions)
        np.testing.assert_allclose(found[k][1], scores, rtol=1e-5)
