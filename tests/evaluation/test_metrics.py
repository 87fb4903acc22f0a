"""Measures against hand-worked values."""

import json
import math

import numpy as np
import pytest

from colbert_jax import Hit
from colbert_jax.data.examples import pair_examples
from colbert_jax.evaluation import evaluate_ranking, read_run, write_run
from colbert_jax.evaluation.dev import DevCollection, hold_out
from colbert_jax.evaluation.metrics import check_judged
from colbert_jax.evaluation.runs import check_run_ids
from colbert_jax.index.columns import ID, Positions, Strings, StringWriter
from colbert_jax.index.format import string_arrays
from colbert_jax.retriever import rank_documents

pytest.importorskip("ir_measures", reason="ir-measures (the extra eval) is not installed")


def test_by_hand():
    qrels = {"1": {"a": 2, "b": 1, "z": 0}, "2": {"c": 1}, "3": {"d": 1}}
    ranking = {
        "1": ["x", "b", "a", "y"],  # nDCG: linear gains, 1/log2(3) + 2/log2(4)
        "2": ["p", "q", "r", "s", "t", "c"],  # found at rank 6
        "unjudged": ["a"],
    }  # query 3 was not answered and counts as 0
    values = evaluate_ranking(ranking, qrels)
    ideal = 2 + 1 / math.log2(3)
    ndcg = (1 / math.log2(3) + 2 / math.log2(4)) / ideal, 1 / math.log2(7), 0
    assert values["nDCG@10"] == pytest.approx(sum(ndcg) / 3)
    assert values["MRR@10"] == pytest.approx((1 / 2 + 1 / 6 + 0) / 3)
    assert values["Recall@100"] == pytest.approx(2 / 3)
    assert values["Success@5"] == pytest.approx(1 / 3)


def test_the_order_given_is_the_order_measured():
    """Not re-sorted by name, as trec_eval does with equal scores."""
    for first, expected in (("a", 1.0), ("b", 0.5)):
        order = sorted("ab", key=lambda d: d != first)
        assert evaluate_ranking({"1": order}, {"1": {"a": 1}})["MRR@10"] == expected


def test_nothing_judged():
    with pytest.raises(ValueError, match="none of the queries has a judgement"):
        evaluate_ranking({"1": ["a"]}, {"2": {"a": 1}})


def test_a_querys_own_passage_may_be_left_out():
    """As BEIR does for ArguAna: the query is a document, finds itself, and is no answer."""
    ranking = {"a": ["a", "b", "c"], "b": ["c", "b", "a"]}
    qrels = {"a": {"b": 1}, "b": {"a": 1, "b": 1}, "own": {"own": 1}}
    assert evaluate_ranking(ranking, qrels)["MRR@10"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    values = evaluate_ranking(ranking, qrels, ignore_self=True)
    assert values["MRR@10"] == pytest.approx((1 + 1 / 2) / 2)
    assert values["Recall@100"] == 1


def test_judged_documents_that_are_not_there():
    qrels = {"1": {"a": 1, "MED-1": 0}, "2": {"a": 0, "b": 1}}
    assert check_judged(qrels, {"a", "b", "MED-1"}.__contains__, "a", "x") is None
    message = check_judged(qrels, {"a", "b"}.__contains__, "a", "the index x")
    assert message.startswith("1 of 3 judged documents are not in the index x")
    assert "'MED-1'" in message and "'a'" in message
    with pytest.raises(ValueError, match=r"3 of 3 judged documents are not in the index x"):
        check_judged(qrels, {"0"}.__contains__, "0", "the index x")


def test_a_dev_collection_says_what_it_can_not_find():
    passages, queries = {"a": "one", "b": "two"}, {"1": "what"}
    with pytest.warns(UserWarning, match="1 of 2 judged documents are not in the dev collection"):
        DevCollection(passages, queries, {"1": {"a": 1, "z": 1}, "not asked": {"y": 1}})
    with pytest.raises(ValueError, match="2 of 2 judged documents are not in the dev collection"):
        DevCollection(passages, queries, {"1": {"y": 1, "z": 1}})
    with pytest.raises(ValueError, match="no query with a judgement"):
        DevCollection(passages, queries, {"2": {"a": 1}})


def test_a_dev_collection_from_files(tmp_path):
    collection, queries, qrels = (tmp_path / name for name in ("c.tsv", "q.tsv", "qrels"))
    collection.write_text("a\tone\na\ttwo\n")
    queries.write_text("1\twhat\n")
    qrels.write_text("2 0 a 1\n")
    with pytest.raises(ValueError, match=r"id is '1', for example, and a judged one is '2'"):
        DevCollection.read(collection, queries, qrels)
    qrels.write_text("1 0 a 1\n")
    with pytest.raises(ValueError, match=r"c\.tsv: passage id 'a' appears twice"):
        DevCollection.read(collection, queries, qrels)


def test_a_dev_collection_of_its_own_queries(model, texts):
    passages = {str(n): text for n, text in enumerate(texts[:8])}
    qrels = {"3": {"3": 1, "4": 1}}
    values = DevCollection(passages, {"3": texts[3]}, qrels).evaluate(model)
    assert values["MRR@10"] == values["Recall@100"] == 1
    values = DevCollection(passages, {"3": texts[3]}, qrels, ignore_self=True).evaluate(model)
    order = [hit.id for hit in rank_documents(model, texts[3], passages) if hit.id != "3"]
    assert values["MRR@10"] == pytest.approx(1 / (1 + order.index("4")))
    assert values["Recall@100"] == 1


HITS = [Hit("one", 2.5, None, 1), Hit("zero", 1.0, None, 0)]


def test_run_files(tmp_path):
    assert write_run(tmp_path / "run", {"q": HITS}) == 2
    lines = "q Q0 one 1 2.5 colbert_jax\nq Q0 zero 2 1.0 colbert_jax\n"
    assert (tmp_path / "run").read_text() == lines
    write_run(tmp_path / "run", iter([("q", HITS)]), "stanford")
    assert (tmp_path / "run").read_text() == "q\tone\t1\t2.5\nq\tzero\t2\t1.0\n"
    with pytest.raises(ValueError, match="format must be one of"):
        write_run(tmp_path / "run", {"q": HITS}, "json")


@pytest.mark.parametrize(
    "scores",
    [
        [1.0] * 50,  # tied
        [20 - n * 1e-8 for n in range(50)],  # apart in double precision only
        [20.0, 20.0, 20.0 - 1e-6, 20.0 - 1e-6, 0.0, 0.0, -1e-3],
        [0.0] * 20 + [-3.5] * 20,
    ],
)
def test_tools_read_our_order_from_a_run_file(tmp_path, scores):
    """trec_eval's kin sort by single-precision scores, and equal ones by id, largest first."""
    ir_measures = pytest.importorskip("ir_measures")
    ids = [f"d{(n * 37) % 101:03}" for n in range(len(scores))]
    write_run(tmp_path / "run", {"q": list(map(Hit, ids, scores, ids, range(len(ids))))})
    fields = [line.split() for line in (tmp_path / "run").read_text().splitlines()]
    written = np.array([float(row[4]) for row in fields], np.float32)
    assert [row[2] for row in fields] == ids and (np.diff(written) < 0).all()
    np.testing.assert_allclose(written, scores, rtol=1e-5, atol=1e-30)
    qrels = {"q": {pid: 1 + n % 3 for n, pid in enumerate(ids[:9])}}
    measure = ir_measures.nDCG @ 10
    run = list(ir_measures.read_trec_run(str(tmp_path / "run")))
    theirs = ir_measures.calc_aggregate([measure], qrels, run)[measure]
    assert theirs == pytest.approx(evaluate_ranking({"q": ids}, qrels)["nDCG@10"])


def test_run_files_are_read_in_their_tools_order(tmp_path):
    """trec_eval's for six columns: by single-precision scores, equal ones by the larger id."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(0)
    qrels, run, lines = {}, {}, []
    for q in range(20):
        pids = [f"d{n}" for n in rng.permutation(60)]
        scores = rng.integers(0, 9, 60) + rng.choice([0, 1e-7, 1e-3], 60)  # ties and near ties
        run[f"q{q}"] = dict(zip(pids, scores.tolist(), strict=True))
        lines += [f"q{q} Q0 {pid} 1 {score!r} x\n" for pid, score in run[f"q{q}"].items()]
        if q != 3:  # not judged
            qrels[f"q{q}"] = {pid: int(rng.integers(-1, 3)) for pid in pids[::4]} | {"away": 1}
    qrels["missing"] = {"d1": 1}
    (tmp_path / "run").write_text("".join(lines))
    read = read_run(tmp_path / "run")
    assert read == run
    ranking = {qid: list(pids) for qid, pids in read.items()}
    names = {"nDCG@10": "ndcg_cut_10", "Recall@100": "recall_100", "Success@5": "success_5"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, set(names.values())).evaluate(run)
    ours = evaluate_ranking(ranking, qrels)
    for name, other in names.items():
        mean = sum(row[other] for row in theirs.values()) / len(qrels)
        assert ours[name] == pytest.approx(mean, abs=1e-6)


def test_stanfords_run_files(tmp_path):
    write_run(tmp_path / "run", {"q 1": HITS}, "stanford")
    assert read_run(tmp_path / "run") == {"q 1": {"one": 2.5, "zero": 1.0}}
    (tmp_path / "run").write_text("7\ta\t2\n7\tb\t1\n")
    assert list(read_run(tmp_path / "run")["7"].items()) == [("b", -1), ("a", -2)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("q Q0 d 1 2.5\n", r"line 1: expected 'qid Q0 .* tag' or"),
        ("q Q0 d 1 2.5 x\nq d 1\n", r"line 2: expected 'qid Q0 pid rank score tag'"),
        ("q Q0 d 1 high x\n", r"line 1: expected a rank and a score"),
        ("q Q0 d 1 nan x\n", r"line 1: the score is not a number"),
        ("q Q0 d 1 2 x\nq Q0 d 2 1 x\n", r"line 2: document 'd' again for query 'q', .* line 1"),
        ("", "no results"),
    ],
)
def test_unreadable_runs(tmp_path, data, message):
    (tmp_path / "run").write_text(data)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("qid", "pid", "format", "message"),
    [
        ("q 1", "d", "trec", "query id 'q 1' has white space in it.* format stanford has tabs"),
        ("q", "d\u00a01", "trec", "document id 'd.xa01' has white space in it"),
        ("q", "d\t1", "trec", "document id 'd.t1' has white space in it, .* a line$"),
        ("q", "d\t1", "stanford", "document id 'd.t1' has a tab or a line end in it"),
        ("", "d", "stanford", "a query has an empty id"),
    ],
)
def test_ids_that_a_run_file_has_no_place_for(tmp_path, qid, pid, format, message):
    with pytest.raises(ValueError, match=message):
        write_run(tmp_path / "run", {qid: [Hit(pid, 1.0, None, 0)]}, format)
    assert list(tmp_path.iterdir()) == []
    write_run(tmp_path / "run", {"q 1": [Hit("d 1", 1.0, None, 0)]}, "stanford")


def test_ids_of_an_index_are_searched_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("colbert_jax.index.columns._HASHED", 3)
    ids = [f"d{n}" for n in range(10)]
    for bad in (None, 0, 5, 9):
        with StringWriter(tmp_path, ID) as writer:
            own = [f"d {n}" if n == bad else pid for n, pid in enumerate(ids)]
            writer.extend([pid.encode() for pid in own])
        files = (np.load(tmp_path / f"{name}.npy") for name in string_arrays(ID))
        column = Strings(tmp_path, ID, *files)
        if bad is None:
            check_run_ids(column, "document", "trec")
        else:
            with pytest.raises(ValueError, match=f"document id 'd {bad}'"):
                check_run_ids(column, "document", "trec")
    check_run_ids(Positions(12), "document", "trec")


def test_a_dev_collection_has_any_measure(model, texts):
    passages = {str(i): text for i, text in enumerate(texts[:20])}
    dev = DevCollection(passages, {"3": texts[3]}, {"3": {"3": 1, "7": 2}})
    found = dev.evaluate(model, ["nDCG@10", "AP(rel=2)@1000", "MRR@3"])
    assert list(found) == ["nDCG@10", "AP(rel=2)@1000", "MRR@3"]
    assert found["nDCG@10"] == dev.evaluate(model)["nDCG@10"] and found["AP(rel=2)@1000"] > 0


def test_held_out_queries_depend_on_their_texts_alone(tmp_path):
    rows = [{"query": f"q{i // 2}", "positive": f"document {i}"} for i in range(40)]
    rows.append({"query": "q0", "positive": "document 39"})  # the positive of another query too

    def opened(rows):
        file = tmp_path / "p.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return pair_examples(file)

    source, dev = hold_out(opened(rows), 4, passages=15)
    asked = set(dev.queries.values())
    assert len(asked) == 4 and len(dev.passages) == 15
    assert not asked & {example.query for example in source}
    assert len(source) == sum(row["query"] not in asked for row in rows)
    for qid, text in dev.queries.items():
        found = {dev.passages[pid] for pid in dev.qrels[qid]}
        assert found == {row["positive"] for row in rows if row["query"] == text}
    again, other = hold_out(opened(rows[::-1]), 4, passages=15)
    assert set(other.queries.values()) == asked and len(again) == len(source)
    _, some = hold_out(opened(rows))
    assert some is not None and len(some.queries) == 2
    assert hold_out(opened(rows[:12]))[1] is None
    for count in (0, 20, 21):
        with pytest.raises(ValueError, match=f"{count} queries cannot be kept .* have 20"):
            hold_out(opened(rows), count)
