"""Training in simulators of others: evaluations, ends of runs, names, resumed runs."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from lightning.pytorch import Callback

from esper_lightning import PPO
from esper_lightning.envs import CartPole, Custom, Gymnasium
from esper_lightning.envs.base import EnvSpec
from esper_lightning.train import train_ppo_vectorized
from tests.envs.adapters.simulators import TorchFive
from tests.training.short_runs import SMALL, fit

COUNTER = Gymnasium(id="EsperCounter-v0", num_envs=4, kwargs={"length": 3})


class TestEvaluation:
    def test_each_environment_plays_several_episodes(self):
        _, trainer = fit(COUNTER, eval_episodes=10)
        assert trainer.callback_metrics["eval/episodes"] == 12
        assert trainer.callback_metrics["eval/episode_length_mean"] == 3

    def test_environments_are_made_once_for_all_evaluations(self, monkeypatch):
        seeds = []
        build = Gymnasium.build

        def counted(self, device, seed):
            seeds.append(seed)
            return build(self, device, seed)

        monkeypatch.setattr(Gymnasium, "build", counted)
        fit(COUNTER, iterations=6, eval_episodes=4)
        assert len(seeds) == 2  # of training, and of evaluations

    def test_every_evaluation_starts_alike(self):
        class Starts(Callback):
            def __init__(self):
                self.starts = []

            def on_validation_epoch_end(self, trainer, pl_module):
                env = pl_module.evaluation._env._env
                self.starts.append([each.unwrapped.first_start for each in env.envs])

        starts = Starts()
        fit(COUNTER, starts, iterations=6, eval_episodes=4)
        assert len(starts.starts) >= 3
        assert all(start == starts.starts[0] for start in starts.starts)


class TestASharedSimulator:
    def test_training_acts_on_what_the_simulator_shows_after_an_evaluation(self):
        made = TorchFive(4)
        seen = []

        class Look(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                acting = pl_module._learner._acting.obs["policy"]
                seen.append(torch.equal(acting, made.state))

        fit(Custom.of(made), Look(), eval_episodes=4)
        assert seen == [True] * 4

    def test_episodes_after_evaluations_differ(self):
        made, starts = TorchFive(4), []

        class Look(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                starts.append(pl_module._learner._acting.obs["policy"].clone())

        fit(Custom.of(made), Look(), iterations=6, eval_episodes=4)
        assert not torch.equal(starts[1], starts[2])

    def test_it_outlives_the_run(self):
        made = TorchFive(4)
        fit(Custom.of(made), eval_episodes=4)
        assert made.closed == 0


class TestTheEndOfARun:
    def test_environments_are_closed(self):
        model, _ = fit(COUNTER, eval_episodes=4)
        assert model._learner._env._env.closed
        assert model.evaluation._env is None

    def test_workers_end_with_a_run_that_dies(self):
        class Fault(Callback):
            def on_train_batch_end(self, *args):
                self.processes = list(args[1]._learner._env._env._processes)
                raise RuntimeError("boom")

        fault, env = Fault(), Gymnasium(id="EsperCounter-v0", num_envs=4, workers=2)
        with pytest.raises(RuntimeError, match="boom"):
            fit(env, fault)
        assert len(fault.processes) == 2
        assert not any(process.is_alive() for process in fault.processes)


class TestMetrics:
    def test_numbers_that_a_simulator_logs_are_in_the_history(self, tmp_path):
        history = train_ppo_vectorized(
            Custom.of(TorchFive(4)), iterations=3, ppo=SMALL, device="cpu", run_dir=str(tmp_path)
        )
        assert all(math.isfinite(row["env/Episode_hold"]) for row in history)

    def test_a_simulator_without_any_is_no_error(self):
        model, _ = fit(Custom.of(TorchFive(4, limit=1000)), iterations=1, eval_episodes=4)
        assert model.iteration == 1


class TestNames:
    def test_a_run_directory_has_the_name_of_the_task(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        train_ppo_vectorized(COUNTER, iterations=1, ppo=SMALL, device="cpu")
        assert (tmp_path / "runs" / "espercounter-v0").is_dir()


class TestResuming:
    def test_a_run_begins_new_episodes_and_may_have_other_workers(self, tmp_path, caplog):
        _, trainer = fit(COUNTER)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        env = Gymnasium(**{**vars(COUNTER), "workers": 2})
        model, _ = fit(env, iterations=6, ckpt_path=str(tmp_path / "run.ckpt"))
        assert model.iteration == 6
        assert "new episodes begin there" in caplog.text

    def test_another_task_is_refused(self, tmp_path):
        _, trainer = fit(COUNTER)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        env = Gymnasium(**{**vars(COUNTER), "id": "EsperMasked-v0"})
        with pytest.raises(ValueError, match=r"^PPO.env.id must be the checkpoint's"):
            fit(env, iterations=6, ckpt_path=str(tmp_path / "run.ckpt"))


def test_a_spec_whose_number_of_environments_is_derived_is_refused_in_a_line():
    @dataclass(frozen=True, kw_only=True)
    class Worlds(EnvSpec):
        worlds: int = 2
        num_envs: int = field(init=False, default=4)

        def spaces(self):
            return CartPole(num_envs=4).spaces()

        def build(self, device, seed):
            return CartPole(num_envs=4).build(device, seed)

    with pytest.raises(ValueError, match=r"^PPO.eval_episodes must equal env.num_envs = 4"):
        PPO(env=Worlds(), eval_episodes=8)
    assert PPO(env=Worlds()).evaluation.spec.num_envs == 4
