"""Reranking of candidates, against scores computed one pair at a time."""

import json

import numpy as np
import pytest

from colbert_jax.cli import main
from colbert_jax.evaluation import read_run
from colbert_jax.reranking import rerank

pytestmark = pytest.mark.filterwarnings("default:.*left out")


def by_hand(model, query, documents):
    """MaxSim of a query with each document."""
    q = model.encode_queries([query])[0]
    return [float((q @ d.T).max(1).sum()) for d in model.encode_documents(documents)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("files")
    rows = [f"{n}\t{text}\n" for n, text in enumerate(texts)]
    (folder / "c.tsv").write_text("".join(rows))
    (folder / "q.tsv").write_text("".join(f"q{n}\t{texts[n]}\n" for n in range(3)))
    lines = [f"q{n} Q0 {m} {m + 1} {-m} x\n" for n in range(4) for m in range(n, n + 9)]
    (folder / "run").write_text("".join(lines) + "q1 Q0 999 10 -99 x\n")
    return folder


@pytest.mark.parametrize("documents", [4096, 5])
def test_scores_and_order(model, texts, monkeypatch, documents):
    monkeypatch.setattr("colbert_jax.reranking._DOCUMENTS", documents)
    batch = [
        (texts[0], texts[:6]),
        (texts[1], {"x": texts[1], "y": texts[7], "twin": texts[1], "none": ""}),
        (texts[2], []),
    ]
    first, second, third = rerank(model, batch)
    expected = by_hand(model, texts[0], texts[:6])
    assert [hit.position for hit in first] == np.argsort(expected)[::-1].tolist()
    np.testing.assert_allclose([hit.score for hit in first], sorted(expected)[::-1], atol=1e-4)
    assert [hit.id for hit in second][:2] == ["x", "twin"] and second[0].text == texts[1]
    assert third == []
    assert [len(hits) for hits in rerank(model, batch, 2)] == [2, 2, 0]
    with pytest.raises(TypeError, match=r"candidates of query 0: .*expected a string"):
        list(rerank(model, [(texts[0], [3])]))


def test_a_run_by_its_texts_or_its_index(capsys, files, model, stanford_folder, texts, index):
    output = files / "out"
    command = ["rerank", files / "run", "--queries", files / "q.tsv", "--output", output]
    texts_from = ["--collection", files / "c.tsv", "--checkpoint", stanford_folder]
    for source, k in ((texts_from, 9), (["--index", index.path, "-k", 4], 4)):
        assert main(list(map(str, [*command, *source]))) == 0
        captured = capsys.readouterr()
        assert f"3 queries, {3 * k} results" in captured.out
        assert "1 of 4 queries of the run are not in" in captured.err
        assert "1 of 12 candidates of the run are not in" in captured.err
        run = read_run(output)
        assert next(iter(run["q1"])) == "1" and set(run["q1"]) <= {str(n) for n in range(1, 10)}
        expected = by_hand(model, texts[1], [texts[int(pid)] for pid in run["q1"]])
        tolerance = 1e-4 if source is texts_from else 0.5  # compressed
        np.testing.assert_allclose(list(run["q1"].values()), expected, atol=tolerance)


def test_lists(capsys, stanford_folder, texts, tmp_path):
    rows = [
        {"query": texts[0], "candidates": texts[1:4]},
        {"qid": 7, "query": texts[5], "candidates": [{"id": "a", "text": texts[5]}]},
    ]
    file = tmp_path / "lists.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["rerank", file, "--output", tmp_path / "out", "--checkpoint", stanford_folder]
    assert main(list(map(str, command))) == 0
    run = read_run(tmp_path / "out")
    assert set(run["q1"]) == {"0", "1", "2"} and list(run["7"]) == ["a"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "a run file needs --queries, and one of --collection and --index"),
        (["--queries", "q.tsv", "--collection", "c.tsv"], "--collection needs --checkpoint"),
        (["--queries", "other.tsv", "--index", "i"], "4 of 4 queries of the run are not in other"),
    ],
)
def test_what_is_missing_is_said(capsys, files, monkeypatch, flags, message):
    monkeypatch.chdir(files)
    (files / "other.tsv").write_text("z\twhat\n")
    assert main(["rerank", "run", "--output", "out", *flags]) == 2
    assert message in capsys.readouterr().err
