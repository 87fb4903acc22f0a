"""benchmarks/training_quality.py as its docstring runs it, on a tiny collection."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import support

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """The module of the command, which imports others as scripts of one folder do."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import training_quality

        yield training_quality
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("training_quality", "quality", "encode"):
            sys.modules.pop(name, None)


def write_collection(folder, texts, queries, qrels):
    folder.mkdir(parents=True)
    for file, lines in (
        ("collection.tsv", [f"p{n}\t{text}" for n, text in enumerate(texts)]),
        ("queries.tsv", [f"q{n}\t{text}" for n, text in enumerate(queries)]),
        ("qrels.tsv", [f"q{n}\t0\tp{pid}\t1" for n, pid in qrels]),
    ):
        (folder / file).write_text("\n".join(lines) + "\n")


@pytest.fixture
def data(tmp_path):
    """Passages as their own queries, the last of these without a judgement."""
    texts = support.passages(24)
    write_collection(tmp_path / "data" / "tiny", texts, texts[:7], [(n, n) for n in range(6)])
    return tmp_path / "data"


def rows(file):
    return json.loads(file.read_text())["rows"]


def test_tokens(benchmark, data, tmp_path, stanford_folder, capsys):
    file, cache = tmp_path / "out" / "results.json", tmp_path / "cache"
    call = [str(data), "--collections", "tiny", "--results", str(file), "--queries", "4"]
    call += ["--tokens", str(stanford_folder), "--cache", str(cache), "--set", "doc_maxlen=24"]
    benchmark.main([*call, "--row", "raw"])
    (values,) = cache.rglob("values.npy")
    made = values.stat().st_mtime_ns
    benchmark.main([*call, "--row", "index", "--nbits", "2", "--markdown"])
    assert values.stat().st_mtime_ns == made  # encoded once
    found = rows(file)
    assert list(found) == ["raw", "index, exact", "index, PLAID"]
    raw, exact, plaid = (found[name]["collections"]["tiny"] for name in found)
    lengths = np.load(values.with_name("lengths.npy"))
    assert raw["tokens"] == exact["tokens"] == lengths.sum() and lengths.max() <= 24
    assert raw["bytes"] == 2 * 16 * lengths.sum()
    (index,) = cache.rglob("2bit.index")
    assert exact["bytes"] == plaid["bytes"] == sum(f.stat().st_size for f in index.iterdir())
    assert raw["MRR@10"] == exact["MRR@10"] == plaid["MRR@10"] == 1  # a passage finds itself
    assert json.loads(file.read_text())["collections"] == {
        "tiny": {"documents": 24, "queries": 4, "judged": 6}
    }
    assert str(tmp_path) not in file.read_text()
    assert "DATA --collections tiny" in found["raw"]["command"]
    printed = capsys.readouterr().out
    assert "| raw | 1.0000 | 1.0000 |" in printed and "4 queries of 6" in printed
    # Other queries do not belong into the same table, and nothing is measured for it.
    with pytest.raises(SystemExit, match="give the same"):
        benchmark.main([*call, "--row", "more", "--queries", "5"])
    assert list(rows(file)) == list(found)


def test_ranking_without_padding(benchmark):
    """Every query gets its own row back; no batch keeps columns that none of its queries has."""
    lengths = np.random.default_rng(0).integers(1, 60, 70)
    queries = np.zeros((70, 64, 3), np.float32)
    queries[:, :, 0] = np.arange(64) < lengths[:, None]
    widths = []

    def search(batch):
        widths.append(batch.shape[1])
        ids = batch.sum(axis=(1, 2)).astype(np.int32)[:, None]
        return benchmark.Hits(ids, ids.astype(np.float32))

    found = benchmark.ranked(search, queries)
    assert np.concatenate(found).tolist() == lengths.tolist()
    ordered = np.sort(lengths)
    longest = [ordered[i : i + 32].max() for i in range(0, 70, 32)]
    assert all(n <= width < n + 16 for n, width in zip(longest, widths, strict=True))


def test_single_vector(benchmark, data, tmp_path, plain_folder):
    file = tmp_path / "results.json"
    call = [str(data), "--collections", "tiny", "--results", str(file), "--row", "vector"]
    benchmark.main([*call, "--single-vector", str(plain_folder), "--set", "maxlen=32"])
    (row,) = rows(file).values()
    assert row["collections"]["tiny"]["MRR@10"] == 1
    assert row["collections"]["tiny"]["bytes"] == 24 * 32 * 2
    with pytest.raises(SystemExit, match="maxlen only"):
        benchmark.main([*call, "--single-vector", str(plain_folder), "--set", "doc_maxlen=32"])


def test_bm25(benchmark):
    """Against the formula; stop words and endings do not count."""
    pytest.importorskip("bm25s")
    pytest.importorskip("Stemmer")
    documents = [["cat", "run"], ["cat", "cat", "dog", "fish"], ["dog"], ["bird", "fish", "cat"]]
    collection = benchmark.Collection(
        key="tiny",
        pids=["a", "b", "c", "d"],
        texts=["The cats running", "a cat, cats, dogs and the fish", "dogs", "bird fish of a cat"],
        queries={"q": "running dogs and cats"},
        qrels={"q": {"a": 1}},
        judged=1,
    )
    mean = np.mean([len(d) for d in documents])

    def score(document):
        total = 0.0
        for word in ("run", "dog", "cat"):
            df, tf = sum(word in d for d in documents), document.count(word)
            idf = math.log(1 + (4 - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + 1.2 * (0.25 + 0.75 * len(document) / mean))
        return total

    expected = np.argsort([-score(d) for d in documents], kind="stable")
    (answer,) = benchmark.bm25(collection).values()
    assert answer.found[0].tolist() == expected.tolist()
    missing = dataclasses.replace(collection, queries={"q": "birds"})
    assert benchmark.bm25(missing)[""].found[0].tolist() == [3]


def test_evenly_spaced(benchmark):
    assert benchmark.evenly_spaced(3, 5) == [0, 1, 2]
    assert benchmark.evenly_spaced(10, 4) == [0, 2, 5, 7]
    many = benchmark.evenly_spaced(10_570, 2000)
    assert len(set(many)) == 2000 and max(np.diff(many)) - min(np.diff(many)) == 1


def test_table(benchmark):
    """Average and sums of a complete row; none of a row that lacks a collection."""
    counts = {"documents": 9, "queries": 3, "judged": 3}

    def part(value, size, tokens):
        return {"nDCG@10": value, "bytes": size, "tokens": tokens}

    results = {
        "collections": {"one": counts, "two": counts},
        "rows": {
            "tokens": {
                "note": "wide",
                "collections": {"one": part(0.5, 3e6, 1e5), "two": part(0.25, 1e6, 3e5)},
            },
            "vector": {"note": "narrow", "collections": {"one": part(0.5, 1e6, None)}},
        },
    }
    lines = benchmark.markdown(results).splitlines()
    assert "| tokens | 0.5000 | 0.2500 | 0.3750 | 4.0 | 10.0 |" in lines
    assert "| vector | 0.5000 | - | - | - | - |" in lines
    assert "- tokens: wide" in lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--row", "x"], "give --bm25"),
        (["--bm25"], "needs DATA and --row"),
        (["--bm25", "--row", "x", "--nbits", "2"], "belong to --tokens"),
        (["--bm25", "--row", "x", "--collections", "tiny,absent"], "absent/collection.tsv"),
        (["--tokens", "c", "--row", "x", "--set", "doc_maxlen"], "expected name=value"),
    ],
)
def test_bad_arguments(benchmark, data, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        benchmark.main([str(data), "--results", str(tmp_path / "r.json"), *words])
    assert message in capsys.readouterr().err.replace("\n", " ")
