"""The entries of a checkpoint, of which the first that does not fit is named."""

import pytest
import torch

from esper_lightning import PPO, PPOConfig
from esper_lightning.envs import CartPole
from esper_lightning.training.checkpoint.content import (
    STATE_KEY,
    find_misfit,
    refuse_not_ours,
    refuse_not_resumable,
    refuse_not_whole,
)


@pytest.mark.parametrize(("value", "shape", "misfit"), [
    (3, int, None),
    (-1, int, "x is no count"),
    (True, int, "x is no count"),
    ("a", str, None),
    (b"a", str, "x is a bytes"),
    ([1, 2], [int], None),
    ([1, "b"], [int], "x.1 is no count"),
    (3, [int], "x is no list"),
    ({"a": 1}, {"a": int}, None),
    ({}, {"a": int}, "x.a is missing"),
    ({"a": 1, "b": "c"}, {"a": int, "*": int}, "x.b is no count"),
    ({1: 2}, {"*": int}, "x is no dictionary by names"),
], ids=str)  # fmt: skip
def test_the_first_entry_that_does_not_fit_is_named(value, shape, misfit):
    assert find_misfit(value, shape, "x") == misfit


@pytest.fixture
def saved(make_trainer, tmp_path):
    ppo = PPOConfig(rollout_steps=4, minibatches=1)
    trainer = make_trainer(max_steps=1)
    trainer.fit(PPO(env=CartPole(num_envs=2), ppo=ppo))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    return torch.load(tmp_path / "x.ckpt", weights_only=True)


def test_a_checkpoint_that_was_saved_is_whole_and_one_without_an_entry_names_it(saved):
    refuse_not_ours(saved, "x.ckpt")
    refuse_not_whole(saved, "x.ckpt")
    refuse_not_resumable(saved, "x.ckpt")
    of_rank = saved[STATE_KEY]["ranks"][0]
    del of_rank["acting"]
    refuse_not_whole(saved, "x.ckpt")
    with pytest.raises(ValueError, match=rf"got 'x.ckpt'. {STATE_KEY}.ranks.0.acting is missing"):
        refuse_not_resumable(saved, "x.ckpt")
    del saved[STATE_KEY]["env_steps"]
    with pytest.raises(ValueError, match=rf"got 'x.ckpt'. {STATE_KEY}.env_steps is missing"):
        refuse_not_whole(saved, "x.ckpt")
    del saved[STATE_KEY]
    with pytest.raises(ValueError, match=r"^ckpt_path must name a checkpoint of PPO, got 'x.ckpt'"):
        refuse_not_ours(saved, "x.ckpt")
