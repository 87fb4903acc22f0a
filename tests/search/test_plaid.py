"""PLAID against the answers of Stanford's own search on the same index."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from colbert_jax.config import SearchConfig
from colbert_jax.search.arrays import IndexArrays
from colbert_jax.search.plaid import (
    Capacity,
    candidates,
    centroid_scores,
    initial_capacity,
    plaid_search,
    probe,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "stanford_plaid.npz")
QUERIES = GOLDEN["queries"]
ROOMY = Capacity(4096, 32)


def offsets(lengths):
    return jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)


@pytest.fixture(scope="module")
def arrays():
    return IndexArrays(
        jnp.asarray(GOLDEN["centroids"]),
        jnp.asarray(GOLDEN["bucket_weights"]),
        jnp.asarray(GOLDEN["codes"]),
        jnp.asarray(GOLDEN["residuals"]),
        offsets(GOLDEN["doclens"]),
        jnp.asarray(GOLDEN["ivf"]),
        offsets(GOLDEN["ivf_lengths"]),
    )


def settings(s: int) -> SearchConfig:
    ncells, threshold, ndocs = GOLDEN["settings"][s]
    return SearchConfig(int(ncells), float(threshold), int(ndocs))


@pytest.mark.parametrize("s", range(4))
@pytest.mark.parametrize("capacity", [ROOMY, Capacity(64, 24)], ids=["roomy", "widened"])
def test_equals_stanford(arrays, s, capacity):
    config = settings(s)
    k = config.ndocs // 4
    ids, scores, enough = plaid_search(arrays, jnp.asarray(QUERIES), k, config, capacity)
    assert enough.entries >= capacity.entries
    for row, count in enumerate(GOLDEN[f"s{s}_counts"]):
        assert ids[row, :count].tolist() == GOLDEN[f"s{s}_pids"][row, :count].tolist()
        expected = GOLDEN[f"s{s}_scores"][row, :count]
        np.testing.assert_allclose(scores[row, :count], expected, rtol=1e-5)
        assert (ids[row, count:] == 400).all() and np.isneginf(scores[row, count:]).all()


@pytest.mark.parametrize("s", range(4))
def test_candidates_equal_stanford(arrays, s):
    for query, expected in zip(QUERIES, GOLDEN[f"s{s}_candidates"], strict=True):
        scores = centroid_scores(arrays.centroids, query)
        cells = probe(scores, jnp.asarray(query), settings(s).ncells)
        ids, entries = candidates(arrays, cells, 4096)
        assert int((ids < 400).sum()) == expected <= int(entries)
        assert (np.diff(np.asarray(ids)) >= 0).all()


def test_padding_rows_and_queries_change_nothing(arrays):
    plain = plaid_search(arrays, jnp.asarray(QUERIES), 10, settings(1), ROOMY)
    padded = np.pad(QUERIES, [(0, 2), (0, 5), (0, 0)])
    wide = plaid_search(arrays, jnp.asarray(padded), 10, settings(1), ROOMY)
    np.testing.assert_array_equal(plain[0], wide[0][:6])
    np.testing.assert_allclose(plain[1], wide[1][:6], rtol=1e-6)
    assert (wide[0][6:] == 400).all()  # a query without a token finds nothing


def test_a_threshold_that_prunes_everything_still_answers(arrays):
    config = SearchConfig(1, 2.0, 256)
    ids, scores, _ = plaid_search(arrays, jnp.asarray(QUERIES[:1]), 5, config, ROOMY)
    unpruned, _, _ = plaid_search(
        arrays, jnp.asarray(QUERIES[:1]), 5, SearchConfig(1, -2.0, 256), ROOMY
    )
    np.testing.assert_array_equal(ids, unpruned)
    assert np.isfinite(scores).all()


def test_initial_capacity_is_bounded_by_the_lists():
    lengths = np.array([5, 0, 3, 9])
    assert initial_capacity(lengths, 32, 100, 4).entries == 64  # the least there is
    large = np.full(1000, 50)
    assert initial_capacity(large, 32, 32, 2).entries == 4096  # 64 probes x 50, not doubled
    assert initial_capacity(large, 32, 2000, 9).entries == 65536  # all 50,000 entries
