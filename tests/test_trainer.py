"""``esper_lightning.Trainer`` is Lightning's with the defaults of ``esper fit``."""

import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from esper_lightning import PPO, FlightRecorder, History, PPOConfig, Trainer
from esper_lightning.cli.main import main
from esper_lightning.cli.replay import _settings
from esper_lightning.comparison.runs import read_run
from esper_lightning.envs import CartPole
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.replaying import plan_replay

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model(**kwargs) -> PPO:
    small = {"ppo": PPOConfig(rollout_steps=8, minibatches=1, epochs=1), "compile": "off"}
    env = kwargs.pop("env", CartPole(num_envs=4, time_limit=16))
    return PPO(env, **{"total_env_steps": 96, "eval_episodes": 2, **small, **kwargs})


def test_a_run_has_all_that_esper_fit_leaves(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(**QUIET).fit(model())
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("CartPole: mean return")
    assert lines[1].startswith("Trained for 96 env steps")
    assert lines[2] == "Run directory: runs/cartpole/version_0"
    assert err == ""
    run = read_run(tmp_path / "runs" / "cartpole" / "version_0")
    assert (run.ended, run.env_steps, run.budget) == ("finished", 96, 96)
    layout = RunLayout(run.directory)
    assert layout.best_checkpoint.is_file()
    assert layout.last_checkpoint.is_file()
    assert len(read_json_lines(layout.rank(0).history)) == 3


class DiesIn(Callback):
    def __init__(self, iteration):
        self.iteration = iteration

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.iteration == self.iteration:
            raise RuntimeError("injected")


@pytest.mark.parametrize("logger", [True, False])
@pytest.mark.parametrize("run_dir", ["mine", None])
def test_last_resumes_from_the_states_of_a_run_without_a_checkpoint(run_dir, logger, capsys):
    how = {**QUIET, "run_dir": run_dir, "logger": logger}
    callbacks = [FlightRecorder(watch=False, keeps_state=True), DiesIn(2)]
    with pytest.raises(RuntimeError, match="injected"):
        Trainer(callbacks=callbacks, **how).fit(model())
    layout = RunLayout(Path(run_dir or "runs/cartpole/version_0"))
    assert layout.rank(0).states[0].exists()
    assert not layout.last_checkpoint.exists()
    Trainer(**how).fit(model(), ckpt_path="last")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Resuming after iteration 2, the latest one stored."
    assert said[-1] == f"Run directory: {layout.directory}"
    rows = read_json_lines(layout.rank(0).history)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert not layout.rank(0).history.with_name("history.jsonl.1").exists()


def test_last_without_a_checkpoint_begins_and_says_so(capsys):
    Trainer(run_dir="mine", **QUIET).fit(model(), ckpt_path="last")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "No checkpoint to resume from: a new run begins."


def test_a_checkpoint_that_does_not_fit_is_refused_before_the_run_begins():
    Trainer(run_dir="mine", **QUIET).fit(model())
    before = sorted((path, path.stat().st_mtime_ns) for path in Path("mine").rglob("*"))
    with pytest.raises(ValueError, match=r"PPO.env must be the checkpoint's"):
        Trainer(run_dir="mine", **QUIET).fit(model(env=CartPole(num_envs=2)), ckpt_path="last")
    assert before == sorted((path, path.stat().st_mtime_ns) for path in Path("mine").rglob("*"))


def test_a_command_replays_no_run_with_callbacks_of_the_program(tmp_path, capsys):
    class Dies(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("injected")

    for callbacks in ([FlightRecorder(watch=False), Dies()], [FlightRecorder(watch=False)]):
        run_dir = tmp_path / f"run{len(callbacks)}"
        broken = model()
        broken.on_train_batch_end = Dies().on_train_batch_end
        with pytest.raises(RuntimeError, match="injected"):
            Trainer(callbacks=callbacks, run_dir=run_dir, **QUIET).fit(broken)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["replay", "run2"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "got Dies. Call esper_lightning.replaying.replay(trainer, model, run_dir)." in err
    settings = _settings(plan_replay(tmp_path / "run1"), tmp_path / "run1", tmp_path / "again")
    assert settings["model"]["seed"] == 0


def test_the_config_of_a_run_holds_every_setting_of_the_trainer_that_is_plain(tmp_path):
    given = {"max_steps": 2, "precision": "32-true", "gradient_clip_val": None, "devices": 1}
    plugins, logger = [LightningEnvironment()], CSVLogger(tmp_path / "csv")
    more = {"run_dir": tmp_path / "run", "default_root_dir": tmp_path}
    Trainer(**QUIET, **given, plugins=plugins, logger=logger, **more).fit(model())
    text = RunLayout(tmp_path / "run").config.read_text()
    first, _, settings = text.partition("\n")
    assert first == "# A program started this run, with objects of its own: Trainer.plugins"
    assert yaml.safe_load(settings)["trainer"] == {
        **QUIET,
        "max_steps": 2,
        "precision": "32-true",
        "devices": 1,
    }


def test_the_latest_run_is_resumed(tmp_path, capsys):
    Trainer(max_steps=2, **QUIET).fit(model())
    Trainer(**QUIET).fit(model(), ckpt_path="last")
    layout = RunLayout(tmp_path / "runs" / "cartpole" / "version_0")
    rows = read_json_lines(layout.rank(0).history)
    assert [row["env_steps"] for row in rows] == [32, 64, 96]
    assert [path.name for path in layout.directory.parent.iterdir()] == ["version_0"]


def test_a_run_that_dies_leaves_its_evidence(tmp_path, capsys):
    class Broken(PPO):
        def on_train_batch_end(self, *args):
            raise RuntimeError("broken")

    broken = Broken(CartPole(num_envs=4), ppo=PPOConfig(rollout_steps=8, minibatches=1))
    with pytest.raises(RuntimeError, match="broken"):
        Trainer(run_dir="mine", **QUIET).fit(broken)
    assert RunLayout(tmp_path / "mine").rank(0).crash.is_file()


def test_callbacks_and_loggers_of_the_user_replace_those_of_a_run(tmp_path):
    recorder, history = FlightRecorder(), History()
    logger = CSVLogger(tmp_path, name="logs")
    trainer = Trainer(callbacks=[recorder, history], logger=logger, **QUIET)
    assert [each for each in trainer.callbacks if isinstance(each, FlightRecorder)] == [recorder]
    assert [each for each in trainer.callbacks if isinstance(each, History)] == [history]
    trainer.fit(model())
    assert trainer.loggers == [logger]


def test_fast_dev_run_leaves_nothing(tmp_path):
    Trainer(fast_dev_run=True, **QUIET).fit(model())
    assert list(tmp_path.iterdir()) == []


def test_any_module_can_be_trained(tmp_path):
    module: LightningModule = BoringModel()
    before = module.layer.weight.clone()
    Trainer(
        max_steps=3, logger=False, limit_val_batches=0, enable_checkpointing=False, **QUIET
    ).fit(module)
    assert not torch.equal(before, module.layer.weight)


def test_an_empty_directory_is_refused():
    with pytest.raises(ValueError, match=r"Trainer.run_dir must name a directory, got ''"):
        Trainer(run_dir="")


def test_tests_may_train_on_the_cpu_of_a_machine_that_has_a_gpu(make_trainer, monkeypatch):
    """Lightning warns of a GPU that is not used, and warnings are errors in the tests."""
    monkeypatch.setattr(CUDAAccelerator, "is_available", lambda: True)
    make_trainer(accelerator="cpu")
