"""X-MOD (colbert-xm): the adapters of one language, chosen by argument."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from colbert_jax import ColBERT
from colbert_jax.checkpoints import convert_checkpoint, read_checkpoint, write_checkpoint
from colbert_jax.cli import main

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints" / "transformers_xlm-roberta"
LANGUAGES = ["en_XX", "de_DE", "fr_XX"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of three languages, and transformers' model."""
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("xmod") / "xmod"
    shutil.copytree(GOLDEN, folder)
    (folder / "model.safetensors").unlink()
    known = json.loads((folder / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: known[name] for name in (*names, "intermediate_size", "type_vocab_size")}
    config = transformers.XmodConfig(
        **sizes,
        max_position_embeddings=known["max_position_embeddings"],
        pad_token_id=1,
        languages=LANGUAGES,
        default_language="en_XX",
    )
    torch.manual_seed(0)
    model = transformers.XmodModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("LayerNorm.weight" in name), 0.3)
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("language", [None, "de_DE"])
def test_parity(made, language):
    import torch

    folder, theirs = made
    model = ColBERT.from_pretrained(folder, language=language, devices=jax.devices()[:1])
    theirs.set_default_language(language or "en_XX")
    texts = ["paris", "a river in france"]
    rows = model.tokenizer.documents(texts).ids
    for row, ours in zip(rows, model.encode_documents(texts), strict=True):
        with torch.inference_mode():
            hidden = theirs(torch.from_numpy(row).long()[None]).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden, dim=-1).numpy()
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert model.load.get("language") == language


def test_saved_with_one_language(made, tmp_path):
    folder, _ = made
    checkpoint = read_checkpoint(folder, language="fr_XX", dim=8)
    for layout in ("native", "pylate"):
        write_checkpoint(checkpoint, tmp_path / layout, layout)
        again = read_checkpoint(tmp_path / layout)
        assert again.encoder.backbone.default_language == "fr_XX"
        for a, b in zip(*(jax.tree.leaves(c.params) for c in (checkpoint, again)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "language", "message"),
    [
        ({}, "xx_XX", r"language 'xx_XX' is not one of the model's: en_XX, de_DE, fr_XX"),
        ({"default_language": None}, None, "a model of 3 languages: choose one with language=, of"),
        ({"languages": "en_XX"}, None, "languages must be a list of strings"),
        ({"pre_norm": True}, None, "pre_norm True is not supported"),
        ({"adapter_reduction_factor": 99}, None, "leaves adapters no width"),
    ],
)
def test_bad_languages_and_configurations(made, tmp_path, changes, language, message):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read_checkpoint(folder, language=language)


def test_language_on_the_command_line(made, tmp_path, capsys):
    arguments = ["convert", str(made[0]), str(tmp_path / "out"), "--to", "native"]
    assert main([*arguments, "--language", "xx_XX"]) == 2
    assert "language 'xx_XX' is not one of the model's: en_XX" in capsys.readouterr().err
    assert main([*arguments, "--language", "fr_XX"]) == 0
    assert read_checkpoint(tmp_path / "out").encoder.backbone.default_language == "fr_XX"


def test_a_language_for_other_models(stanford_folder, tmp_path):
    with pytest.raises(ValueError, match="language= is for X-MOD in stanford or huggingface"):
        write_checkpoint(read_checkpoint(stanford_folder), tmp_path / "first")
        convert_checkpoint(tmp_path / "first", tmp_path / "no", language="en_XX")
    with pytest.raises(ValueError, match=r"config\.json: language= is for models of X-MOD"):
        read_checkpoint(stanford_folder, language="en_XX")
    write_checkpoint(read_checkpoint(stanford_folder), tmp_path / "native")
    with pytest.raises(ValueError, match="language= is for X-MOD in stanford or huggingface"):
        read_checkpoint(tmp_path / "native", language="en_XX")
