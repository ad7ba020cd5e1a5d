"""Kill a recipe's processes at random moments: the result is that of an unbroken run."""

import pytest
from stress.kills import kill_repeatedly

pytestmark = pytest.mark.stress


@pytest.mark.multiprocess
def test_a_recipe_killed_at_random_moments_equals_an_unbroken_run(tiny_inputs, tmp_path):
    kill_repeatedly(tiny_inputs, tmp_path / "runs", num_rounds=4, seed=11)
