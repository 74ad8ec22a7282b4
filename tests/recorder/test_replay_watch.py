"""The callback of a replay: where it ends, what it stores, and what it says of rows."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    LambdaCallback,
    ModelCheckpoint,
    ProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

from esper_lightning.callbacks.lightning_internals import TunerExit
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.recorder import replay_watch
from esper_lightning.recorder.replay_watch import ReplayWatch


@pytest.fixture
def dead(tmp_path):
    """Directory of a run that died in iteration 3."""
    history = RunLayout(tmp_path / "dead").rank(0).history
    history.parent.mkdir(parents=True)
    rows = ({"iteration": n, "loss/value": float(n)} for n in (1, 2))
    history.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path / "dead"


@pytest.fixture
def replay(tmp_path, monkeypatch):
    """A replay in its directory; returns its callback, its Trainer and a module."""
    directory = tmp_path / "replay"
    directory.mkdir()
    monkeypatch.setattr(replay_watch, "open_run_directory", lambda *_: directory)
    monkeypatch.setattr(replay_watch, "close_run_directory", lambda *_: None)
    monkeypatch.setattr(replay_watch, "dump_checkpoint", lambda _: {"state": 1})

    def begin(run_dir, *, bar=None, alone=True, **settings):
        watch, saved = ReplayWatch(str(run_dir), 3, **settings), []
        trainer = SimpleNamespace(
            checkpoint_callbacks=[ModelCheckpoint(dirpath=tmp_path / "users")],
            progress_bar_callback=bar,
            global_rank=0,
            is_global_zero=True,
            sanity_checking=False,
            callbacks=[],
            accumulate_grad_batches=1,
            lightning_module=SimpleNamespace(automatic_optimization=False),
            strategy=object.__new__(SingleDeviceStrategy if alone else FSDPStrategy),
            world_size=1,
            save_checkpoint=saved.append,
            saved=saved,
        )
        module = SimpleNamespace(
            counts_iterations=True, iteration=0, on_save_checkpoint=Callback().on_save_checkpoint
        )
        watch.setup(trainer, module, "fit")
        return watch, trainer, module

    return begin


def end_iteration(replay, number, row):
    watch, trainer, module = replay
    module.iteration = number
    history = RunLayout(watch.directory).rank(0).history
    history.parent.mkdir(exist_ok=True)
    with history.open("a") as file:
        file.write(f"{json.dumps(row)}\n")
    watch.on_train_batch_end(trainer, module, None, None, 0)


def test_a_replay_ends_before_the_iteration_that_follows_the_failing_one(replay, dead):
    watch, trainer, module = replay(dead)
    module.iteration = 2
    watch.on_train_batch_start(trainer, module, None, 0)
    module.iteration = 3
    with pytest.raises(TunerExit):
        watch.on_train_batch_start(trainer, module, None, 0)


def test_checkpoints_of_users_go_into_the_replay_and_the_state_before_the_fault_is_stored(
    replay, dead
):
    begun = replay(dead)
    watch, trainer, _ = begun
    layout = RunLayout(watch.directory)
    assert trainer.checkpoint_callbacks[0].dirpath == str(layout.checkpoints)
    end_iteration(begun, 1, {"iteration": 1, "loss/value": 1.0})
    assert not layout.before_fault.exists()
    end_iteration(begun, 2, {"iteration": 2, "loss/value": 2.0})
    assert torch.load(layout.before_fault) == {"state": 1}
    assert trainer.saved == []


def test_a_strategy_that_may_shard_the_weights_stores_the_state_itself(replay, dead):
    begun = replay(dead, alone=False)
    end_iteration(begun, 2, {"iteration": 2, "loss/value": 2.0})
    watch, trainer, _ = begun
    assert trainer.saved == [RunLayout(watch.directory).before_fault]


class SavesByItself(Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        raise AssertionError("the run saves nothing here")


class CannotBeSaved(Callback):
    def state_dict(self):
        raise ValueError("cannot be saved")


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (SavesByItself(), "on_save_checkpoint of SavesByItself may do anything"),
        (LambdaCallback(on_save_checkpoint=SavesByItself()), "of LambdaCallback may do anything"),
        (CannotBeSaved(), "ValueError: cannot be saved"),
    ],
)
def test_what_is_no_checkpoint_of_the_run_calls_no_hook_and_ends_nothing(
    replay, dead, caplog, monkeypatch, callback, says
):
    def dump(trainer):
        return [each.state_dict() for each in trainer.callbacks]

    monkeypatch.setattr(replay_watch, "dump_checkpoint", dump)
    begun = replay(dead)
    watch, trainer, module = begun
    trainer.callbacks.append(callback)
    end_iteration(begun, 2, {"iteration": 2, "loss/value": 2.0})
    watch.on_train_epoch_end(trainer, module)
    assert not RunLayout(watch.directory).before_fault.exists()
    (record,) = caplog.records
    assert record.getMessage().startswith("before.ckpt is not written: ")
    assert record.getMessage().endswith(f"{says}.")


def test_a_replay_that_starts_right_before_the_fault_copies_its_start(replay, dead, tmp_path):
    (tmp_path / "state.ckpt").write_bytes(b"state")
    watch, *_ = replay(dead, begins=2, start=str(tmp_path / "state.ckpt"))
    assert RunLayout(watch.directory).before_fault.read_bytes() == b"state"


def test_a_progress_bar_of_the_run_shows_nothing(replay, dead):
    bar = TQDMProgressBar()
    replay(dead, bar=bar)
    assert bar.is_disabled
    replay(dead, bar=ProgressBar())  # which cannot be told to


def test_the_first_row_that_differs_is_one_warning(replay, dead, caplog):
    begun = replay(dead)
    end_iteration(begun, 1, {"iteration": 1, "loss/value": 1.0})
    assert caplog.text == ""
    end_iteration(begun, 2, {"iteration": 2, "loss/value": 2.5})
    end_iteration(begun, 3, {"iteration": 3, "loss/value": 9.0})
    (record,) = caplog.records
    assert record.getMessage() == "Different from iteration 2 on: loss/value 2.0 -> 2.5"


@pytest.mark.parametrize("number", ["null", '"2"', "[1]", "1e999", "true", "{}"])
def test_damaged_rows_of_the_dead_run_are_compared_with_nothing(replay, dead, caplog, number):
    with RunLayout(dead).rank(0).history.open("a") as file:
        file.write(f'{{"iteration": {number}, "loss/value": 7.0}}\n')
    begun = replay(dead)
    end_iteration(begun, 1, {"iteration": 1, "loss/value": 1.0})
    end_iteration(begun, 2, {"iteration": 2, "loss/value": 2.0})
    assert caplog.text == ""


def test_a_history_that_is_no_file_is_compared_with_nothing(replay, dead):
    history = RunLayout(dead).rank(0).history
    history.unlink()
    history.mkdir()
    end_iteration(replay(dead), 1, {"iteration": 1, "loss/value": 1.0})


def test_anomalies_are_looked_for_in_the_failing_iteration_alone(replay, dead):
    watch, trainer, module = replay(dead, finds_anomalies=True)
    watch.on_train_batch_start(trainer, module, None, 0)
    assert not torch.is_anomaly_enabled()
    module.iteration = 2
    watch.on_train_batch_start(trainer, module, None, 0)
    assert torch.is_anomaly_enabled()
    watch.teardown(trainer, module, "fit")
    assert not torch.is_anomaly_enabled()
