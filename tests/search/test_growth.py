"""Indexes that grow: lists in two parts, and arrays on a device with room."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from plaid_reference import exact_reference, plaid_reference, random_index, random_queries

from colbert_jax.config import SearchConfig
from colbert_jax.index.inverted import recent_lists
from colbert_jax.search import placement
from colbert_jax.search.arrays import DamagedArrayError, join_lists, list_lengths
from colbert_jax.search.backend import CpuBackend, DeviceBackend, ShardedBackend


def first_documents(arrays, count):
    """The index when it had `count` documents: of the centroids, those up to the last in use."""
    tokens = arrays.offsets[count]
    codes = arrays.codes[:tokens]
    used = int(codes.max(initial=-1)) + 1
    own = [arrays.lists[arrays.list_offsets[c] : arrays.list_offsets[c + 1]] for c in range(used)]
    own = [entries[entries < count] for entries in own]
    return arrays._replace(
        codes=codes,
        residuals=arrays.residuals[:tokens],
        offsets=arrays.offsets[: count + 1],
        centroids=arrays.centroids[:used],
        lists=np.concatenate([np.zeros(0, np.int32), *own]),
        list_offsets=np.cumsum([0, *map(len, own)]),
    )


def in_two_parts(arrays, first):
    """The same index, with the lists of its first documents and those of the others."""
    early = first_documents(arrays, first)
    recent, offsets = recent_lists(arrays.codes, arrays.offsets, first, len(arrays.centroids))
    return arrays._replace(
        lists=early.lists,
        list_offsets=early.list_offsets,
        recent_lists=recent,
        recent_list_offsets=offsets,
    )


@settings(max_examples=40, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), count=st.integers(1, 60))
def test_two_parts_are_one(seed, share, count):
    rng = np.random.default_rng(seed)
    arrays, _ = random_index(rng, num_documents=count, num_centroids=30)
    parts = in_two_parts(arrays, round(share * count))
    joined = join_lists(parts)
    assert joined.recent_lists is joined.recent_list_offsets is None
    np.testing.assert_array_equal(joined.lists, arrays.lists)
    np.testing.assert_array_equal(joined.list_offsets, arrays.list_offsets)
    np.testing.assert_array_equal(list_lengths(parts), np.diff(arrays.list_offsets))


@pytest.mark.parametrize("way", ["numba", "xla", pytest.param("mesh", marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [0, 63, 100])
def test_every_backend_searches_both_parts(way, first, eight_devices):
    rng = np.random.default_rng(0)
    arrays, _ = random_index(rng, num_documents=100, num_centroids=30)
    queries = random_queries(rng, arrays, 3, 8)
    if way == "numba":
        pytest.importorskip("numba")
        kind = CpuBackend
    elif way == "xla":
        kind = DeviceBackend
    else:
        mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=eight_devices)
        kind = lambda arrays: ShardedBackend(arrays, mesh)  # noqa: E731
    whole, parts = kind(arrays), kind(in_two_parts(arrays, first))
    for k, config in ((4, SearchConfig(3, 0.4, 32)), (40, SearchConfig(1, 0.4, 8))):
        for allowed in (None, rng.random(100) < 0.7):
            one, two = (backend.plaid(queries, k, config, allowed) for backend in (whole, parts))
            np.testing.assert_array_equal(one.positions, two.positions)
            np.testing.assert_array_equal(one.scores, two.scores)


@pytest.mark.parametrize("code", [-1, 12, 2**31 - 1, -(2**31)])
def test_recent_codes_out_of_range(code):
    arrays, _ = random_index(np.random.default_rng(0))
    codes = arrays.codes.copy()
    codes[-1] = code
    with pytest.raises(DamagedArrayError, match=r"codes: damaged: holds a code outside 0\.\.11"):
        recent_lists(codes, arrays.offsets, 5, 12)
    codes[[0, -1]] = code, 0  # of a document that the lists on disk cover
    recent_lists(codes, arrays.offsets, 5, 12)


@pytest.mark.parametrize("searched_before", [True, False])
def test_a_grown_backend_is_a_new_one(searched_before, monkeypatch):
    """Blocks, room, and centroids are exceeded on the way; former backends stay as they are."""
    monkeypatch.setattr(placement, "_BLOCK", 64)
    monkeypatch.setattr(placement, "_FEWEST_DOCUMENTS", 16)
    monkeypatch.setattr(placement, "_FEWEST_ENTRIES", 64)
    rng = np.random.default_rng(2)
    arrays, _ = random_index(rng, num_documents=120, num_centroids=30, empty=0.3)
    queries = random_queries(rng, arrays, 3, 8)
    config = SearchConfig(2, 0.4, 16)

    def check(backend, count):
        now = first_documents(arrays, count)
        for allowed in (None, np.arange(count) % 3 > 0):
            found = backend.plaid(queries, 3, config, allowed), backend.exact(queries, 3, allowed)
            for row, query in enumerate(queries):
                plaid = plaid_reference(now, query, 3, 2, 0.4, 16, allowed)
                exact = exact_reference(now, query, 3, allowed)
                for hits, (positions, scores) in zip(found, (plaid, exact), strict=True):
                    assert hits.positions[row].tolist() == positions.tolist()
                    np.testing.assert_allclose(hits.scores[row], scores, rtol=1e-5)

    backends = {20: DeviceBackend(first_documents(arrays, 20))}
    for count in (33, 34, 120, 120):
        backend = list(backends.values())[-1]
        if searched_before:
            check(backend, list(backends)[-1])
        backends[count] = backend.grown(first_documents(arrays, count))
    for count in (120, 34):
        check(backends[count], count)
    if searched_before:
        check(backends[20], 20)


def test_damage_in_what_is_new():
    arrays, _ = random_index(np.random.default_rng(0))
    queries = random_queries(np.random.default_rng(1), arrays, 1, 8)
    backend = DeviceBackend(first_documents(arrays, 20))
    backend.exact(queries, 1)
    codes = arrays.codes.copy()
    codes[-1] = 12
    with pytest.raises(DamagedArrayError, match="codes"):
        backend.grown(arrays._replace(codes=codes)).exact(queries, 1)
    lists = arrays.lists.copy()
    lists[3] = 40  # there is room, but no document
    with pytest.raises(
        DamagedArrayError, match=r"lists: damaged: holds a document outside 0\.\.39"
    ):
        backend.grown(arrays._replace(lists=lists)).exact(queries, 1)


def test_adds_compile_nothing():
    """Ten adds of a hundred documents, after the first one."""
    rng = np.random.default_rng(0)
    arrays, _ = random_index(rng, num_documents=6000, num_centroids=64)
    queries = random_queries(rng, arrays, 4, 8)
    backend, compiled = DeviceBackend(first_documents(arrays, 4900)), []

    def add(count):
        grown = backend.grown(first_documents(arrays, count))
        grown.plaid(queries, 5, SearchConfig(2, 0.4, 64))
        grown.plaid(queries, 5, SearchConfig(2, 0.4, 64), np.arange(count) % 2 > 0)
        return grown

    backend.plaid(queries, 5, SearchConfig(2, 0.4, 64))
    backend = add(5000)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        for count in range(5100, 6001, 100):
            backend = add(count)
        assert not compiled
        jax.jit(lambda x: x + 2.5)(1)
        assert compiled  # the listener does listen
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("count", [0, 1, 1000, 2**24, 2**24 + 1, 10**8, 2**31 - 1])
def test_room(count):
    room = placement.room_for(count, 16)
    assert max(count, 16) <= room < 2**31
    assert room <= 2 * count + 16 if count <= 2**24 else room <= 1.125 * count
