"""A run that is killed a few times, or two hundred times, and resumed ends as if undisturbed."""

import pytest

from tests.crash.soak import MOMENTS, Soak

pytestmark = pytest.mark.crash


@pytest.mark.timeout(300)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    soak = Soak(tmp_path, seed=1)
    soak.train_undisturbed()
    soak.one_run(kills=4)
    assert sum(soak.tally.kills.values()) >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_after_two_hundred_kills_no_finished_iteration_is_lost(tmp_path):
    soak = Soak(tmp_path, seed=2)
    soak.train_undisturbed()
    while sum(soak.tally.kills.values()) < 200:
        soak.one_run(keeps_state=True, kills=40)
    print(soak.tally)
    assert soak.tally.moments.keys() == MOMENTS.keys()
    assert set(soak.tally.repeated) <= {0, 1}
