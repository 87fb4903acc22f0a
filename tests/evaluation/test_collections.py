"""Systems on collections: tables, tests, run files, and the command."""

import json
import sys
import types

import numpy as np
import pytest
from scipy import stats

from colbert_jax.cli import main
from colbert_jax.data.published import read_test_collection
from colbert_jax.evaluation import evaluate_ranking, read_run
from colbert_jax.evaluation.collections import evaluate_collections
from colbert_jax.evaluation.metrics import MEASURES, measure_queries, parse_measures
from colbert_jax.evaluation.presets import preset_of, queries_are_documents
from colbert_jax.evaluation.significance import compare, holm, paired_t_test, randomisation_test

pytest.importorskip("ir_measures", reason="ir-measures (the extra eval) is not installed")


def write_beir(folder, texts, documents=40, queries=12):
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(texts[:documents])]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"_id": f"q{n}", "text": texts[n]} for n in range(queries)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = "".join(f"q{n}\td{n}\t2\nq{n}\td{n + 20}\t1\n" for n in range(queries))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


@pytest.fixture(scope="module")
def beir(tmp_path_factory, texts):
    return write_beir(tmp_path_factory.mktemp("beir") / "NanoTiny", texts)


@pytest.fixture(scope="module")
def report(beir, model):
    collection = read_test_collection(beir)
    twin = {"q0": {"d20": 2.0, "d0": 1.0}}
    with pytest.warns(UserWarning, match="twin: 11 of 12 judged queries of NanoTiny have"):
        return evaluate_collections(
            [collection],
            model,
            ["single", "exact", "plaid-8"],
            runs={"twin": twin},
            query_maxlen=model.config.text.query_maxlen,
            doc_maxlen=model.config.text.doc_maxlen,
        )


def test_values_are_those_of_the_measures(report, beir, model, texts):
    (result,) = report.collections
    exact, plaid = result.systems[1], result.systems[2]
    assert [system.name for system in result.systems] == ["single", "exact", "plaid-8", "twin"]
    assert result.measures == ("nDCG@10", "Recall@100")  # BEIR's
    q, d = model.encode_queries(texts[:1])[0], model.encode_documents(texts[:40])
    scores = {f"d{n}": float((q @ row.T).max(1).sum()) for n, row in enumerate(d)}
    best = sorted(scores, key=scores.get, reverse=True)
    assert list(exact.ranking["q0"])[:10] == best[:10]
    means = q.sum(0), np.array([row.sum(0) / np.linalg.norm(row.sum(0)) for row in d])
    first = f"d{int(np.argmax(means[1] @ means[0]))}"
    assert next(iter(result.systems[0].ranking["q0"])) == first
    qrels = read_test_collection(beir).qrels
    expected = evaluate_ranking({q: list(r) for q, r in exact.ranking.items()}, qrels)
    assert exact.mean("nDCG@10") == pytest.approx(expected["nDCG@10"])
    assert exact.bytes_per_document == pytest.approx(4 * model.dim * d.lengths.mean())
    assert plaid.queries_per_second > 0 and plaid.bytes_per_document > 0
    assert result.systems[0].bytes_per_document == 4 * model.dim
    assert result.systems[3].mean("nDCG@10") == pytest.approx(
        (1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3)) / 12
    )
    assert result.settings["doc_maxlen"] == model.config.text.doc_maxlen
    twin = next(c for c in result.comparisons if c.system == "twin")
    assert twin.adjusted < 0.05 and result.rows()[-1][1].endswith("*")


def test_forms_of_the_report(report):
    assert "NanoTiny: BEIR folder, 40 documents, 12 test queries" in report.text()
    lines = report.markdown().splitlines()
    assert "| system | nDCG@10 | Recall@100 | bytes/doc | queries/s |" in lines
    assert any(line.startswith("| plaid-8 | ") for line in lines)
    assert set(report.keys()) >= {"NanoTiny_exact_ndcg@10", "NanoTiny_twin_recall@100"}
    about = json.loads(json.dumps(report.to_json()))["collections"][0]
    assert about["comparisons"][0]["baseline"] == "exact"
    assert len(report.per_query().splitlines()) == 1 + 4 * 2 * 12
    page = report.page()
    assert page.count("<tr>") == 5 + 4 and "<svg" in page and "http" not in page


def test_two_collections_have_a_mean(report):
    (one,) = report.collections
    twice = type(report)([one, one])
    assert twice.keys()["NanoBEIR_mean_exact_ndcg@10"] == one.systems[1].mean("nDCG@10")


def test_measures_by_name_and_by_query():
    qrels = {"1": {"a": 2, "b": 1}, "2": {"c": 1}, "3": {"d": 1}}
    ranking = {"1": ["x", "b", "a"], "2": ["p", "c"]}
    values = measure_queries(ranking, qrels, ["MRR@10", "Recall@2", "AP(rel=2)@100"])
    assert values["MRR@10"] == {"1": 0.5, "2": 0.5, "3": 0}
    assert values["Recall@2"] == {"1": 0.5, "2": 1, "3": 0}
    assert values["AP(rel=2)@100"]["1"] == pytest.approx(1 / 3)
    means = {m: np.mean(list(row.values())) for m, row in measure_queries(ranking, qrels).items()}
    assert means == pytest.approx(evaluate_ranking(ranking, qrels))
    assert list(means) == list(MEASURES)
    with pytest.raises(ValueError, match=r"'nDGC@10': no measure of ir-measures"):
        parse_measures(["nDGC@10"])


def test_paired_tests():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.5, 0.2, (2, 30))
    assert paired_t_test(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    exact = stats.permutation_test(
        (a[:9] - b[:9],), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert randomisation_test(a[:9] - b[:9], 20_000) == pytest.approx(exact, abs=0.015)
    assert randomisation_test(a - b) == randomisation_test(a - b) == randomisation_test(b - a)
    assert paired_t_test(a - a) == randomisation_test(a - a) == 1
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    values = {"x": {"1": 1.0, "2": 0.0}, "y": {"1": 0.5, "2": 0.0}}
    assert compare(values, "y")[0].difference == 0.25
    with pytest.raises(ValueError, match="baseline 'z': expected one of x, y"):
        compare(values, "z")


def test_presets_follow_the_papers(beir):
    one = read_test_collection(beir)
    assert preset_of(one).doc_maxlen == 300 and preset_of(one).measures[0] == "nDCG@10"
    assert preset_of(one, "msmarco").depth == 1000
    arguana = read_test_collection(beir, name="beir-ArguAna")
    assert preset_of(arguana).query_maxlen == 300 and queries_are_documents(arguana)
    assert not queries_are_documents(one) and preset_of(one, "default").doc_maxlen is None
    with pytest.raises(ValueError, match="preset 'x': expected one of default, beir"):
        preset_of(one, "x")


def test_queries_that_are_documents_do_not_find_themselves(tmp_path, model, texts):
    folder = write_beir(tmp_path / "quora", texts)
    for file in ("queries.jsonl", "qrels/test.tsv"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace('"q', '"d').replace("\nq", "\nd", 99))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd1\td1\t1\nd1\td2\t1\n")
    report = evaluate_collections([read_test_collection(folder)], model, ["exact"])
    system = report.collections[0].systems[0]
    assert "d1" not in system.ranking["d1"] and system.mean("Recall@100") == 1
    assert any("is left out" in note for note in report.collections[0].notes)


@pytest.mark.filterwarnings("default:.*judged queries")
def test_command(capsys, beir, stanford_folder, tmp_path):
    files = {name: tmp_path / name for name in ("markdown", "html", "per-query")}
    command = ["evaluate", beir, "--checkpoint", stanford_folder, "--systems", "exact"]
    command += ["--runs", tmp_path / "runs", "--measures", "RR,MRR@10,nDCG@10"]
    for name, file in files.items():
        command += [f"--{name}", file]
    assert main(list(map(str, command))) == 0
    captured = capsys.readouterr()
    assert "BEIR folder, 40 documents, 12 test queries" in captured.err
    assert "doc_maxlen is 96, not 300: the encoder has" in files["markdown"].read_text()
    assert "exact" in captured.out and all(file.stat().st_size for file in files.values())
    run = tmp_path / "runs" / "NanoTiny.exact.run"
    again = ["evaluate", beir, "--run", f"mine={run}", "--measures", "RR,MRR@10,nDCG@10", "--json"]
    assert main(list(map(str, again))) == 0
    (found,) = json.loads(capsys.readouterr().out)["collections"][0]["systems"]
    assert f"{found['measures']['nDCG@10']:.4f}" in captured.out
    # The tools agree on our file, though they break ties in opposite ways: it has none.
    import ir_measures
    import pytrec_eval

    qrels = {q: dict(g) for q, g in read_test_collection(beir).qrels.items()}
    theirs = ir_measures.calc_aggregate(
        list(map(ir_measures.parse_measure, ["RR", "RR@10", "nDCG@10"])),
        qrels,
        list(ir_measures.read_trec_run(str(run))),
    )
    named = {str(measure).replace("RR@", "MRR@"): value for measure, value in theirs.items()}
    assert found["measures"] == pytest.approx(named, abs=1e-6)
    binding = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(read_run(run))
    mean = np.mean([row["ndcg_cut_10"] for row in binding.values()])
    assert found["measures"]["nDCG@10"] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name the model with --checkpoint, or choose --systems bm25"),
        (["--systems", "colbert"], "system 'colbert': expected bm25, single, exact"),
        (["--queries", "q.tsv"], "give an index with --queries and --qrels"),
        (["--run", "x"], "--run 'x': expected NAME=FILE"),
        (["--ndocs", "3"], "--ndocs is for an index, not for collections"),
        (["--systems", "none"], "nothing to measure"),
    ],
)
def test_wrong_flags(capsys, beir, monkeypatch, flags, message):
    monkeypatch.setitem(sys.modules, "bm25s", types.ModuleType("bm25s"))
    assert main(["evaluate", str(beir), *flags]) == 2
    assert message in capsys.readouterr().err


def test_an_index_is_no_collection(capsys, index):
    assert main(["evaluate", str(index.path), "--systems", "bm25"]) == 2
    assert "an index, which needs --queries and --qrels" in capsys.readouterr().err


def test_bm25(beir):
    bm25s = pytest.importorskip("bm25s", reason="bm25s (the extra bm25) is not installed")
    assert bm25s
    (result,) = evaluate_collections([read_test_collection(beir)], None, ["bm25"]).collections
    (system,) = result.systems
    assert all(next(iter(found)) == f"d{qid[1:]}" for qid, found in system.ranking.items())
    assert all(score > 0 for found in system.ranking.values() for score in found.values())
    assert system.bytes_per_document > 0 and system.mean("nDCG@10") > 0.7


def test_each_row_is_said_when_it_is_done(beir, caplog):
    """A table of days is not waited for."""
    run = {f"q{n}": {f"d{n}": 1.0} for n in range(12)}
    with caplog.at_level("INFO", "colbert_jax"):
        evaluate_collections([read_test_collection(beir)], systems=[], runs={"mine": run})
    (said,) = [r.message for r in caplog.records if "nDCG" in r.message]
    assert said.startswith("NanoTiny: mine: nDCG@10 0.") and said.endswith(", Recall@100 0.5000")
