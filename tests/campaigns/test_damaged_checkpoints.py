"""A small campaign; `python tests/campaigns/damaged_checkpoints.py --help` runs larger ones."""

import pytest
from campaigns.damaged_checkpoints import campaign


@pytest.mark.slow
def test_100_damaged_checkpoints():
    results = list(campaign(100, seed=25))
    assert len(results) == 100
    faults = [result for result in results if result["verdict"].startswith("fault")]
    assert not faults
    assert len({result["verdict"] for result in results}) > 1
