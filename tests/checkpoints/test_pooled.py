"""Checkpoints that pool tokens: read, written, encoded, indexed."""

import json
import shutil

import jax
import numpy as np
import pytest
from support import passages, write_stanford

from colbert_jax import ColBERT, Index
from colbert_jax.checkpoints import convert_checkpoint, read_checkpoint, write_checkpoint
from colbert_jax.compression.pooling import pool_tokens

MODULE = "sentence_transformers.multi_vector_encoder.modules.token_pooling.HierarchicalTokenPooling"


@pytest.fixture(scope="module")
def st_folder(stanford_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pooled") / "st"
    convert_checkpoint(stanford_folder, folder, "sentence-transformers")
    return folder


@pytest.fixture
def with_module(st_folder, tmp_path):
    """The folder with a pooling module of these settings, at the end or at a place."""

    def make(place=None, **settings):
        folder = shutil.copytree(st_folder, tmp_path / "copy")
        modules = json.loads((folder / "modules.json").read_text())
        (folder / "9_Pooling").mkdir()
        (folder / "9_Pooling" / "config.json").write_text(json.dumps(settings))
        entry = {"idx": 9, "name": "9", "path": "9_Pooling", "type": MODULE}
        modules.insert(len(modules) if place is None else place, entry)
        (folder / "modules.json").write_text(json.dumps(modules))
        return folder

    return make


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pool_factor": 2.0}, (2.0, 1, False)),  # saved by a release that did not normalise
        ({"pool_factor": 1.5, "num_protected_tokens": 0, "tasks": ["document"]}, (1.5, 0, False)),
        ({"pool_factor": 3, "normalize_embeddings": True}, (3, 1, True)),
        ({"pool_factor": 1.0}, (1.0, 1, True)),
    ],
)
def test_module_of_sentence_transformers(with_module, tmp_path, settings, expected):
    checkpoint = read_checkpoint(with_module(**settings))
    text = checkpoint.config.text
    assert (text.pool_factor, text.pool_protected, text.pool_normalize) == expected
    for layout in ("sentence-transformers", "native"):
        write_checkpoint(checkpoint, tmp_path / layout, layout)
        assert read_checkpoint(tmp_path / layout).config.text == text
    if text.pool_factor > 1:
        with pytest.raises(ValueError, match=rf"cannot store pool_factor={text.pool_factor}"):
            write_checkpoint(checkpoint, tmp_path / "no", "pylate")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool_factor": 0.5}, r"9_Pooling/config\.json: pool_factor must be at least 1"),
        ({"pool_factor": "2"}, r"9_Pooling/config\.json: pool_factor must be"),
        (
            {"pool_factor": 2, "tasks": ["query"]},
            r"config\.json: tasks \['query'\] is not supported",
        ),
        ({"pool_factor": 2, "place": 1}, "expected one HierarchicalTokenPooling, after Normalize"),
    ],
)
def test_modules_that_are_refused(with_module, settings, message):
    with pytest.raises(ValueError, match=message):
        read_checkpoint(with_module(**settings))


def test_settings_of_stanford(stanford_folder, tmp_path):
    """Its names in artifact.metadata; its pooled embeddings keep their length."""
    folder = shutil.copytree(stanford_folder, tmp_path / "copy")
    file = folder / "artifact.metadata"
    plain = json.loads(file.read_text())
    asked = {"pool_factor": 2, "protected_tokens": 3, "clustering_mode": "hierarchical"}
    file.write_text(json.dumps(plain | asked))
    checkpoint = read_checkpoint(folder)
    text = checkpoint.config.text
    assert (text.pool_factor, text.pool_protected, text.pool_normalize) == (2, 3, False)
    for layout in ("stanford", "native"):
        write_checkpoint(checkpoint, tmp_path / layout, layout)
        assert read_checkpoint(tmp_path / layout).config.text == text
    written = json.loads((tmp_path / "stanford" / file.name).read_text())
    assert (written["pool_factor"], written["protected_tokens"]) == (2, 3)
    for changes in ({"pool_normalize": True}, {"pool_factor": 1.5}):
        with pytest.raises(ValueError, match=r"the stanford layout cannot store pool_factor="):
            write_checkpoint(checkpoint.with_text(**changes), tmp_path / "no", "stanford")
    with pytest.raises(ValueError, match=r"the colbertv1 layout cannot store .*pool_factor=2"):
        write_checkpoint(checkpoint, tmp_path / "no", "colbertv1")
    file.write_text(json.dumps(plain | {"pool_factor": 1, "protected_tokens": 3}))
    assert read_checkpoint(folder).config.text == read_checkpoint(stanford_folder).config.text
    for odd, message in (
        ({"pool_factor": 0}, "pool_factor must be at least 1"),
        ({"pool_factor": 2.5}, "pool_factor must be int, got 2.5"),
        ({"clustering_mode": "kmeans"}, "clustering_mode 'kmeans' is not supported"),
    ):
        file.write_text(json.dumps(plain | odd))
        with pytest.raises(ValueError, match=rf"artifact\.metadata: {message}"):
            read_checkpoint(folder)


def test_encoded_and_indexed(stanford_folder, model, tmp_path):
    texts, one = passages(40), jax.devices()[:1]
    pooled = ColBERT.from_pretrained(stanford_folder, pool_factor=2, devices=one)
    full, half = model.encode_documents(texts), pooled.encode_documents(texts)
    np.testing.assert_array_equal(half.values, pool_tokens(full, 2).values)
    np.testing.assert_array_equal(half.lengths, 1 + np.maximum((full.lengths - 1) // 2, 1))
    by_call = model.encode_documents(texts, pool_factor=2)
    np.testing.assert_array_equal(by_call.values, half.values)
    np.testing.assert_array_equal(pooled.encode_documents(texts, pool_factor=1).values, full.values)
    assert pooled.fingerprint() != model.fingerprint()
    index = Index.build(tmp_path / "pooled.index", pooled, texts, progress=False)
    assert index.metadata.num_tokens == half.lengths.sum()
    hits = index.search(pooled.encode_queries(texts[:3]), 1)
    np.testing.assert_array_equal(hits.positions[:, 0], [0, 1, 2])
    shown = pooled.explain(texts[0], texts[0])
    assert shown.similarity.shape[1] == full.lengths[0]  # words, not their means


def test_bad_factor(model):
    with pytest.raises(ValueError, match="pool_factor must be at least 1"):
        model.encode_documents(["a"], pool_factor=0)
    with pytest.raises(ValueError, match="pool_factor must be at least 1"):
        model._checkpoint.with_text(pool_factor=0.5)


def test_fingerprints_of_other_models_stay(tmp_path):
    """An index built before there was pooling still knows its model."""
    folder = write_stanford(tmp_path / "stanford", {"num_hidden_layers": 1})
    assert ColBERT.from_pretrained(folder).fingerprint() == "20af30867fc91b42"
