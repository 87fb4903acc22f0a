"""A small campaign; `python tests/campaigns/living_index.py --help` runs larger ones."""

import pytest
from campaigns.living_index import campaign


@pytest.mark.slow
def test_30_sequences_of_changes():
    campaign(30, seed=26)
