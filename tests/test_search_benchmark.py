"""benchmarks/search.py as its README runs it, on a tiny cache, and the sums behind its tables."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
DIM = 16


@pytest.fixture(scope="module")
def benchmark():
    """The modules of the command, which import each other as scripts of one folder do."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import search
        import search_data
        import search_report

        yield {"search": search, "data": search_data, "report": search_report}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("search", "search_data", "search_process", "search_report", "passages"):
            sys.modules.pop(name, None)


def unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def make(rng, documents, queries):
    """Documents of a few topics, one of them empty, and queries padded with rows of zeros."""
    topics = unit(rng.standard_normal((12, DIM)))
    lengths = rng.integers(1, 14, documents)
    lengths[7] = 0
    topic = np.repeat(rng.integers(0, 12, documents), lengths)
    values = unit(topics[topic] + 0.4 * rng.standard_normal((lengths.sum(), DIM)))
    asked = unit(topics[rng.integers(0, 12, (queries, 8))] + 0.3 * rng.standard_normal(DIM))
    asked[np.arange(8) >= rng.integers(2, 9, queries)[:, None]] = 0
    return values.astype(np.float16), lengths, asked.astype(np.float32)


def brute_force(values, lengths, query, k):
    documents = np.split(values.astype(np.float32), np.cumsum(lengths)[:-1])
    scores = [(d @ query.T).max(0).sum() if len(d) else -np.inf for d in documents]
    return np.argsort(-np.array(scores), kind="stable")[:k]


@pytest.mark.slow
def test_command(tmp_path):
    values, lengths, queries = make(np.random.default_rng(0), 300, 16)
    cache, output = tmp_path / "cache", tmp_path / "results" / "search.tiny"
    cache.mkdir()
    np.savez(cache / "chunk0000.npz", values=values, lengths=lengths)
    np.save(cache / "queries.npy", queries)
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "search.py"), str(cache), "--passages", "300"]
        + ["--queries", "16", "--k", "5", "--batches", "8", "--rounds", "1", "--seconds", "0.1"]
        + ["--defaults-only", "--output", str(output)]
        + ["--without", "fast-plaid,colbert-ai,xtr-warp,tachiom,lancedb,qdrant"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(Path(f"{output}.json").read_text())
    assert str(tmp_path) not in json.dumps(results)
    assert results["about"]["missing"]["fast-plaid"] == "left out"
    (run,) = results["runs"]
    assert (run["passages"], run["tokens"]) == (300, lengths.sum())
    rows = {row["system"]: row for row in run["searches"]}
    ours = rows["colbert-jax"]
    assert 0.2 < ours["overlap"] <= 1  # a random answer has 5 in 300
    assert set(ours["batches"]) == {"1", "8"}
    assert all(t["queries"] >= 16 and t["queries_per_second"] > 0 for t in ours["batches"].values())
    index_bytes = {b["system"]: b["bytes_per_token"] for b in run["builds"]}
    assert index_bytes["colbert-jax"] > DIM / 2
    report = Path(f"{output}.md").read_text()
    assert report in done.stdout
    assert Path(f"{output}.png").read_bytes()[:4] == b"\x89PNG"
    # What stays in the cache: the data and the exact answers, which are right.
    (exact,) = cache.glob("exact_300_16_*.npy")
    assert {file.name for file in cache.iterdir()} == {"chunk0000.npz", "queries.npy", exact.name}
    if importlib.util.find_spec("torch"):
        assert rows["torch"]["overlap"] == 1
        assert index_bytes["torch"] > 2 * DIM
        assert "### The fastest of colbert-jax at no less overlap" in report
    else:
        assert results["about"]["missing"]["torch"] == "not installed"


def test_exact_answers(benchmark, monkeypatch):
    data = benchmark["data"]
    monkeypatch.setattr(data, "_TOKENS", 50)  # several blocks
    values, lengths, queries = make(np.random.default_rng(1), 90, 6)
    values[lengths[:3].sum() :][: lengths[3]] = values[0]  # document 3: copies of one token
    rows = [query[query.any(axis=1)] for query in queries]
    found = data.exact_answers(values, lengths, rows, depth=20)
    np.testing.assert_array_equal(found, [brute_force(values, lengths, q, 20) for q in rows])
    assert data.exact_answers(values, lengths, rows, depth=100).shape == (6, 89)  # one is empty


def test_prepare_keeps_token_ids_and_answers_of_each_depth(benchmark, tmp_path):
    values, lengths, queries = make(np.random.default_rng(4), 150, 3)
    np.savez(tmp_path / "chunk0000.npz", values=values, lengths=lengths)
    np.save(tmp_path / "queries.npy", queries)
    data = tmp_path / "data"
    data.mkdir()
    prepare = benchmark["data"].prepare
    first = prepare(tmp_path, 140, 3, data)[2]
    assert not (data / "token_ids.npy").exists()
    np.save(tmp_path / "token_ids0000.npy", np.arange(len(values)))
    deep = prepare(tmp_path, 140, 3, data, 130)[2]
    assert (first.shape, deep.shape) == ((3, 100), (3, 130))
    np.testing.assert_array_equal(deep[:, :100], first)
    assert len(np.load(data / "token_ids.npy")) == lengths[:140].sum() < len(values)


def test_a_batch_that_would_take_too_long_is_left_out(benchmark):
    class Answers:
        def ask(self, do, *, batch, calls, **_):
            return {"seconds": [0.01 * batch] * calls, "cpu_seconds": 0.01 * batch * calls}

    search = benchmark["search"]
    point = search.Point("peer", 10, {}, True, Answers(), True, query_seconds=0.01)
    args = argparse.Namespace(queries=64, rounds=1, seconds=0.1, longest_call=1.0)
    for batch in (1, 64, 1024):
        search.take_turns([point], batch, args)
    assert set(point.calls) == {1, 64}
    assert set(search.summary(point, [1, 64, 1024])["batches"]) == {"1", "64"}


def test_overlap(benchmark):
    overlap = benchmark["data"].overlap
    exact = np.array([[4, 2, 9, 1], [0, 1, 2, 3]])
    assert overlap([[2, 4, 1, 9], [3, 2, 1, 0]], exact, 4) == 1
    assert overlap([[2, 4, 1, 9], [3, 2, 1, 0]], exact, 2) == 0.5
    assert overlap([[4], []], exact, 4) == 1 / 8  # too few are misses


def test_spread(benchmark):
    lengths = list(range(100))
    order = benchmark["data"].spread(lengths)
    assert sorted(order) == lengths
    for n in (5, 16, 50):
        assert abs(np.mean(order[:n]) - 49.5) < 50 / n


def test_match(benchmark):
    def row(system, k, overlap, speed):
        times = {"queries_per_second": speed}
        return {"system": system, "k": k, "overlap": overlap, "batches": {"1": times}}

    peer, beyond = row("peer", 10, 0.95, 10), row("peer", 10, 0.99, 1)
    fast, right, slow = (row("us", 10, *v) for v in [(0.94, 99), (0.95, 50), (0.96, 40)])
    searches = [fast, slow, right, peer, beyond, row("us", 100, 1.0, 1000)]
    assert benchmark["report"].match(searches, "us", [1]) == [
        ("1", peer, right),
        ("1", beyond, slow),  # what comes nearest
    ]


def test_exponents(benchmark):
    runs = [
        {
            "passages": n,
            "builds": [{"system": "colbert-jax", "seconds": 3e-3 * n}],
            "searches": [
                {"system": "s", "k": 10, "batches": {"1": {"queries_per_second": 50 / n**0.5}}}
            ],
        }
        for n in (100, 300, 1000)
    ]
    found = {e["of"]: e["exponent"] for e in benchmark["search"].exponents(runs)}
    assert found == pytest.approx({"build": 1.0, "query, k=10, batch 1": 0.5})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--passages", "400"], "holds 300 passages, --passages 400"),
        (["--passages", "2000"], "chunk0001.npz is missing: fill"),
        (["--peer", "torch=no-such-python"], "no-such-python cannot run torch"),
        (["--peer", "faiss=python"], "tachiom, colbert-ai, lancedb, qdrant, torch"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_errors(benchmark, arguments, message, tmp_path, monkeypatch, capsys):
    values, lengths, queries = make(np.random.default_rng(2), 300, 4)
    np.savez(tmp_path / "chunk0000.npz", values=values, lengths=lengths)
    np.save(tmp_path / "queries.npy", queries)
    systems = set(benchmark["search"].ADAPTERS) - {"colbert-jax-other"}
    everything = ",".join(systems - ({"torch"} if "torch" in arguments[-1] else set()))
    command = ["search.py", str(tmp_path), "--without", everything, "--queries", "4", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as raised:
        benchmark["search"].main()
    assert message in f"{raised.value} {capsys.readouterr().err}"
