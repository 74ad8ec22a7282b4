"""A run that is killed a few times and resumed ends as if nothing had happened."""

import pytest

from tests.crash.soak import Soak

pytestmark = pytest.mark.crash


@pytest.mark.timeout(300)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    soak = Soak(tmp_path, seed=1)
    soak.train_undisturbed()
    soak.one_run(kills=4)
    assert sum(soak.tally.kills.values()) >= 1
