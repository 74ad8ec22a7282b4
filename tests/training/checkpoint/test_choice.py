"""The checkpoint that a run uses, and the runs that may use a checkpoint."""

import re

import pytest

from esper_lightning import MLP, PPO, PPOConfig
from esper_lightning.envs import CartPole, FrameStack
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.checkpoint.states import checkpoint_at, refuse_foreign
from esper_lightning.training.settings import PPOSettings

CONFIG = PPOConfig(rollout_steps=8, minibatches=2)


def model(**settings) -> PPO:
    return PPO(**{"env": CartPole(num_envs=4), "ppo": CONFIG, **settings})


def checkpoint(of: PPO, world_size=1) -> dict:
    return {
        "hyper_parameters": of.settings.to_data(),
        "state_dict": of.state_dict(),
        STATE_KEY: {"world_size": world_size},
    }


def test_a_run_directory_stands_for_its_best_checkpoint_and_else_for_its_last(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with pytest.raises(ValueError, match="ckpt_path must name a checkpoint, or a run directory"):
        checkpoint_at(tmp_path)
    (folder / "last.ckpt").touch()
    assert checkpoint_at(tmp_path) == folder / "last.ckpt"
    (folder / "best.ckpt").touch()
    assert checkpoint_at(tmp_path) == folder / "best.ckpt"
    assert checkpoint_at(folder / "last.ckpt") == folder / "last.ckpt"


def test_training_is_resumed_with_the_same_ranks_and_environments_and_evaluation_with_any():
    saved, other = checkpoint(model(), world_size=2), model(env=CartPole(num_envs=8))
    refuse_foreign(saved, model().settings, world_size=2)
    rule = "Trainer.devices * Trainer.num_nodes must be 2 (or set PPO.redeal)"
    with pytest.raises(ValueError, match="^" + re.escape(f"{rule}, got 1.")):
        refuse_foreign(saved, model().settings, world_size=1)
    with pytest.raises(ValueError, match=r"^PPO\.env\.num_envs must be the checkpoint's, 4, got 8"):
        refuse_foreign(saved, other.settings, world_size=2)
    refuse_foreign(saved, other.settings, world_size=None)


def test_a_setting_that_the_writer_did_not_have_has_its_default():
    stacked = FrameStack(env=CartPole(num_envs=4, time_limit=500), frames=2)
    saved = checkpoint(model(env=stacked))
    env = saved["hyper_parameters"]["env"]["init_args"]
    del (
        env["env"]["init_args"]["time_limit"],
        saved["hyper_parameters"]["policy"]["init_args"]["trunk"],
    )
    refuse_foreign(saved, model(env=stacked).settings, world_size=1)
    other = FrameStack(env=CartPole(num_envs=4, time_limit=9), frames=2)
    with pytest.raises(ValueError, match=r"^PPO\.env\.env must be the checkpoint's"):
        refuse_foreign(saved, model(env=other).settings, world_size=1)
    other = model(env=stacked, policy=MLP(trunk="shared"))
    with pytest.raises(ValueError, match=r"^PPO\.policy\.trunk must be the checkpoint's"):
        refuse_foreign(saved, other.settings, world_size=1)


def test_a_spec_that_is_given_is_not_rebuilt():
    saved = model().settings.to_data()
    saved["env"]["class_path"] = "nowhere.Gone"
    with pytest.raises(ValueError, match=r"env must be a spec that nowhere\.Gone builds"):
        PPOSettings.from_data(saved)
    given = PPOSettings.from_data(saved, env=CartPole(num_envs=9), ppo=PPOConfig(epochs=7))
    assert (given.env.num_envs, given.ppo.epochs) == (9, 7)
