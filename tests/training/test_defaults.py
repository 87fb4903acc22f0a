"""Settings that are not given follow from the loss, the examples and the steps."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from colbert_jax import ColBERT
from colbert_jax.config import LOSSES, TrainingConfig
from colbert_jax.data.examples import pair_examples
from colbert_jax.settings import make
from colbert_jax.training.recipes import CONTRASTIVE, FIRST, LAST, PAIRWISE
from colbert_jax.training.step import schedule
from colbert_jax.training.trainer import train


@pytest.mark.usefixtures("one_length")
def test_contrast_on_pairs_starts(shallow_folder, tmp_path):
    """With no more than its loss, and how long it takes."""
    rows = [{"query": f"heat {i}", "positive": f"metals of {i} rivers"} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ColBERT.from_pretrained(shallow_folder, dtype="float32", devices=jax.devices()[:1])
    config = TrainingConfig(loss="contrastive", maxsteps=3, bsize=8)
    source = pair_examples(tmp_path / "p.jsonl")
    assert train(model, source, tmp_path / "run", config, devices=jax.devices()[:1]).step == 3
    # What was decided is part of what the run is.
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["training"]
    assert (kept["nway"], kept["use_ib_negatives"], kept["warmup"]) == (1, False, 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_of_a_loss(loss):
    config = TrainingConfig(loss=loss)
    assert config.nway is None and config.in_batch == (loss != "contrastive")
    assert not TrainingConfig(loss=loss, use_ib_negatives=False).in_batch
    # A task, or a stage, with another loss than the run's.
    assert not dataclasses.replace(config, loss="contrastive").in_batch


@pytest.mark.parametrize(
    ("warmup", "maxsteps", "steps"),
    [(0.05, 400_000, 20_000), (0.05, 100, 5), (0.05, 1, 0), (0, 9, 0), (1, 9, 1), (9, 9, 9)],
)
def test_warmup(warmup, maxsteps, steps):
    """A share of the steps, or their number."""
    config = TrainingConfig(warmup=warmup, maxsteps=maxsteps)
    same = TrainingConfig(warmup=steps, maxsteps=maxsteps)
    assert config.warmup_steps == same.warmup_steps == steps
    assert type(config.warmup_steps) is int
    at = np.arange(0, maxsteps + 1, max(maxsteps // 8, 1))
    np.testing.assert_array_equal(schedule(config, 1e-5)(at), schedule(same, 1e-5)(at))
    assert TrainingConfig(warmup=None).warmup_steps is None


def test_warmup_that_cannot_be():
    with pytest.raises(
        ValueError, match=r"warmup 200 is longer than maxsteps 100: lower it too, o"
    ):
        TrainingConfig(warmup=200, maxsteps=100)
    with pytest.raises(ValueError, match=r"a share of maxsteps below 1, got 2\.5"):
        TrainingConfig(warmup=2.5)
    with pytest.raises(ValueError, match="warmup must be >= 0"):
        TrainingConfig(warmup=-0.1)
    assert make(TrainingConfig, {"warmup": 2e4}) == TrainingConfig(warmup=20_000)


def test_the_papers_values():
    """By whichever way they are written."""
    decided = [(c.nway, c.in_batch, c.warmup_steps) for c in (PAIRWISE, CONTRASTIVE, FIRST, LAST)]
    assert decided == [
        (2, False, None),
        (None, False, 0),
        (32, True, 20_000),
        (64, True, 20_000),
    ]
    config = TrainingConfig()  # of ColBERTv2, on 64-way examples
    assert (config.warmup_steps, config.maxsteps, config.in_batch) == (20_000, 400_000, True)
