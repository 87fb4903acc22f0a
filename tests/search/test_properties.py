"""Every form of PLAID and of exact search is its numpy definition, on random indexes.

Lengths are fixed, and the inverted lists padded, so that the examples of a test share a program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from plaid_reference import (
    NearTie,
    exact_reference,
    plaid_reference,
    random_index,
    random_queries,
)

from colbert_jax.config import SearchConfig
from colbert_jax.search import exact_search, plaid_search, sharded
from colbert_jax.search.arrays import Hits, IndexArrays, with_inverse_norms
from colbert_jax.search.plaid import score_few

pytestmark = pytest.mark.slow

# Empty documents, documents of one token, one far longer than a tile, ties of length.
LENGTHS = np.array([3, 0, 1, 12, 5, 1, 7, 0, 33, 2, 600, 4, 9, 12, 1, 32, 3, 5, 5, 0, 8, 2, 12, 3])
ENTRIES = 256  # more than the inverted lists of such an index have, and than a query probes
NCELLS, NDOCS, BATCH, ROWS = 2, 12, 4, 8
SMALL = settings(derandomize=True, database=None, deadline=None, max_examples=5)
DRAWN = dict(seed=st.integers(0, 2**32 - 1), threshold=st.sampled_from([-2.0, 0.3, 0.5, 2.0]))
SHARE = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


@pytest.fixture(scope="module", autouse=True)
def shards_of_one_size():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "_count_entries", lambda lists, bounds: np.array([ENTRIES]))
        yield


def make(seed, **kwargs):
    rng = np.random.default_rng(seed)
    arrays, _ = random_index(rng, lengths=LENGTHS, **kwargs)
    padding = ENTRIES - len(arrays.lists)
    arrays = arrays._replace(lists=np.pad(arrays.lists, (0, padding)))
    return arrays, random_queries(rng, arrays, BATCH, ROWS)


def on_device(arrays):
    return with_inverse_norms(IndexArrays(*map(jnp.asarray, arrays[:7])))


def on_mesh(arrays, devices):
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    return sharded.shard_arrays(arrays, mesh)


def check_plaid(arrays, queries, k, threshold, search, allowed=None):
    config = SearchConfig(NCELLS, threshold, NDOCS)
    ids, scores, _ = search(queries, k, config, ENTRIES, *(() if allowed is None else (allowed,)))
    for row, query in enumerate(queries):
        try:
            wanted = plaid_reference(arrays, query, k, NCELLS, threshold, NDOCS, allowed)
        except NearTie:
            reject()
        check_row(ids[row], scores[row], *wanted)


def check_exact(arrays, queries, k, hits, allowed=None):
    for row, query in enumerate(queries):
        try:
            wanted = exact_reference(arrays, query, k, allowed)
        except NearTie:
            reject()
        check_row(hits.positions[row], hits.scores[row], *wanted)


def check_row(ids, scores, wanted_ids, wanted_scores):
    found = len(wanted_ids)
    assert ids[:found].tolist() == wanted_ids.tolist()
    np.testing.assert_allclose(scores[:found], wanted_scores, rtol=1e-5)
    assert (ids[found:] == len(LENGTHS)).all() and np.isneginf(scores[found:]).all()


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
@SMALL
@given(**DRAWN)
def test_a_batch_is_the_definition(nbits, seed, threshold):
    arrays, queries = make(seed, nbits=nbits)
    placed = on_device(arrays)
    check_plaid(arrays, queries, 5, threshold, lambda *a: plaid_search(placed, *a))


@pytest.mark.parametrize(("nbits", "devices"), [(2, 2), (1, 8), (2, 8), (4, 8), (8, 8)])
@SMALL
@given(**DRAWN)
def test_shards_are_the_definition(eight_devices_here, nbits, devices, seed, threshold):
    arrays, queries = make(seed, nbits=nbits)
    placed = on_mesh(arrays, devices)
    check_plaid(arrays, queries, 5, threshold, lambda *a: sharded.sharded_plaid_search(placed, *a))


@SMALL
@given(**DRAWN)
def test_one_centroid_and_k_of_all_documents(eight_devices_here, seed, threshold):
    """One inverted list holds every document with a token: PLAID is exact search."""
    arrays, queries = make(seed, num_centroids=1)
    k = int((LENGTHS > 0).sum())
    placed, search = on_mesh(arrays, 8), sharded.sharded_plaid_search
    check_plaid(arrays, queries, k, threshold, lambda *a: search(placed, *a))
    ids, _, _ = search(placed, queries, k, SearchConfig(NCELLS, threshold, NDOCS), ENTRIES)
    for row, query in enumerate(queries):
        assert ids[row].tolist() == exact_reference(arrays, query, k)[0].tolist()


@pytest.mark.parametrize("devices", [1, 8])
@SMALL
@given(seed=st.integers(0, 2**32 - 1))
def test_exact_search_is_the_definition(eight_devices_here, devices, seed):
    arrays, queries = make(seed)
    if devices == 1:
        hits = exact_search(on_device(arrays), LENGTHS, queries, 9)
    else:
        hits = sharded.sharded_exact_search(on_mesh(arrays, devices), LENGTHS, queries, 9)
    check_exact(arrays, queries, 9, hits)


@pytest.mark.parametrize("devices", [1, 8])
@SMALL
@given(share=SHARE, **DRAWN)
def test_allowed_documents_are_the_candidates(eight_devices_here, devices, seed, threshold, share):
    arrays, queries = make(seed)
    allowed = np.random.default_rng(seed).random(len(LENGTHS)) < share
    if devices == 1:
        search, placed = plaid_search, on_device(arrays)
    else:
        search, placed = sharded.sharded_plaid_search, on_mesh(arrays, devices)
    check_plaid(arrays, queries, 5, threshold, lambda *a: search(placed, *a), allowed)


@pytest.mark.parametrize("devices", [1, 8])
@SMALL
@given(seed=st.integers(0, 2**32 - 1), share=SHARE)
def test_allowed_documents_are_scored(eight_devices_here, devices, seed, share):
    """All of them, by exact search and by the program for a few."""
    arrays, queries = make(seed)
    allowed = np.random.default_rng(seed).random(len(LENGTHS)) < share
    k = min(int((allowed & (LENGTHS > 0)).sum()), 9)
    given = np.flatnonzero(allowed & (LENGTHS > 0)).astype(np.int32)
    config = SearchConfig(NCELLS, 0.0, 4 * len(LENGTHS))
    if devices == 1:
        placed = on_device(arrays)
        hits = exact_search(placed, LENGTHS, queries, k, allowed)
        few = score_few(placed, queries, k, config, given)
    else:
        placed = on_mesh(arrays, devices)
        hits = sharded.sharded_exact_search(placed, LENGTHS, queries, k, allowed)
        few = sharded.sharded_score_few(placed, queries, k, config, given)
    check_exact(arrays, queries, k, hits, allowed)
    check_exact(arrays, queries, k, Hits(*few), allowed)


@pytest.fixture(scope="module")
def eight_devices_here():
    if len(jax.devices()) < 8:
        pytest.skip(f"needs 8 devices, {len(jax.devices())} are here")


def test_the_reference_sees_near_ties():
    """The definition must refuse what rounding decides, and only that."""
    arrays, queries = make(0)
    plaid_reference(arrays, queries[0], 5, NCELLS, 0.5, NDOCS)
    strongest = (arrays.centroids @ queries[0].T).max(axis=1)
    with pytest.raises(NearTie):
        plaid_reference(arrays, queries[0], 5, NCELLS, float(strongest[0]), NDOCS)
