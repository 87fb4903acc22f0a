"""benchmarks/lifecycle.py as its README runs it, on a tiny cache, and what its tables say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import unit_rows

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
DIM = 16
TINY = ["--count", "3", "--rounds", "1", "--adds", "4", "--growth", "100", "--queries", "8"]


@pytest.fixture(scope="module")
def benchmark():
    """The modules of the command, which import each other as scripts of one folder do."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import lifecycle
        import lifecycle_report

        yield {"lifecycle": lifecycle, "report": lifecycle_report}
    finally:
        sys.path.remove(str(BENCHMARKS))
        names = ("lifecycle", "lifecycle_report", "search", "search_data", "search_process")
        for name in (*names, "search_report", "passages"):
            sys.modules.pop(name, None)


@pytest.fixture
def cache(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cache"
    folder.mkdir()
    lengths = rng.integers(1, 14, 120)
    values = unit_rows(rng, lengths.sum(), DIM).astype(np.float16)
    np.savez(folder / "chunk0000.npz", values=values, lengths=lengths)
    np.save(folder / "queries.npy", unit_rows(rng, 8 * 6, DIM).reshape(8, 6, DIM))
    return folder


@pytest.mark.slow
def test_command(cache, tmp_path):
    output = tmp_path / "results" / "lifecycle.tiny"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "lifecycle.py"), str(cache), "--sizes", "60,110"]
        + [*TINY, "--repeat", "--output", str(output)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(Path(f"{output}.json").read_text())
    assert str(tmp_path) not in json.dumps(results)
    assert [size["real"] for size in results["sizes"].values()] == [72, 120]
    found = results["sizes"]["110"]
    assert found["builds"]["colbert-jax"]["seconds"] > 0
    assert all(row["seconds"] > 0 for row in found["changes"]["colbert-jax"].values())
    assert found["search"]["documents"] == 98  # of 122, a fifth is deleted
    assert set(found["search"]["searches"]["changed"]) == {"1", "64"}
    assert found["filters"]["num_results"] == {"1 %": 2, "50 %": 60, "99 %": 109}
    assert set(found["filters"]["overlap_exact"]) == set(found["filters"]["select"])
    rows = results["growth"]["rows"]
    assert [row["adds"] for row in rows] == [0, 9, 90]
    assert all(0.1 < row["overlap_exact"] <= 1 for row in rows)
    report = Path(f"{output}.md").read_text()
    assert report in done.stdout
    for title in ("Bars", "Changes of 3", "Searching after 4 adds", "Filters", "Overlap@10"):
        assert f"## {title}" in report
    # What stays in the cache: the data and the exact answers.
    (exact,) = cache.glob("exact_100_8_*.npy")
    assert {file.name for file in cache.iterdir()} == {"chunk0000.npz", "queries.npy", exact.name}


def test_repeated(benchmark):
    lifecycle = benchmark["lifecycle"]
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 30, 40)
    values = unit_rows(rng, lengths.sum(), DIM).astype(np.float16)
    documents = lifecycle.DocumentEmbeddings.from_lengths(values, lengths)
    more = lifecycle.repeated(documents, 100)
    np.testing.assert_array_equal(more.lengths, np.resize(lengths, 100))
    np.testing.assert_array_equal(more.values[: len(values)], values)
    again = more.values[len(values) : 2 * len(values)].astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(again, axis=1), 1, atol=2e-3)
    cosines = (again * values).sum(axis=1)
    assert 0.9 < cosines.mean() < 0.99


def test_bars(benchmark):
    def times(seconds):
        return {"seconds": seconds, "cpu_seconds": seconds}

    ours = {"add": times(0.5), "delete": times(0.06), "update": times(1)}
    theirs = {name: times(9) | {"ratio": times(9 / of["seconds"])} for name, of in ours.items()}
    size = {
        "builds": {"us": times(100)},
        "changes": {"us": ours, "fast-plaid": theirs},
        "search": {"searches": {"changed": {"1": {"ratio": times(1.2)}}}},
        "filters": {"searches": {"1 %": {"1": {"ratio": times(0.4)}}}},
    }
    growth = {"rows": [{"adds": a, "overlap_accurate": o} for a, o in [(0, 0.9), (9, 0.895)]]}
    results = {"about": {"count": 100}, "sizes": {"60000": size}, "growth": growth}
    rows = benchmark["report"].bars(results, "us")
    assert [row[4] for row in rows] == [True, True, False, False, True, True]
    assert rows[0][2] == "0.50 %" and rows[1][2] == "18.0x" and rows[2][2] == "60.0 ms"


def test_sizes_without_peers_are_named(benchmark):
    one = {"seconds": 1.0, "cpu_seconds": 1.0}
    ours = {name: one for name in ("add", "delete", "update")}
    built = one | {"grown": False}
    sizes = {
        "100": {
            "builds": {"us": built, "them": built},
            "changes": {"us": ours, "them": {n: one | {"ratio": one} for n in ours}},
        },
        "2000": {"builds": {"us": built}, "changes": {"us": ours}},
    }
    assert "No peer was measured at 2,000." in benchmark["report"]._changes(sizes, "us")
    del sizes["100"]
    assert not any("No peer" in line for line in benchmark["report"]._changes(sizes, "us"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "115"], "holds 120 passages, 127 wanted"),
        (["--sizes", "12"], "at least 18 are changed"),
        (["--peer", "torch=python"], "with NAME fast-plaid or xtr-warp"),
        (["--sizes", "60", "--peer", "xtr-warp=no-such-python"], "no-such-python cannot run"),
        (["--collection", "cranfield"], "--collection needs --checkpoint"),
        (["--parts", "changes,all"], "changes,all: not of changes,search"),
    ],
)
def test_errors(benchmark, arguments, message, cache, monkeypatch, capsys):
    command = ["lifecycle.py", str(cache), "--sizes", "60", *TINY, *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as raised:
        benchmark["lifecycle"].main()
    assert message in f"{raised.value} {capsys.readouterr().err}"
