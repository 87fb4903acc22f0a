"""benchmarks/backbones.py on tiny widths: both libraries run and agree, and the tables are made."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from colbert_jax.checkpoints.common import set_path
from colbert_jax.models.colbert import make_encoder, param_shapes

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def published(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(
        "backbones_benchmark", BENCHMARKS / "backbones.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("encode", None)  # another benchmark's module, found beside this one


@pytest.fixture
def benchmark_module(published, monkeypatch):
    narrow = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    gte = published.PUBLISHED["gte-multilingual-base"] | narrow
    monkeypatch.setattr(published, "PUBLISHED", {"gte": gte})
    monkeypatch.setattr(published, "TEXTS", 2)
    monkeypatch.setattr(published, "TOKENS", 20)
    return published


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GTE-ModernColBERT-v1", "bge-m3", "LFM2-ColBERT-350M"])
def test_memory_of_8192_tokens(published, name):
    """What the compiled program takes beside weights and text, at published widths: attention that
    is local and rotary, full, causal."""
    encoder, params = published.encoder_of(published.fields_of(name, 2)), {}
    for path, shape in param_shapes(encoder).items():
        set_path(params, path, jax.ShapeDtypeStruct(shape, jnp.float32))
    shapes = [((1, 8192), jnp.int32), ((1,), jnp.int32), ((1, 8192), jnp.bool)]

    def encode(params, *batch):
        return make_encoder(encoder, params, dtype=jnp.float32)(*batch)

    batch = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    compiled = jax.jit(encode).lower(params, *batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.8e9
