"""The progress bar shows the run, and is closed afterwards."""

import re

import pytest

from esper_lightning import PPO, PPOConfig, RunProgressBar
from esper_lightning.callbacks import progress
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
    monkeypatch.setattr("esper_lightning.training.module.publish", lambda *_: 1 / 0)
    trainer = make_trainer(callbacks=[RunProgressBar()], enable_progress_bar=True)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model)
    trainer.progress_bar_callback.teardown(trainer, model, "fit")
    assert trainer.progress_bar_callback._bar is None


@pytest.fixture
def bars(monkeypatch):
    """All bars that are made."""
    made = []

    class Kept(progress.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.begins, self.all = self.n, []
            made.append(self)

        def update(self, n=1):
            super().update(n)
            self.all.append(self.n)

    monkeypatch.setattr(progress, "tqdm", Kept)
    return made


def test_a_resumed_run_goes_on_where_it_was(make_trainer, bars):
    model = ppo(total_env_steps=512 * 4)
    model.progress.env_steps, model.progress.iteration = 512, 1  # as a checkpoint would have it
    fit(make_trainer, model)
    (bar,) = bars
    assert (bar.begins, bar.all) == (512, [1024, 1536, 2048])


def test_other_ranks_than_the_first_show_nothing(make_trainer, capfd, bars):
    callback = RunProgressBar()
    trainer = make_trainer(callbacks=[callback], enable_progress_bar=True)
    callback.disable()
    trainer.fit(ppo(total_env_steps=512 * 2))
    assert all(bar.disable for bar in bars)
    assert "env steps" not in capfd.readouterr().err
