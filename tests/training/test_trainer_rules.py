"""The planned end of a run, and the behaviour of Lightning that PPO switches off."""

import types
import warnings

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import DeviceStatsMonitor
from lightning.pytorch.loggers import CSVLogger

from esper_lightning import PPOConfig
from esper_lightning.envs import CartPole
from esper_lightning.training import trainer_rules
from esper_lightning.training.progress import Progress
from esper_lightning.training.settings import PPOSettings
from esper_lightning.training.trainer_rules import (
    keep_lightning_from_requeueing,
    planned_env_steps,
    refuse_trainer,
    silence_lightning,
)


def trainer(*, max_epochs=-1, max_steps=-1, epochs_done=0, steps_done=0, **others):
    """What is asked of a Trainer whose epochs have ten iterations."""
    processed = types.SimpleNamespace(processed=epochs_done)
    progress = types.SimpleNamespace(current=processed)
    return types.SimpleNamespace(
        max_epochs=max_epochs,
        max_steps=max_steps,
        global_step=steps_done,
        num_training_batches=10,
        fast_dev_run=False,
        fit_loop=types.SimpleNamespace(epoch_progress=progress),
        **others,
    )


def progress(budget, env_steps=0):
    """Progress of a run whose iterations have 100 environment steps on two ranks."""
    ppo = PPOConfig(rollout_steps=10, minibatches=1)
    progress = Progress(PPOSettings(env=CartPole(num_envs=5), ppo=ppo, total_env_steps=budget))
    progress.env_steps = env_steps
    return progress


@pytest.mark.parametrize(
    ("limits", "budget", "expected"),
    [
        ({}, None, None),
        ({}, 900, 900),
        ({"max_epochs": 2}, None, 2000),
        ({"max_steps": 7}, None, 700),
        ({"max_epochs": 2, "max_steps": 7}, None, 700),  # the first of two limits
        ({"max_epochs": 2, "max_steps": 70}, None, 2000),
        ({"max_epochs": 2}, 900, 900),
        ({"max_epochs": 2}, 5000, 2000),
    ],
    ids=str,
)
def test_the_first_limit_of_a_run_is_its_end(limits, budget, expected):
    assert planned_env_steps(trainer(**limits), progress(budget), ranks=2) == expected


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 30}], ids=str)
def test_a_resumed_run_ends_where_the_whole_one_does(limits):
    resumed = trainer(**limits, epochs_done=1, steps_done=10)
    assert planned_env_steps(resumed, progress(None, env_steps=1000), ranks=2) == 3000


@pytest.mark.parametrize(("budget", "said"), [(2000, False), (2001, True)])
def test_a_run_that_ends_before_its_budget_logs_a_warning(budget, said, caplog):
    planned_env_steps(trainer(max_epochs=2), progress(budget), ranks=2)
    assert ("before PPO.total_env_steps" in caplog.text) == said


@pytest.mark.parametrize("ranks", [1, 2])
def test_lightning_requeues_jobs_of_one_rank_and_no_others(ranks):
    environment = SLURMEnvironment(auto_requeue=True)
    connector = types.SimpleNamespace(cluster_environment=environment)
    keep_lightning_from_requeueing(trainer(world_size=ranks, _accelerator_connector=connector))
    assert environment.auto_requeue == (ranks == 1)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_devices_without_float64_are_refused_by_name(make_trainer, kind):
    given = make_trainer()
    given.strategy._root_device = torch.device(kind)
    rule = f"Trainer.accelerator must be one of cpu, cuda, got '{kind}'. PPO sums in float64"
    with pytest.raises(ValueError, match=rule):
        refuse_trainer(given, PPOSettings(env=CartPole(num_envs=4)))


@pytest.mark.parametrize(
    ("cpu_stats", "ok"), [(None, False), (True, False), (1, False), (False, True)]
)
def test_statistics_of_the_cpu_need_psutil(make_trainer, monkeypatch, tmp_path, cpu_stats, ok):
    monkeypatch.setattr(trainer_rules, "find_spec", lambda _: None)
    trainer = make_trainer(
        callbacks=[DeviceStatsMonitor(cpu_stats=cpu_stats)], logger=CSVLogger(tmp_path)
    )
    settings = PPOSettings(env=CartPole(num_envs=4), total_env_steps=64)
    if ok:
        trainer_rules.refuse_trainer(trainer, settings)
        return
    with pytest.raises(ValueError, match="cpu_stats must be False without psutil"):
        trainer_rules.refuse_trainer(trainer, settings)


def test_warnings_about_which_users_can_do_nothing_are_silenced():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silence_lightning()
        warnings.warn("Using ModelCheckpoint with manual optimization ...", stacklevel=1)
        text = "`isinstance(treespec, LeafSpec)` is deprecated"
        warnings.warn(text, FutureWarning, stacklevel=1)
