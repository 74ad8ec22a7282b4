"""The progress bar: what it shows, and that it is gone afterwards."""

import re

import pytest

from esper_lightning import PPO, PPOConfig, RunProgressBar
from esper_lightning.envs import CartPole


def ppo(**settings) -> PPO:
    config = PPOConfig(rollout_steps=8, minibatches=2, epochs=1)
    defaults = {"total_env_steps": 64 * 8 * 20}
    return PPO(CartPole(num_envs=64), ppo=config, **{**defaults, **settings})


def fit(make_trainer, model, **settings):
    trainer = make_trainer(callbacks=[RunProgressBar()], enable_progress_bar=True, **settings)
    trainer.fit(model)
    return trainer


def test_shows_return_rate_and_the_whole_run(make_trainer, capfd):
    fit(make_trainer, ppo())
    last = capfd.readouterr().err.split("\r")[-1]
    assert re.search(r"10\.2k/10\.2k \[.*env steps/s, return=\d+\.\d\]", last), last
    assert "100%" in last


def test_total_is_the_first_limit_of_the_run(make_trainer, capfd):
    fit(make_trainer, ppo(total_env_steps=None, iterations_per_epoch=3), max_epochs=2)
    assert "3.07k/3.07k" in capfd.readouterr().err


def test_closes_when_training_fails(make_trainer, monkeypatch):
    model = ppo()
    monkeypatch.setattr(model, "_report", lambda row: 1 / 0)
    trainer = make_trainer(callbacks=[RunProgressBar()], enable_progress_bar=True)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model)
    trainer.progress_bar_callback.teardown(trainer, model, "fit")
    assert trainer.progress_bar_callback._bar is None
