"""benchmarks/backbones.py on tiny widths: both libraries run and agree, and the tables are made."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(
        "backbones_benchmark", BENCHMARKS / "backbones.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    narrow = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    gte = module.PUBLISHED["gte-multilingual-base"] | narrow
    monkeypatch.setattr(module, "PUBLISHED", {"gte": gte})
    monkeypatch.setattr(module, "TEXTS", 2)
    monkeypatch.setattr(module, "TOKENS", 20)
    yield module
    sys.modules.pop("encode", None)  # another benchmark's module, found beside this one


def test_speed(benchmark_module):
    pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")
    pytest.importorskip("transformers")
    row = benchmark_module.speed("gte", layers=1, rounds=1)
    assert row["largest_difference"] < 1e-5
    assert (row["layers"], row["of_layers"]) == (1, 12)
    table = benchmark_module.report({"gte": row}, of_memory=False)
    assert table.splitlines()[2].startswith("| gte | 1 of 12 |")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read on Linux")
def test_memory(benchmark_module):
    row = benchmark_module.memory("gte", layers=1, tokens=40)
    assert 0 <= row["rise_mb"] < 1000 and row["tokens"] == 40
    table = benchmark_module.report({"gte": row}, of_memory=True)
    assert table.count("\n") == 2
