"""Token embeddings against torch's BertModel on the same weights, float32."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import support
from safetensors.numpy import load_file

from colbert_jax import ColBERT

torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")

TEXTS = [
    "heat flow",
    "",
    "The cats run, dogs just... run! (what?)",
    "a river bank of old money; water & wind",
    " ".join(support.WORDS),
    "Zürich naïve 東京 🙂 “curly” quotes",
]
TINY = {}
ODD = dict(hidden_size=24, num_attention_heads=3, intermediate_size=40, layer_norm_eps=1e-5)
ACTIVATION = dict(hidden_act="gelu_new", type_vocab_size=1)
BASE = dict(  # as wide as BERT-base, a third as deep
    hidden_size=768,
    num_hidden_layers=4,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=512,
    initializer_range=0.02,
)


def torch_embeddings(folder: Path, ids, attended, kept, prefix: str):
    """The original's computation: backbone, linear, mask, normalise; one text at a time."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**json.loads((folder / "config.json").read_text()))
    backbone = transformers.BertModel(config).eval()
    tensors = {k: torch.from_numpy(v) for k, v in load_file(folder / "model.safetensors").items()}
    missing, _ = backbone.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k != "linear.weight"},
        strict=False,
    )
    assert not [name for name in missing if "position_ids" not in name and "pooler" not in name]
    rows = []
    with torch.inference_mode():
        for row, count, keep in zip(ids, attended, kept, strict=True):
            mask = (torch.arange(len(row)) < int(count))[None].long()
            x = backbone(torch.from_numpy(row)[None].long(), attention_mask=mask).last_hidden_state
            if "linear.weight" in tensors:
                x = x @ tensors["linear.weight"].T
            x = torch.nn.functional.normalize(x, dim=-1)[0]
            rows.append(x[torch.from_numpy(keep)].numpy())
    return rows


def check(folder: Path, texts: list[str], prefix: str, devices=None, **settings):
    settings |= dict(dtype="float32", devices=devices or jax.devices()[:1])
    model = ColBERT.from_pretrained(folder, **settings)
    tokens = model.tokenizer.queries(texts)
    kept = [np.ones(len(row), bool) for row in tokens.ids]
    queries = model.encode_queries(texts, allow_blank=True)
    for ours, theirs in zip(queries, torch_embeddings(folder, *tokens, kept, prefix), strict=True):
        np.testing.assert_allclose(ours[: len(theirs)], theirs, atol=1e-5)
        assert not ours[len(theirs) :].any()

    tokens = model.tokenizer.documents(texts)
    kept = [model.tokenizer.kept(row) for row in tokens.ids]
    documents = model.encode_documents(texts)
    theirs = torch_embeddings(folder, *tokens, kept, prefix)
    assert documents.lengths.tolist() == [len(row) for row in theirs]
    for a, b in zip(documents, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    return model, queries, documents, theirs


@pytest.mark.parametrize("config", [TINY, ODD, ACTIVATION], ids=["tiny", "odd", "gelu_new"])
@pytest.mark.parametrize("settings", [{}, {"attend_to_mask_tokens": True}], ids=["", "attend"])
def test_stanford(tmp_path, config, settings):
    folder = support.write_stanford(tmp_path / "c", config)
    check(folder, TEXTS, "bert.", **settings)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_plain(tmp_path, prefix):
    folder = support.write_plain(tmp_path / "c", TINY, prefix=prefix)
    check(folder, TEXTS, prefix, query_maxlen=48, doc_maxlen=64)


@pytest.mark.slow
def test_bert_base_width(tmp_path):
    folder = support.write_stanford(tmp_path / "c", BASE, dim=128, query_maxlen=32, doc_maxlen=180)
    texts = [*TEXTS, " ".join(support.passages(12, longest=40))]
    model, queries, _, theirs = check(folder, texts, "bert.")
    expected = [(d @ queries[2].T).max(axis=0).sum() for d in theirs]
    hits = model.rank(texts[2], texts)
    np.testing.assert_allclose(hits.scores, np.array(expected)[hits.positions], rtol=1e-4)


def test_real_minilm(minilm_folder):
    texts = [
        "what similarity laws must be obeyed when constructing aeroelastic models?",
        "",
        "The quick brown fox jumps over the lazy dog — naïve café, 東京 🙂!",
        "experimental investigation of the aerodynamics of a wing in a slipstream . " * 60,
        "heat",
    ]
    check(minilm_folder, texts, "")


def test_eight_devices(tmp_path, eight_devices):
    check(support.write_stanford(tmp_path / "c"), TEXTS, "bert.", devices=eight_devices)
