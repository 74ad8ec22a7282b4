"""The commands of ``esper`` as methods of a Trainer."""

import json

import pytest

from esper_lightning import PPO, PPOConfig
from esper_lightning.cli import trainer as module
from esper_lightning.cli.trainer import EsperTrainer
from esper_lightning.envs import CartPole


@pytest.fixture
def trainer(tmp_path):
    return EsperTrainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        default_root_dir=tmp_path,
    )


def model(seed=0):
    ppo = PPOConfig(rollout_steps=4, minibatches=1, epochs=1)
    return PPO(CartPole(num_envs=2), ppo=ppo, eval_episodes=2, compile="off", seed=seed)


def test_an_evaluation_is_of_the_weights_in_the_checkpoint(trainer, tmp_path):
    trained, fresh, path = model(), model(seed=1), tmp_path / "x.ckpt"
    trainer.fit(trained, run_dir="not used")
    trainer.save_checkpoint(path)
    trainer.evaluate(fresh, str(path))
    for name, value in trained.policy.state_dict().items():
        assert value.equal(fresh.policy.state_dict()[name])
    assert trainer.callback_metrics["eval/episodes"] == 2


@pytest.mark.parametrize("given", [None, 3, [3, 4]])
def test_a_measurement_is_printed_and_written(trainer, tmp_path, monkeypatch, capsys, given):
    asked = {}
    monkeypatch.setattr(module, "measure_speed", lambda _, **how: asked.update(how))
    monkeypatch.setattr(module, "speed_table", lambda *_: "a table")
    monkeypatch.setattr(module, "speed_as_data", lambda *_: {"speed": 1})
    trainer.bench(model(), num_envs=given, seconds=0.5, output=tmp_path / "speed.json")
    assert asked == {"accelerator": "cpu", "num_envs": given, "seconds": 0.5}
    assert capsys.readouterr().out == "a table\n"
    assert json.loads((tmp_path / "speed.json").read_text()) == {"speed": 1}
