"""What ``--ckpt_path`` stands for: a file, or a later state that the ranks have stored."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from esper_lightning.cli import start_of_run
from esper_lightning.cli.start_of_run import find_start
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.training.checkpoint.content import STATE_KEY

SAVED = Path(__file__).parents[1] / "fixtures/runs/cartpole/checkpoints/last.ckpt"


@pytest.fixture
def layout(tmp_path, monkeypatch) -> RunLayout:
    """A run directory; Lightning finds its ``last.ckpt``, if there is one."""
    layout = RunLayout(tmp_path)
    layout.rank(0).directory.mkdir()

    def last(trainer: Trainer, name: str) -> str | None:
        return str(layout.last_checkpoint) if layout.last_checkpoint.exists() else None

    monkeypatch.setattr(start_of_run, "parse_checkpoint_path", last)
    return layout


def store(layout: RunLayout, *, later: int) -> int:
    """Store a state some iterations after ``last.ckpt``; returns its iteration."""
    checkpoint = torch.load(SAVED, weights_only=True)
    checkpoint[STATE_KEY]["iteration"] += later
    torch.save(checkpoint, layout.rank(0).states[0])
    return checkpoint[STATE_KEY]["iteration"]


def save(layout: RunLayout) -> None:
    layout.checkpoints.mkdir()
    shutil.copy(SAVED, layout.last_checkpoint)


@pytest.mark.parametrize("has_last", [True, False])
def test_a_later_state_is_what_a_run_resumes_from(layout, make_trainer, has_last):
    if has_last:
        save(layout)
    iteration = store(layout, later=3)
    start = find_start(make_trainer(), "last", layout.directory)
    assert start.checkpoint[STATE_KEY]["iteration"] == iteration
    assert start.said == f"Resuming after iteration {iteration}, the last one finished."
    assert not start.is_file
    assert not layout.joined_state.exists()  # until the run owns the directory
    start.write()
    written = torch.load(start.path, weights_only=True)
    assert (Path(start.path), written[STATE_KEY]["iteration"]) == (layout.joined_state, iteration)


def test_a_leading_tilde_in_a_config_is_the_home_folder(layout, make_trainer, monkeypatch):
    iteration = store(layout, later=3)
    monkeypatch.setenv("HOME", str(layout.directory.parent))
    start = find_start(make_trainer(), "last", f"~/{layout.directory.name}")
    assert start.checkpoint[STATE_KEY]["iteration"] == iteration
    assert start.path == str(layout.joined_state)


def test_a_checkpoint_that_is_as_late_is_preferred(layout, make_trainer):
    save(layout)
    store(layout, later=0)
    start = find_start(make_trainer(), "last", layout.directory)
    assert (start.path, start.is_file, start.said) == (str(layout.last_checkpoint), True, "")


@pytest.mark.parametrize("run_dir", [None, "s3://bucket/run"])
def test_only_a_directory_of_this_machine_has_states(layout, make_trainer, run_dir):
    store(layout, later=3)
    start = find_start(make_trainer(), "last", run_dir)
    assert start.checkpoint is None
    assert "a new run begins" in start.said


def test_a_path_stands_for_itself_and_nothing_for_a_new_run(layout, make_trainer):
    store(layout, later=3)
    assert find_start(make_trainer(), str(SAVED), layout.directory).path == str(SAVED)
    assert find_start(make_trainer(), None, layout.directory) == (None, None, True, "")
