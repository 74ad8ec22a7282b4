"""What ``--ckpt_path`` stands for: a file, or a later state that the ranks have stored."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from esper_lightning.callbacks.checkpoints import LastCheckpoint
from esper_lightning.callbacks.history import History
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.checkpoint.start import find_start, resumed_directory

SAVED = Path(__file__).parents[2] / "fixtures/runs/cartpole/checkpoints/last.ckpt"


@pytest.fixture
def layout(tmp_path) -> RunLayout:
    layout = RunLayout(tmp_path)
    layout.rank(0).directory.mkdir()
    return layout


@pytest.fixture
def trainer(make_trainer):
    return make_trainer(enable_checkpointing=True, callbacks=[LastCheckpoint()])


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
def test_a_later_state_is_what_a_run_resumes_from(layout, trainer, has_last):
    if has_last:
        save(layout)
    iteration = store(layout, later=3)
    start = find_start(trainer, "last", layout.directory)
    assert start.checkpoint[STATE_KEY]["iteration"] == iteration
    assert start.said == f"Resuming after iteration {iteration}, the latest one stored."
    assert not start.is_file
    assert not layout.joined_state.exists()  # until the run owns the directory
    start.write()
    written = torch.load(start.path, weights_only=True)
    assert (Path(start.path), written[STATE_KEY]["iteration"]) == (layout.joined_state, iteration)


class Unbegun(Logger):
    """A logger that begins a run of its service when it is asked for its version."""

    name, experiment = "service", None
    begun = 0

    @property
    def version(self):
        self.begun += 1
        return str(self.begun)

    def log_metrics(self, *args, **kwargs):
        raise NotImplementedError

    log_hyperparams = log_metrics


@pytest.mark.parametrize("callback", [LastCheckpoint, partial(ModelCheckpoint, save_last=True)])
@pytest.mark.parametrize("is_new", [True, False])
def test_no_logger_is_asked(layout, make_trainer, callback, is_new):
    save(layout)
    logger = Unbegun()
    trainer = make_trainer(logger=logger, enable_checkpointing=True, callbacks=[callback()])
    start = find_start(trainer, "last", None if is_new else layout.directory)
    assert start.path == (None if is_new else str(layout.last_checkpoint))
    assert logger.begun == 0
    assert trainer.checkpoint_callback.dirpath is None


def test_a_torn_state_is_said(layout, trainer):
    layout.rank(0).states[0].write_bytes(b"PK")
    start = find_start(trainer, "last", layout.directory)
    assert start.checkpoint is None
    assert start.said.startswith("No checkpoint to resume from: a new run begins. The states in ")


def test_a_checkpoint_of_the_run_that_is_older_than_its_states_is_said(layout, trainer):
    save(layout)
    iteration = store(layout, later=3)
    start = find_start(trainer, layout.last_checkpoint, layout.directory)
    assert start.path == str(layout.last_checkpoint)
    assert start.said == (
        f"Resuming after iteration {iteration - 3}. "
        f"ckpt_path 'last' would resume after iteration {iteration}."
    )


class TestTheDirectoryThatLastStandsFor:
    def test_it_is_the_newest_with_a_checkpoint_or_a_state(self, tmp_path, trainer):
        for number, leave in enumerate((save, save, partial(store, later=1), None)):
            layout = RunLayout(tmp_path / "runs" / f"version_{number}")
            layout.rank(0).directory.mkdir(parents=True)
            if leave is not None:
                leave(layout)
        newest = tmp_path / "runs" / "version_2"
        assert resumed_directory(trainer, tmp_path / "runs") == newest
        RunLayout(newest).rank(0).states[0].write_bytes(b"PK")
        assert resumed_directory(trainer, tmp_path / "runs") == newest.with_name("version_1")
        assert resumed_directory(trainer, tmp_path / "none") is None

    def test_a_logger_with_a_folder_for_each_run_has_it(self, tmp_path, make_trainer):
        logger = CSVLogger(tmp_path, name="csv")
        layout = RunLayout(tmp_path / "csv" / "version_4")
        layout.directory.mkdir(parents=True)
        save(layout)
        trainer = make_trainer(logger=logger)
        assert resumed_directory(trainer, tmp_path / "runs") == layout.directory

    def test_one_that_a_callback_was_given_is_it(self, tmp_path, make_trainer):
        trainer = make_trainer(callbacks=[History(tmp_path / "mine")])
        assert resumed_directory(trainer, tmp_path / "runs") == tmp_path / "mine"


def test_a_leading_tilde_in_a_config_is_the_home_folder(layout, trainer, monkeypatch):
    iteration = store(layout, later=3)
    monkeypatch.setenv("HOME", str(layout.directory.parent))
    start = find_start(trainer, "last", f"~/{layout.directory.name}")
    assert start.checkpoint[STATE_KEY]["iteration"] == iteration
    assert start.path == str(layout.joined_state)


def test_a_checkpoint_that_is_as_late_is_preferred(layout, trainer):
    save(layout)
    store(layout, later=0)
    start = find_start(trainer, "last", layout.directory)
    assert (start.path, start.is_file, start.said) == (str(layout.last_checkpoint), True, "")


@pytest.mark.parametrize("run_dir", [None, "s3://bucket/run"])
def test_only_a_directory_of_this_machine_has_states(layout, trainer, run_dir):
    store(layout, later=3)
    start = find_start(trainer, "last", run_dir)
    assert start.checkpoint is None
    assert "a new run begins" in start.said


def test_a_path_stands_for_itself_and_nothing_for_a_new_run(layout, trainer):
    store(layout, later=3)
    assert find_start(trainer, str(SAVED), layout.directory).path == str(SAVED)
    assert find_start(trainer, None, layout.directory) == (None, None, True, "")
