"""PLAID against the answers of Stanford's own search on the same index."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from colbert_jax.config import SearchConfig
from colbert_jax.search import arrays as arrays_module
from colbert_jax.search import plaid
from colbert_jax.search.arrays import IndexArrays, with_inverse_norms
from colbert_jax.search.plaid import (
    candidates,
    centroid_scores,
    initial_capacity,
    plaid_search,
    probe,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "stanford_plaid.npz")
QUERIES = GOLDEN["queries"]
ROOMY = 4096


def offsets(lengths):
    return jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)


@pytest.fixture(scope="module")
def arrays():
    arrays = IndexArrays(
        jnp.asarray(GOLDEN["centroids"]),
        jnp.asarray(GOLDEN["bucket_weights"]),
        jnp.asarray(GOLDEN["codes"]),
        jnp.asarray(GOLDEN["residuals"]),
        offsets(GOLDEN["doclens"]),
        jnp.asarray(GOLDEN["ivf"]),
        offsets(GOLDEN["ivf_lengths"]),
    )
    return with_inverse_norms(arrays)


def settings(s: int) -> SearchConfig:
    ncells, threshold, ndocs = GOLDEN["settings"][s]
    return SearchConfig(int(ncells), float(threshold), int(ndocs))


def search(arrays, queries, s, capacity=ROOMY, **changes):
    config = dataclasses.replace(settings(s), **changes)
    return plaid_search(arrays, queries, config.ndocs // 4, config, capacity)


@pytest.mark.parametrize(("s", "capacity"), [(0, ROOMY), (1, ROOMY), (2, 64), (3, ROOMY)])
def test_equals_stanford(arrays, s, capacity):
    ids, scores, enough = search(arrays, QUERIES, s, capacity)
    assert enough == ROOMY or (64 < enough < ROOMY and enough.bit_count() == 1)
    for row, count in enumerate(GOLDEN[f"s{s}_counts"]):
        assert ids[row, :count].tolist() == GOLDEN[f"s{s}_pids"][row, :count].tolist()
        expected = GOLDEN[f"s{s}_scores"][row, :count]
        np.testing.assert_allclose(scores[row, :count], expected, rtol=1e-5)
        assert (ids[row, count:] == 400).all() and np.isneginf(scores[row, count:]).all()


@pytest.mark.parametrize("s", range(4))
def test_candidates_equal_stanford(arrays, s):
    scores = centroid_scores(arrays.centroids, QUERIES)
    cells = probe(scores, jnp.asarray(QUERIES), settings(s).ncells)
    ids, entries = candidates(arrays, cells, ROOMY)
    np.testing.assert_array_equal((ids < 400).sum(axis=1), GOLDEN[f"s{s}_candidates"])
    assert (entries >= GOLDEN[f"s{s}_candidates"]).all()


def test_padding_rows_and_queries_change_nothing(arrays):
    plain = search(arrays, QUERIES, 1)
    padded = np.pad(QUERIES, [(0, 2), (0, 5), (0, 0)])
    wide = search(arrays, padded, 1)
    np.testing.assert_array_equal(plain[0], wide[0][:6])
    np.testing.assert_allclose(plain[1], wide[1][:6], rtol=1e-6)
    assert (wide[0][6:] == 400).all()  # a query without a token finds nothing


def test_a_threshold_that_prunes_everything_still_answers(arrays):
    """No more candidates than `ndocs`, so that pruning decides nothing."""
    ids, scores, _ = search(arrays, QUERIES, 0, centroid_score_threshold=2.0)
    unpruned, _, _ = search(arrays, QUERIES, 0, centroid_score_threshold=-2.0)
    np.testing.assert_array_equal(ids, unpruned)
    assert np.isfinite(scores[:, :4]).all()


def test_queries_taken_in_turn_change_nothing(arrays, monkeypatch):
    whole = search(arrays, QUERIES, 1)
    monkeypatch.setattr(plaid, "_CPU", plaid.Memory(batch=1 << 18, block=1 << 9))
    parts = search(arrays, QUERIES, 1)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-6)


def test_nothing_is_compiled_twice(arrays):
    """Other batch sizes up to the same power of two, other lengths, other thresholds."""
    search(arrays, QUERIES, 1)
    traced = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: traced.append(event) if "trace" in event else None
    )
    try:
        for batch, rows, threshold in [(6, 8, 0.3), (5, 7, 0.45), (6, 3, 0.5)]:
            queries = QUERIES[:batch, :rows]
            search(arrays, queries, 1, centroid_score_threshold=threshold)
        assert not traced
        jax.jit(lambda x: x + 1)(1)
        assert traced  # the listener does listen
    finally:
        jax.monitoring.clear_event_listeners()


def test_missing_norms(arrays):
    with pytest.raises(ValueError, match="call with_inverse_norms"):
        search(arrays._replace(inverse_norms=None), QUERIES, 1)


def test_initial_capacity_is_bounded_by_the_lists():
    lengths = np.array([5, 0, 3, 9])
    assert initial_capacity(lengths, 100, 4) == 64  # the least there is
    large = np.full(1000, 50)
    assert initial_capacity(large, 32, 2) == 4096  # 64 probes x 50, not doubled
    assert initial_capacity(large, 2000, 9) == 65536  # all 50,000 entries


FIFTEEN = [1, 2, 3, 5, 7, 10, 11, 15, 20, 33, 50, 64, 100, 200, 400]


def one_program_each(arrays, queries, k, config):
    """The search of a program that is compiled for this k alone."""
    static = (config.ncells, config.ndocs, k, ROOMY, plaid.memory_of(arrays.codes))
    queries = np.pad(queries, [(0, 8 - len(queries)), (0, -queries.shape[1] % 8), (0, 0)])
    threshold = np.float32(config.centroid_score_threshold)
    result = plaid._search_batch(arrays, queries, threshold, *static)
    return result.positions, result.scores


@pytest.mark.parametrize("ndocs", [None, 8, 50])
@pytest.mark.slow
def test_few_programs_for_every_k(arrays, ndocs):
    """Whether k or ndocs decides how many candidates are kept. Results are those of a program of
    its own: to the bit where k does not change shapes, else products of another shape may round
    differently."""
    before, found = plaid._search_batch._cache_size(), {}
    config = SearchConfig(2, 0.45, ndocs or 1024)
    for k in FIFTEEN:
        found[k] = plaid_search(arrays, QUERIES, k, config, ROOMY)[:2]
    assert plaid._search_batch._cache_size() - before <= 5
    for k in FIFTEEN[::3]:
        alone = one_program_each(arrays, QUERIES, k, config)
        positions, scores = (part[: len(QUERIES)] for part in alone)
        np.testing.assert_array_equal(found[k][0], positions)
        np.testing.assert_allclose(found[k][1], scores, rtol=1e-6 if ndocs else 0)


@pytest.mark.parametrize("mode", ["accurate", "fast"])
@pytest.mark.slow
def test_few_programs_for_every_k_at_the_defaults(arrays, mode):
    """Three rows of settings, two sizes of results; exact search has these alone."""
    before = plaid._search_batch._cache_size()
    for k in FIFTEEN:
        plaid_search(arrays, QUERIES, k, SearchConfig().resolve(k, mode), ROOMY)
    assert plaid._search_batch._cache_size() - before <= 4
    sizes = {arrays_module.result_size(k) for k in range(1, 1025)}
    assert sizes == {128, 1024} and arrays_module.result_size(1025) == 2048
