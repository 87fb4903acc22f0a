"""Builds over 1, 2 and 8 devices of one process."""

import itertools

import jax
import numpy as np
import pytest
from support import unit_rows

from colbert_jax.compression.sharding import data_mesh
from colbert_jax.config import IndexConfig
from colbert_jax.index import format as fmt
from colbert_jax.index import sources
from colbert_jax.index.build import build_index
from colbert_jax.processes import Group


def build(path, source, devices, **settings):
    build_index(path, lambda: source, IndexConfig(**settings), mesh=data_mesh(devices))
    return fmt.open_arrays(path)[2]


def test_same_index(tmp_path, eight_devices, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_TOKENS", 512)
    monkeypatch.setattr("colbert_jax.compression.kmeans._BLOCK", 64)
    monkeypatch.setattr("colbert_jax.compression.codec._BLOCK", 32)
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 15, 300)
    values = unit_rows(rng, lengths.sum(), 16)
    source = sources.EmbeddingSource(values, lengths)
    one, *others = (build(tmp_path / str(n), source, eight_devices[:n]) for n in (1, 2, 8))
    scores = values.astype(np.float16).astype(np.float32) @ one["centroids"].T
    best, second = np.sort(scores, axis=1)[:, :-3:-1].T
    clear = best - second > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(one["codes"][clear], scores.argmax(axis=1)[clear])
    for other in others:
        # Centroids are rounded to float16 in the index: 2^-11 of values below 1.
        np.testing.assert_allclose(other["centroids"], one["centroids"], atol=1e-3)
        np.testing.assert_array_equal(other["codes"][clear], one["codes"][clear])
        np.testing.assert_array_equal(other["offsets"], one["offsets"])
        owners = np.repeat(np.arange(300), lengths)
        pairs = np.unique(other["codes"].astype(np.int64) * 300 + owners)
        np.testing.assert_array_equal(other["lists"], pairs % 300)


def test_a_mesh_of_another_kind(tmp_path, eight_devices):
    square = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    source = sources.EmbeddingSource(np.eye(4, 8, dtype=np.float32), [2, 2])
    with pytest.raises(ValueError, match="a mesh of one axis"):
        build_index(tmp_path / "i", lambda: source, IndexConfig(), mesh=square)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shares_are_equal_in_tokens_and_cover_all_documents(count):
    rng = np.random.default_rng(count)
    lengths = rng.integers(0, 9, 30)
    lengths[[0, -1]] = 0
    lengths[4] = 60
    source = sources.EmbeddingSource(unit_rows(rng, lengths.sum(), 8), lengths)
    shares = [source.share(Group(i, count)) for i in range(count)]
    assert [shares[0][0], shares[-1][1]] == [0, 30]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(shares))
    tokens = np.array([lengths[start:stop].sum() for start, stop in shares])
    assert (np.abs(tokens - lengths.sum() / count) <= lengths.max()).all()
