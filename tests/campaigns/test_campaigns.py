"""Small campaigns; `python tests/campaigns/damaged_indexes.py --help` runs larger ones."""

import os

import pytest
import support
from campaigns import (
    damaged_checkpoints,
    damaged_indexes,
    damaged_texts,
    killed_changes,
    living_index,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, count",
    [(damaged_checkpoints, 100), (damaged_indexes, 15), (damaged_texts, 100)],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_trials(module, count):
    results = list(module.CAMPAIGN.run(count, seed=25))
    assert len(results) == count
    faults = [result for result in results if result["verdict"].startswith("fault")]
    assert not faults
    assert len({result["verdict"] for result in results}) > 1


@pytest.mark.slow
def test_30_sequences_of_changes():
    living_index.campaign(30, seed=26)


@pytest.mark.skipif(not os.environ.get("COLBERT_JAX_LONG"), reason=support.LONG)
def test_writers_that_are_killed_and_readers_beside_one():
    assert len(list(killed_changes.kills(4, seed=26, readers=1))) == 5
    assert len(list(killed_changes.changes(20, seed=26, readers=1))) >= 2
