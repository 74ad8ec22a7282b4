"""Training in simulators of others: evaluations, ends of runs, names, resumed runs."""

import math
from dataclasses import dataclass, field
from typing import Any

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


class TestMetrics:
    def test_numbers_that_a_simulator_logs_are_in_the_history(self, tmp_path):
        history = train_ppo_vectorized(
            Custom.of(TorchFive(4)), iterations=3, ppo=SMALL, device="cpu", run_dir=str(tmp_path)
        )
        assert all(math.isfinite(row["env/Episode_hold"]) for row in history)

    @pytest.mark.trap(3)
    def test_a_simulator_without_any_is_no_error(self):
        model, _ = fit(Custom.of(TorchFive(4, limit=1000)), iterations=1, eval_episodes=4)
        assert model.iteration == 1


class TestNames:
    def test_a_run_directory_has_the_name_of_the_task(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        train_ppo_vectorized(COUNTER, iterations=1, ppo=SMALL, device="cpu")
        assert (tmp_path / "runs" / "espercounter-v0").is_dir()


class FirstObs(Callback):
    """The observations with which a run begins."""

    seen: Any = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen = pl_module._learner._acting.obs.clone() if self.seen is None else self.seen


class TestResuming:
    def test_a_run_begins_new_episodes_and_may_have_other_workers(self, tmp_path, caplog):
        before, after = FirstObs(), FirstObs()
        _, trainer = fit(COUNTER, before)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        env = Gymnasium(**{**vars(COUNTER), "workers": 2})
        model, _ = fit(env, after, iterations=6, ckpt_path=str(tmp_path / "run.ckpt"))
        assert model.iteration == 6
        assert "new episodes begin there" in caplog.text
        assert not torch.equal(before.seen, after.seen)  # nor are they repeated

    def test_another_task_is_refused(self, tmp_path):
        _, trainer = fit(COUNTER)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        env = Gymnasium(**{**vars(COUNTER), "id": "EsperMasked-v0"})
        with pytest.raises(ValueError, match=r"^PPO.env.id must be the checkpoint's"):
            fit(env, iterations=6, ckpt_path=str(tmp_path / "run.ckpt"))


@pytest.mark.trap(2)
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
