"""Scores other than MaxSim's sum, and embeddings that keep their length: checkpoints that ask."""

import json
import shutil

import jax
import numpy as np
import pytest
from support import passages, write_stanford

from colbert_jax import ColBERT, Index, Retriever
from colbert_jax.checkpoints import convert_checkpoint, read_checkpoint
from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.evaluation.systems import Workbench
from colbert_jax.reranking import rerank
from colbert_jax.scoring.interactions import interact
from colbert_jax.shards import Shards

TEXTS = passages(12, seed=8)


def test_definitions():
    """Two query tokens and a row of filling; documents of two tokens, of one, of none."""
    queries = np.array([[[1, 0], [0, 2], [0, 0]]], np.float32)
    documents = DocumentEmbeddings.from_list(
        [np.array(d, np.float32).reshape(-1, 2) for d in ([[1, 0], [0.5, 1]], [[-1, 3]], [])], 2
    )  # best matches: 1 and 2; -1 and 6
    mean = interact(queries, documents, "meanmaxsim", half=1)
    np.testing.assert_allclose(mean, [[1.5, 2.5, -np.inf]])
    np.testing.assert_allclose(interact(queries, documents, "flipr", half=1), [[2, 6, -np.inf]])
    np.testing.assert_allclose(interact(queries, documents, "flipr", half=5), [[3, 5, -np.inf]])


def test_flipr_against_torch(tmp_path):
    """colbert-ai's reduction: the largest half of the maxima."""
    torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    folder = write_stanford(
        tmp_path / "s", {"num_hidden_layers": 1}, interaction="flipr", query_maxlen=16
    )
    model = ColBERT.from_pretrained(folder, devices=jax.devices()[:1])
    queries, documents = model.encode_queries(TEXTS[:3]), model.encode_documents(TEXTS)
    expected = np.array(
        [
            [float(torch.tensor(q @ d.T).max(1).values.topk(8).values.sum()) for d in documents]
            for q in queries
        ]
    )
    hits = model.rank(TEXTS[:3], TEXTS)
    np.testing.assert_allclose(hits.scores, -np.sort(-expected, axis=1), rtol=1e-5)
    (first, *_) = rerank(model, [(TEXTS[0], TEXTS[::-1])])
    assert [hit.text for hit in first] == [TEXTS[i] for i in hits.positions[0]]
    np.testing.assert_allclose([hit.score for hit in first], hits.scores[0], rtol=1e-5)
    exact = Workbench(list("abcdefghijkl"), TEXTS, {"q": TEXTS[0]}, model, tmp_path).run(
        "exact", 12
    )
    assert list(exact.ranking["q"].values()) == pytest.approx(hits.scores[0], rel=1e-5)
    indexed_by_flipr(torch, model, tmp_path / "index")
    for layout in ("pylate", "native", "stanford"):
        convert_checkpoint(folder, tmp_path / layout, layout)
        assert read_checkpoint(tmp_path / layout).config.interaction == "flipr"
    written = json.loads((tmp_path / "stanford" / "artifact.metadata").read_text())
    assert written["interaction"] == "flipr"


def indexed_by_flipr(torch, model, path):
    """An index's exact scores, and PLAID's last stage, over decompressed embeddings."""
    retriever = Retriever.build(path, model, TEXTS, nbits=4, progress=False)
    queries = model.encode_queries(TEXTS[:3])
    stored = [retriever.index.document_embeddings(i) for i in range(len(TEXTS))]
    expected = np.array(
        [
            [float(torch.tensor(q @ d.T).max(1).values.topk(8).values.sum()) for d in stored]
            for q in queries
        ]
    )
    for mode in ("exact", "accurate"):
        found = retriever.search(TEXTS[:3], 4, mode=mode)
        assert Shards([retriever]).search(TEXTS[:3], 4, mode=mode) == found
        for row, hits in zip(expected, found, strict=True):
            assert [hit.position for hit in hits] == np.argsort(-row, kind="stable")[:4].tolist()
            assert [hit.score for hit in hits] == pytest.approx(-np.sort(-row)[:4], rel=1e-5)
    (some,) = retriever.search(TEXTS[:1], 4, mode="exact", ids=["2", "5"])
    assert {hit.position: hit.score for hit in some} == pytest.approx(
        {i: expected[0, i] for i in (2, 5)}, rel=1e-5
    )
    with pytest.raises(ValueError, match="best_tokens must be at least 1, got 0"):
        retriever.index.search(queries, best_tokens=0)


def test_unknown_interaction(tmp_path):
    folder = write_stanford(tmp_path / "s", interaction="other")
    with pytest.raises(ValueError, match=r"artifact\.metadata: interaction 'other' is not supp"):
        read_checkpoint(folder)


@pytest.fixture
def st_folder(shallow_folder, tmp_path):
    convert_checkpoint(shallow_folder, tmp_path / "st", "sentence-transformers")
    return tmp_path / "st"


def test_mean_of_sentence_transformers(shallow_folder, st_folder, tmp_path):
    file = st_folder / "config_sentence_transformers.json"
    fields = json.loads(file.read_text()) | {"similarity_fn_name": "meanmaxsim"}
    file.write_text(json.dumps(fields))
    one = jax.devices()[:1]
    mean = ColBERT.from_pretrained(st_folder, devices=one)
    plain = ColBERT.from_pretrained(shallow_folder, devices=one)
    ours, sums = (model.rank(TEXTS[:2], TEXTS, 5) for model in (mean, plain))
    np.testing.assert_array_equal(ours.positions, sums.positions)
    np.testing.assert_allclose(ours.scores, sums.scores / 16, rtol=1e-5)
    for layout in ("sentence-transformers", "pylate", "native"):
        convert_checkpoint(st_folder, tmp_path / "out" / layout, layout)
        assert read_checkpoint(tmp_path / "out" / layout).config.interaction == "meanmaxsim"
    written = tmp_path / "out" / "sentence-transformers" / file.name
    assert json.loads(written.read_text())["similarity_fn_name"] == "meanmaxsim"


def test_without_normalize(shallow_folder, st_folder, tmp_path):
    modules = json.loads((st_folder / "modules.json").read_text())
    (place,) = [m["path"] for m in modules if m["type"].endswith("Normalize")]
    shutil.rmtree(st_folder / place)
    (st_folder / "modules.json").write_text(json.dumps([m for m in modules if m["path"] != place]))
    one = jax.devices()[:1]
    raw = ColBERT.from_pretrained(st_folder, devices=one)
    unit = ColBERT.from_pretrained(shallow_folder, devices=one)
    ours, theirs = (model.encode_documents(TEXTS).values for model in (raw, unit))
    lengths = np.linalg.norm(ours, axis=1, keepdims=True)
    assert lengths.std() > 0.01
    np.testing.assert_allclose(ours / lengths, theirs, atol=1e-5)
    with pytest.raises(ValueError, match=r"does not normalise token embeddings, and an index"):
        Index.build(tmp_path / "index", raw, TEXTS)
    for layout in ("sentence-transformers", "native"):
        convert_checkpoint(st_folder, tmp_path / layout, layout)
        assert not read_checkpoint(tmp_path / layout).encoder.normalized
    with pytest.raises(ValueError, match="the pylate layout normalises token embeddings"):
        convert_checkpoint(st_folder, tmp_path / "no", "pylate")
