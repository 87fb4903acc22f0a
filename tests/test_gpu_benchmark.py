"""benchmarks/gpu.sh: its stages and limits, and what needs no GPU of them."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(FOLDER))
    try:
        import gpu
    finally:
        sys.path.remove(str(FOLDER))
    return gpu


def test_every_stage_runs_in_less_than_twelve_minutes(gpu):
    lines = re.findall(r"^([\w-]+) (\d+)$", (FOLDER / "gpu.sh").read_text(), re.M)
    assert [stage for stage, _ in lines] == list(gpu.STAGES)
    assert sum(int(seconds) + 1 for _, seconds in lines) <= 720


def test_checkpoint_is_a_bert(gpu, tmp_path):
    from colbert_jax import ColBERT

    model = ColBERT.from_pretrained(gpu.checkpoint(gpu.SIZES["toy"], tmp_path), dim=16)
    backbone = model.encoder_config.backbone
    assert (backbone.num_hidden_layers, backbone.hidden_size) == (1, 32)
    assert model.tokenizer.documents(["who wrote the book"]).attended.tolist() == [6]


def test_the_kernel_is_left_out_unless_it_agreed(gpu, tmp_path):
    assert "left_out" in gpu.fused(gpu.SIZES["toy"], tmp_path)
    (tmp_path / "kernel.json").write_text('{"agrees": false}')
    assert "left_out" in gpu.fused(gpu.SIZES["toy"], tmp_path)


def test_overlap(gpu):
    assert gpu.overlap([[1, 2], [3, 4]], np.array([[2, 1], [4, 5]])) == 0.75
