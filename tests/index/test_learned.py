"""Learned vectors in an index: built, resumed, changed, checked, asked for where there are none."""

import json
import os

import numpy as np
import pytest
from campaigns.living_index import Killed
from support import unit_rows

from colbert_jax import Index
from colbert_jax.compression import learned
from colbert_jax.compression.codec import decompress_on_host
from colbert_jax.config import SearchConfig
from colbert_jax.index import format as fmt
from colbert_jax.index import sources
from colbert_jax.index.layouts.convert import convert_index

DIM, WIDTH = 16, 24


def ready(seed, n, prefix="d"):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, n)
    ids = [f"{prefix}{i}" for i in range(n)]
    return dict(embeddings=unit_rows(rng, lengths.sum(), DIM), lengths=lengths, ids=ids)


def build(path, **others):
    settings = dict(nbits=4, num_centroids=16, learned_dim=WIDTH, progress=False) | others
    return Index.build(path, **ready(0, 60), **settings)


@pytest.fixture
def index(tmp_path):
    return build(tmp_path / "i")


def queries(n=4):
    return unit_rows(np.random.default_rng(5), n * 4, DIM).reshape(n, 4, DIM)


def predictor(index):
    return learned.Predictor(*(index._files[name] for name in fmt.PREDICTOR))


def check_vectors(index):
    """They are what the index's own predictor makes of its compressed tokens."""
    files = index._files
    values = decompress_on_host(index.codec, files["codes"], files["residuals"])
    vectors, scales = learned.document_vectors(predictor(index), values, index.lengths)
    np.testing.assert_allclose(files["learned_scales"], scales, rtol=1e-3)
    assert np.abs(vectors.astype(int) - files["learned_vectors"]).max() <= 1
    index.verify()


def check_search(index):
    """Where every document is a candidate, results are those of exact search."""
    found = index.search(queries(), 8, candidates="learned")
    exact = index.search(queries(), 8, mode="exact")
    np.testing.assert_array_equal(found.positions, exact.positions)
    np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-5)


def test_build_and_search(index):
    assert index.metadata.learned == {
        "landmarks": len(index._files["learned_landmarks"]),
        "tokens": len(index._files["learned_tokens"]),
        "width": WIDTH,
    }
    check_vectors(index)
    check_search(index)
    few = index.search(queries(), 3, candidates="learned", ndocs=8, ids=[f"d{i}" for i in range(9)])
    assert few.positions.shape == (4, 3) and few.positions.max() < 9


def test_changes_keep_them(index):
    """Added, replaced, deleted and compacted, as if all were solved anew with the same solver."""
    known = predictor(index)
    index = index.add(**ready(1, 12, "e"))
    check_vectors(index)
    index = index.upsert(**ready(2, 5))
    index = index.delete(["d7", "e3"])
    check_vectors(index)
    check_search(index)
    before = index.search(queries(), 6, candidates="learned", ndocs=16)
    ids = [[index.ids[p] for p in row] for row in before.positions]
    index = index.compact()
    check_vectors(index)
    after = index.search(queries(), 6, candidates="learned", ndocs=16)
    assert [[index.ids[p] for p in row] for row in after.positions] == ids
    for own, other in zip(predictor(index), known, strict=True):
        np.testing.assert_array_equal(own, other)


def test_an_index_that_begins_empty(tmp_path, model):
    index = Index.build(tmp_path / "i", model, [], learned_dim=WIDTH)
    assert index.metadata.learned is None
    index = index.add(model, ["a river", "a wing of a bird", "heat"])
    assert index.metadata.learned is not None
    hits = index.search(model.encode_queries(["wing"]), 3, candidates="learned")
    assert sorted(hits.positions[0].tolist()) == [0, 1, 2]


def test_the_same_after_a_kill(tmp_path, monkeypatch):
    """Killed after each of some syncs, and gone on with."""
    monkeypatch.setattr(sources, "CHUNK_TOKENS", 64)
    whole, sync = build(tmp_path / "whole"), os.fsync
    for step in (7, 14, 19, 23, 28):
        left = [step]

        def dying(descriptor, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            sync(descriptor)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "fsync", dying)
            build(tmp_path / f"i{step}")
        resumed = build(tmp_path / f"i{step}")
        for name in (*fmt.LEARNED, *fmt.PREDICTOR):
            np.testing.assert_array_equal(resumed._files[name], whole._files[name])


@pytest.mark.parametrize("name", ["learned_vectors", "learned_scales", "learned_solver"])
def test_damage_is_named(index, name):
    file = index.path / f"{name}.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 0x20
    file.write_bytes(damaged)
    with pytest.raises(fmt.IndexFormatError, match=rf"{name}\.npy: damaged: its checksum differs"):
        index.verify()
    if name == "learned_solver":  # new documents would be made with it
        with pytest.raises(fmt.IndexFormatError, match=name):
            index.add(**ready(1, 2, "e"))
    file.unlink()
    with pytest.raises(fmt.IndexFormatError, match=rf"{name}\.npy: missing; the index is incompl"):
        Index.open(index.path)


def test_values_out_of_range_are_named(index):
    file = index.path / "learned_scales.npy"
    array = np.load(file)
    array[3] = np.inf
    np.save(file, array)
    with pytest.raises(
        fmt.IndexFormatError, match=r"learned_scales\.npy: damaged: holds NaN or inf"
    ):
        Index.open(index.path).search(queries(), 3, candidates="learned")


def test_sizes_are_checked(index):
    file = index.path / "metadata.json"
    fields = json.loads(file.read_text())
    fields["learned"]["width"] = 0
    file.write_text(json.dumps(fields))
    with pytest.raises(fmt.IndexFormatError, match="field 'learned' is missing or damaged"):
        Index.open(index.path)


def test_an_index_without(tmp_path, index):
    plain = build(tmp_path / "plain", learned_dim=None)
    assert not any(file.name.startswith("learned") for file in plain.path.iterdir())
    assert "learned" not in plain.metadata.to_json()
    with pytest.raises(ValueError, match=r"plain: has no learned vectors .* learned_dim=512"):
        plain.search(queries(), candidates="learned")
    own = index.search(queries(), 5, candidates="plaid")
    other = plain.search(queries(), 5)
    np.testing.assert_array_equal(own.positions, other.positions)


def test_settings_that_mean_nothing(index):
    with pytest.raises(ValueError, match="candidates='learned' probes no centroids: ncells means"):
        index.search(queries(), candidates="learned", ncells=4)
    with pytest.raises(ValueError, match="candidates must be one of"):
        index.search(queries(), candidates="best")
    with pytest.raises(ValueError, match="scores every document: candidates means nothing"):
        index.search(queries(), mode="exact", candidates="learned")
    with pytest.raises(ValueError, match="learned_dim must be from 1 to 1024, got 4096"):
        build(index.path, learned_dim=4096, overwrite=True)
    assert SearchConfig(candidates="learned").resolve(10).ndocs < SearchConfig().resolve(10).ndocs


def test_conversion_leaves_them_out(index, tmp_path):
    convert_index(index.path, tmp_path / "s", "stanford")
    assert not list((tmp_path / "s").glob("learned*"))
    convert_index(tmp_path / "s", tmp_path / "back", "native")
    assert Index.open(tmp_path / "back").metadata.learned is None
