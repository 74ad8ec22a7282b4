"""The states that ranks have stored are joined at the latest iteration that all of them have."""

import os

import pytest
import torch

from esper_lightning.forensics.layout import RunLayout
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.checkpoint.kept import has_data_order, latest_state


@pytest.fixture
def ranks(tmp_path):
    """The directory of two ranks, of which one died an iteration after the other."""
    layout = RunLayout(tmp_path)
    for rank, iterations in ((0, (6, 7)), (1, (7, 8))):
        files = layout.rank(rank)
        files.directory.mkdir()
        for path, iteration in zip(files.states, iterations, strict=True):
            state = {"iteration": iteration, "world_size": 2, "ranks": {rank: {"env": iteration}}}
            torch.save({STATE_KEY: state}, path)
    return layout


def test_ranks_are_joined_at_the_latest_iteration_that_all_have(ranks):
    found = latest_state(ranks.directory)
    assert found.iteration == 7
    assert found.checkpoint[STATE_KEY]["ranks"] == {0: {"env": 7}, 1: {"env": 7}}


def test_ranks_of_hosts_that_share_no_disk_are_joined(ranks, tmp_path):
    there = RunLayout(tmp_path / "there").rank(1).directory
    there.parent.mkdir()
    ranks.rank(1).directory.rename(there)
    assert latest_state(tmp_path) is None
    assert latest_state(tmp_path, tmp_path / "there").iteration == 7


def test_there_is_no_state_before_the_earliest_that_all_have(ranks):
    assert latest_state(ranks.directory, before=7) is None


def test_without_the_states_of_a_rank_there_is_none(ranks):
    for path in ranks.rank(1).states:
        path.unlink()
    assert latest_state(ranks.directory) is None
    assert latest_state(ranks.directory / "elsewhere") is None


@pytest.mark.parametrize(("own", "latest"), [((), 5), ((4,), 5), ((6, 7), 7)])
def test_a_run_killed_before_its_first_state_goes_on_from_that_which_it_was_resumed_from(
    tmp_path, own, latest
):
    layout, files = RunLayout(tmp_path), RunLayout(tmp_path).rank(0)
    files.directory.mkdir()
    layout.checkpoints.mkdir()
    for path, iteration in zip((layout.joined_state, *files.states), (5, *own), strict=False):
        state = {"iteration": iteration, "world_size": 1, "ranks": {0: {"env": iteration}}}
        torch.save({STATE_KEY: state}, path)
    found = latest_state(tmp_path)
    assert found.iteration == latest
    assert found.checkpoint[STATE_KEY]["ranks"] == {0: {"env": latest}}
    assert latest_state(tmp_path, before=4) is None


WRONG = {
    "an iteration": {"iteration": "7"},
    "no iteration": {"iteration": None},
    "iterations": {"iteration": [7]},
    "ranks": {"ranks": [7]},
    "a rank": {"ranks": {0: 5}},
    "no environments": {"ranks": {0: {}}},
    "the size": {"world_size": "1"},
}


@pytest.mark.parametrize("name", [*WRONG, "all"])
def test_what_no_run_has_written_is_not_used(tmp_path, caplog, name):
    files = RunLayout(tmp_path).rank(0)
    files.directory.mkdir()
    state = {"iteration": 7, "world_size": 1, "ranks": {0: {"env": 1}}}
    torch.save({STATE_KEY: {**state, "iteration": 6}}, files.states[0])
    torch.save({STATE_KEY: [7] if name == "all" else state | WRONG[name]}, files.states[1])
    assert latest_state(tmp_path).iteration == 6
    assert [str(files.states[1]) in r.getMessage() for r in caplog.records] == [True]


def test_a_state_of_more_ranks_than_there_are_is_not_used(tmp_path):
    files = RunLayout(tmp_path).rank(0)
    files.directory.mkdir()
    state = {"iteration": 7, "world_size": 10**17, "ranks": {0: {"env": 1}}}
    torch.save({STATE_KEY: state}, files.states[0])
    assert latest_state(tmp_path) is None


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_what_a_kill_tears_is_not_used(tmp_path, share):
    files = RunLayout(tmp_path).rank(0)
    files.directory.mkdir()
    for path, iteration in zip(files.states, (4, 5), strict=True):
        # Lightning counts batches and steps of optimizers.
        batches = {"epoch_loop.batch_progress": {"total": {"processed": iteration}}}
        content = {"global_step": 99, "loops": {"fit_loop": batches}}
        torch.save({**content, "state_dict": {"w": torch.ones(999)}}, path)
    assert latest_state(tmp_path).iteration == 5
    os.truncate(files.states[1], int(share * files.states[1].stat().st_size))
    assert latest_state(tmp_path).iteration == 4


@pytest.mark.parametrize(
    ("is_last", "loaders", "begins_anew", "has"),
    [
        (True, [], True, True),
        (True, [], False, False),
        (False, [], True, False),
        (False, [{"seen": 3}], False, True),
    ],
)
def test_the_order_of_data_is_had_at_the_end_of_an_epoch_or_from_the_state_of_a_loader(
    is_last, loaders, begins_anew, has
):
    progress = {"is_last_batch": is_last}
    loop = {"epoch_loop.batch_progress": progress, "state_dict": {"combined_loader": loaders}}
    checkpoint = {"loops": {"fit_loop": loop}}
    assert has_data_order(checkpoint, begins_anew=begins_anew) is has
    assert has_data_order({STATE_KEY: {}, **checkpoint}, begins_anew=begins_anew)  # of PPO
