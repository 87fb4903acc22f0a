"""BAAI/bge-m3's layout against a plain torch statement of FlagEmbedding's formulas."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from support import passages

from colbert_jax import ColBERT
from colbert_jax.checkpoints import convert_checkpoint, detect_layout, read_checkpoint
from colbert_jax.cli import main
from colbert_jax.tensors.torch_file import write_torch_file

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints" / "transformers_xlm-roberta"
QUERIES = ["what is a river?", "paris capital of france", "fish"]
DOCUMENTS = [*passages(7, seed=4), "river river river fish", "fish"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """XLM-RoBERTa as transformers saved it, with heads as FlagEmbedding saves them."""
    folder = tmp_path_factory.mktemp("bge") / "bge-m3"
    shutil.copytree(GOLDEN, folder)
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    rng = np.random.default_rng(0)
    for name, rows in (("colbert", width), ("sparse", 1)):
        head = {
            "weight": rng.normal(0, 0.4, (rows, width)).astype(np.float32),
            "bias": rng.normal(0.4, 0.1, rows).astype(np.float32),
        }
        write_torch_file(folder / f"{name}_linear.pt", head)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return ColBERT.from_pretrained(folder, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def original(folder):
    """Texts to dense vectors [N, H], weights of the vocabulary [N, V] and token vectors, one text
    at a time, as FlagEmbedding's M3 model defines them."""
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    colbert, sparse = (
        torch.load(folder / f"{name}_linear.pt", weights_only=True)
        for name in ("colbert", "sparse")
    )
    unused = [
        tokenizer.cls_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    ]

    def encode(texts):
        rows = []
        for text in texts:
            inputs = tokenizer(text, return_tensors="pt", truncation=True)
            with torch.inference_mode():
                hidden = encoder(**inputs).last_hidden_state[0]
                dense = torch.nn.functional.normalize(hidden[0], dim=-1)
                weights = torch.relu(hidden @ sparse["weight"].T + sparse["bias"])[:, 0]
                lexical = torch.zeros(encoder.config.vocab_size)
                lexical = lexical.scatter_reduce(0, inputs["input_ids"][0], weights, reduce="amax")
                lexical[unused] = 0
                tokens = hidden[1:] @ colbert["weight"].T + colbert["bias"]
                tokens = torch.nn.functional.normalize(tokens, dim=-1)
            rows.append((dense.numpy(), lexical.numpy(), tokens.numpy()))
        return rows

    return encode


def test_token_embeddings(model, folder, original):
    assert detect_layout(folder) == "bge-m3"
    documents = model.encode_documents(DOCUMENTS)
    for ours, (_, _, theirs) in zip(documents, original(DOCUMENTS), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    queries = model.encode_queries(QUERIES)
    for ours, (_, _, theirs) in zip(queries, original(QUERIES), strict=True):
        np.testing.assert_allclose(ours[: len(theirs)], theirs, atol=1e-5)
        assert not ours[len(theirs) :].any()


@pytest.mark.parametrize("weights", [(1, 0.3, 1), (0, 1, 0), (1, 0, 0), (0, 0, 1)])
def test_three_way_scores(model, original, weights):
    expected = np.zeros((len(QUERIES), len(DOCUMENTS)))
    for i, query in enumerate(original(QUERIES)):
        for j, document in enumerate(original(DOCUMENTS)):
            multi = (query[2] @ document[2].T).max(axis=1).mean()
            parts = query[0] @ document[0], query[1] @ document[1], multi
            expected[i, j] = np.dot(weights, parts) / sum(weights)
    assert weights != (0, 1, 0) or np.count_nonzero(expected) > 3
    hits = model.rank(QUERIES, DOCUMENTS, weights=weights)
    ours = np.zeros_like(expected)
    np.put_along_axis(ours, hits.positions, hits.scores, axis=1)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert (np.diff(hits.scores) <= 0).all()
    first = model.rank(QUERIES[0], DOCUMENTS, 2, weights=weights)
    np.testing.assert_array_equal(first.positions, hits.positions[0, :2])
    assert model.rank(QUERIES, [], weights=weights).scores.shape == (len(QUERIES), 0)


def test_weights_on_the_command_line(folder, model, tmp_path, capsys):
    (tmp_path / "passages.txt").write_text("".join(f"{text}\n" for text in DOCUMENTS))
    arguments = ["rank", "fish", str(tmp_path / "passages.txt"), "--checkpoint", str(folder)]
    assert main([*arguments, "--weights", "1,0.3,1", "-k", "1"]) == 0
    (score,) = model.rank("fish", DOCUMENTS, 1, weights=(1, 0.3, 1)).scores
    assert capsys.readouterr().out.split()[1] == f"{score:.4f}"


def test_published_scores_are_compared(folder, model, monkeypatch, capsys):
    file = Path(__file__).parents[2] / "convert" / "verify.py"
    spec = importlib.util.spec_from_file_location("verify", file)
    verify = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verify)
    monkeypatch.setattr(verify, "PUBLISHED", {})
    monkeypatch.setattr(verify, "load", lambda _: model)
    printed = {}
    for weights in ((1, 0, 0), (0.4, 0.2, 0.4)):
        hits = model.rank(verify.THREE_WAY_QUERIES, verify.THREE_WAY_DOCUMENTS, weights=weights)
        rows = [
            score
            for places, scores in zip(hits.positions, hits.scores, strict=True)
            for _, score in sorted(zip(places, scores, strict=True))
        ]
        printed[weights] = " ".join(f"{score:.5f}" for score in rows)
    monkeypatch.setattr(verify, "PUBLISHED_THREE_WAYS", {"BAAI/bge-m3": printed})
    assert verify.main(["--published", f"BAAI/bge-m3={folder}"]) == 0
    assert capsys.readouterr().out.count("PASS") == 8
    printed[0.4, 0.2, 0.4] = "9 9 9 9"
    assert verify.main(["--published", f"BAAI/bge-m3={folder}"]) == 1
    assert capsys.readouterr().out.count("FAIL") == 4


def test_long_documents_and_short_queries(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "long")
    fields = json.loads((copy / "config.json").read_text())
    positions = fields["max_position_embeddings"] - 2
    text = read_checkpoint(copy).config.text
    assert (text.query_maxlen, text.doc_maxlen) == (min(512, positions), min(8192, positions))


@pytest.mark.parametrize("layout", ["native", "sentence-transformers"])
def test_written_in_other_layouts(folder, model, tmp_path, layout):
    if layout == "native":
        convert_checkpoint(folder, tmp_path / layout, layout)
    else:
        with pytest.warns(UserWarning, match=r"no place for the lexical weights \(sparse_linear"):
            convert_checkpoint(folder, tmp_path / layout, layout)
    again = ColBERT.from_pretrained(tmp_path / layout, devices=model.devices)
    np.testing.assert_allclose(
        again.encode_documents(DOCUMENTS).values,
        model.encode_documents(DOCUMENTS).values,
        atol=1e-6,
    )
    if layout == "native":
        expected, hits = (m.rank("fish", DOCUMENTS, weights=(1, 1, 1)) for m in (model, again))
        np.testing.assert_allclose(hits.scores, expected.scores, rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, 1), "three numbers of at least 0"),
        ((1, -1, 1), "three numbers of at least 0"),
        ((0, 0, 0), "not all 0"),
        ((1, float("nan"), 1), "three numbers"),
    ],
)
def test_bad_weights(model, weights, message):
    with pytest.raises(ValueError, match=message):
        model.rank("fish", ["fish"], weights=weights)


def test_a_model_without_lexical_weights(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "sparse_linear.pt").unlink()
    model = ColBERT.from_pretrained(copy)
    assert len(model.rank("fish", ["fish", "river"]).scores) == 2
    with pytest.raises(ValueError, match=r"three heads of bge-m3; .* has no lexical weights"):
        model.rank("fish", ["fish"], weights=(1, 1, 1))


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("colbert", {"bias": (16,)}, "tensor 'weight' is missing"),
        ("colbert", {"weight": (16, 16)}, "tensor 'bias' is missing"),
        ("colbert", {"weight": (16, 7), "bias": (16,)}, r"shape \[16, 7\]"),
        ("colbert", {"weight": (), "bias": (16,)}, "shape"),
        ("colbert", {"weight": (16, 16), "bias": (16,), "more": (1,)}, "found .'more'."),
        ("sparse", {"weight": (2, 16), "bias": (1,)}, r"shape \[2, 16\]"),
    ],
)
def test_damaged_heads(folder, tmp_path, name, tensors, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    arrays = {key: np.zeros(shape, np.float32) for key, shape in tensors.items()}
    write_torch_file(copy / f"{name}_linear.pt", arrays)
    with pytest.raises(ValueError, match=f"{name}_linear.pt: .*{message}"):
        read_checkpoint(copy)


def test_dim_that_the_head_does_not_have(folder):
    with pytest.raises(ValueError, match=r"dim was given as 7, but colbert_linear\.pt projects to"):
        read_checkpoint(folder, dim=7)


@pytest.mark.parametrize("name", ["colbert_linear.pt", "sparse_linear.pt"])
@pytest.mark.parametrize("kind", ["link", "folder"])
def test_heads_that_cannot_be_read_are_not_absent(folder, tmp_path, name, kind):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).unlink()
    if kind == "link":
        (copy / name).symlink_to("pruned")
    else:
        (copy / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name}: a (link to pruned|folder in place of a file)"):
        read_checkpoint(copy)
