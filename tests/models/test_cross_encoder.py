"""The cross-encoder's arithmetic and its reader; tests/parity compares it with transformers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from safetensors.numpy import load_file, save_file

from colbert_jax.checkpoints import cross_encoder
from colbert_jax.models.colbert import make_encoder
from colbert_jax.models.cross_encoder import pair_scores
from colbert_jax.tensors.torch_file import write_torch_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return support.write_cross_encoder(tmp_path_factory.mktemp("cross"), dict(num_hidden_layers=1))


@pytest.fixture(scope="module")
def checkpoint(folder):
    return cross_encoder.read(folder)


@pytest.fixture(scope="module")
def scores(checkpoint):
    run = jax.jit(functools.partial(pair_scores, checkpoint.encoder))
    return lambda *batch: np.asarray(run(checkpoint.params, *batch))


@pytest.fixture
def copy(folder, tmp_path):
    """The folder again, with other fields in its config.json and other tensors."""

    def change(fields=None, tensors=None, drop=()):
        file = tmp_path / "config.json"
        config = json.loads((folder / "config.json").read_text()) | (fields or {})
        file.write_text(json.dumps(config))
        held = load_file(folder / "model.safetensors") | (tensors or {})
        save_file({k: v for k, v in held.items() if k not in drop}, tmp_path / "model.safetensors")
        for name in ("vocab.txt", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        return tmp_path

    return change


def test_head_is_pooler_and_classifier(checkpoint, scores):
    """The score is w . tanh(P h + b) + c of the first hidden state."""
    ids = np.array([[4, 9, 5, 30, 31, 5], [4, 40, 41, 5, 17, 5]], np.int32)
    types = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]], np.int32)
    tensors = load_file(checkpoint.folder / "model.safetensors")
    backbone = make_encoder(checkpoint.encoder, checkpoint.params).backbone
    run = jax.jit(lambda ids, types: backbone(ids, jnp.ones(ids.shape, bool), types=types)[:, 0])
    pooled = run(ids, types) @ tensors["bert.pooler.dense.weight"].T
    pooled = np.tanh(pooled + tensors["bert.pooler.dense.bias"])
    logits = pooled @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    np.testing.assert_allclose(scores(ids, np.full(2, 6, np.int32), types), logits[:, 0], atol=1e-5)


def test_padding_changes_nothing_and_token_types_do(scores):
    rng = np.random.default_rng(0)
    ids = rng.integers(7, 60, (3, 12)).astype(np.int32)
    types = (np.arange(12) > 4).astype(np.int32) * np.ones((3, 1), np.int32)
    attended = np.array([12, 9, 7], np.int32)
    whole = scores(ids, attended, types)
    assert (np.abs(scores(ids, attended, 1 - types) - whole) > 1e-3).all()
    ids[1, 9:], types[2, 7:] = 0, 0  # behind the end nothing counts, ids or types
    wide = [np.pad(x, [(0, 0), (0, 5)], constant_values=1) for x in (ids, types)]
    np.testing.assert_allclose(scores(wide[0], attended, wide[1]), whole, atol=1e-6)


def test_torch_files_are_read_too(folder, checkpoint, tmp_path):
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    write_torch_file(tmp_path / "pytorch_model.bin", load_file(folder / "model.safetensors"))
    other = cross_encoder.read(tmp_path)
    flat, others = (jax.tree.leaves_with_path(c.params) for c in (checkpoint, other))
    assert len(flat) > 20
    for (path, array), (_, same) in zip(flat, others, strict=True):
        np.testing.assert_array_equal(array, same, err_msg=str(path))


TWO = {"classifier.weight": np.ones((2, 32), np.float32), "classifier.bias": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("fields", "tensors", "drop", "message"),
    [
        ({}, TWO, (), r"safetensors: the classifier has 2 classes; .* \(num_labels=1\)"),
        ({}, {}, ("classifier.weight",), "tensor 'classifier.weight' is missing"),
        ({}, {}, ("bert.pooler.dense.bias",), "tensor 'bert.pooler.dense.bias' is missing"),
        ({}, {"bert.extra": np.ones(3, np.float32)}, (), "does not have: bert.extra"),
        ({"hidden_size": 16}, {}, (), r"has shape \[.*32\], the configuration asks for"),
        (
            {"type_vocab_size": 1},
            {},
            (),
            "config.json: type_vocab_size is 1; a cross-encoder needs",
        ),
        (
            {"architectures": ["RobertaForSequenceClassification"]},
            {},
            (),
            "architectures is RobertaForSequenceClassification; supported as a cross-encoder: Bert",
        ),
    ],
)
def test_other_files_are_refused(copy, fields, tensors, drop, message):
    place = copy(fields, tensors, drop)
    assert cross_encoder.detect(place)
    with pytest.raises(ValueError, match=message):
        cross_encoder.read(place)


def test_other_folders_are_no_cross_encoders(copy, stanford_folder, plain_folder, tmp_path):
    for place in (stanford_folder, plain_folder, tmp_path / "nowhere"):
        assert not cross_encoder.detect(place)
    assert not cross_encoder.detect(copy({"architectures": None}))
