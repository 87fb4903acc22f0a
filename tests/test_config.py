import dataclasses

import pytest

from colbert_jax.config import ColBERTConfig, IndexConfig, SearchConfig, TextConfig, written


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, (1, 0.5, 256)),
        (10, (1, 0.5, 256)),
        (11, (2, 0.45, 1024)),
        (100, (2, 0.45, 1024)),
        (101, (4, 0.4, 4096)),
        (1000, (4, 0.4, 4096)),
        (2000, (4, 0.4, 8000)),
    ],
)
def test_fast_are_stanfords_defaults_by_k(k, expected):
    assert dataclasses.astuple(SearchConfig().resolve(k, "fast")) == (*expected, None)


@pytest.mark.parametrize("k", [1, 10, 11, 100, 101, 5000])
def test_learned_candidates_are_at_least_k(k):
    fast, accurate = (
        SearchConfig(candidates="learned").resolve(k, m) for m in ("fast", "accurate")
    )
    assert accurate.candidates == "learned" and 2 * k <= fast.ndocs <= accurate.ndocs


def test_files_say_nothing_of_what_is_not_asked_for():
    """So that earlier versions read them."""
    assert "candidates" not in written(SearchConfig())
    assert "learned_dim" not in written(IndexConfig())
    assert written(IndexConfig(learned_dim=8))["learned_dim"] == 8
    assert written(SearchConfig(candidates="plaid"))["candidates"] == "plaid"


@pytest.mark.parametrize("k", [1, 10, 11, 100, 101, 5000])
def test_accurate_looks_at_more(k):
    fast, accurate = SearchConfig().resolve(k, "fast"), SearchConfig().resolve(k)
    assert accurate.ncells > fast.ncells and accurate.ndocs >= max(fast.ndocs, 4 * k)
    assert accurate.centroid_score_threshold < fast.centroid_score_threshold


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode must be one of"):
        SearchConfig().resolve(10, "best")


def test_search_settings_given_win_even_zero():
    resolved = SearchConfig(ncells=7, centroid_score_threshold=0.0).resolve(10)
    assert dataclasses.astuple(resolved) == (7, 0.0, 1280, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextConfig(query_maxlen=2), "query_maxlen must be at least 4"),
        (lambda: TextConfig(mask_punctuation=1), "mask_punctuation must be bool"),
        (lambda: IndexConfig(nbits=3), "nbits must be one of"),
        (lambda: IndexConfig(nbits=True), "nbits must be int"),
        (lambda: IndexConfig(kmeans_niters=0), "kmeans_niters"),
        (lambda: SearchConfig(ncells=0), "ncells"),
        (lambda: ColBERTConfig(similarity="dot"), "similarity"),
    ],
)
def test_wrong_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
