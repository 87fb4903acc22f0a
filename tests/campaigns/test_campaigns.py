"""Small campaigns; `python tests/campaigns/damaged_indexes.py --help` runs larger ones."""

import pytest
from campaigns import damaged_checkpoints, damaged_indexes, damaged_texts


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", [damaged_checkpoints, damaged_indexes, damaged_texts], ids=lambda m: m.__name__
)
def test_100_trials(module):
    results = list(module.CAMPAIGN.run(100, seed=25))
    assert len(results) == 100
    faults = [result for result in results if result["verdict"].startswith("fault")]
    assert not faults
    assert len({result["verdict"] for result in results}) > 1
