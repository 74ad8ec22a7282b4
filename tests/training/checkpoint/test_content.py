"""The entries of a checkpoint, of which the first that does not fit is named."""

from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer as LightningTimer
from torch import Tensor, nn

from esper_lightning import PPO, PPOConfig
from esper_lightning.envs import CartPole
from esper_lightning.policies import Composed
from esper_lightning.ppo.extension import Extension, ExtensionSpec
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


class UsersTimer(Callback):
    """A callback of the user's, under a name of Lightning's."""

    restored = None
    state_key = "Timer"

    def state_dict(self):
        return {"time_elapsed": 1.5, "kept": [1, 2]}

    def load_state_dict(self, state_dict):
        self.restored = state_dict


class Counting(Extension):
    """An extension that saves a number beside its tensors."""

    calls = 3

    def losses(self, batch, kept, evaluate):
        return {"counting": evaluate(batch).value * 0.0}

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        self.calls = state


@dataclass(frozen=True)
class CountingSpec(ExtensionSpec):
    def build(self, spaces, generator):
        return Counting()


class Encoder(nn.Module):
    """An encoder that saves a dictionary beside its tensors."""

    features = 4

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), {"calls": 7, "seen": torch.ones(2)}

    def forward(self, obs: Tensor) -> Tensor:
        return self.linear(obs).tanh()

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        self.calls = state


def make_encoder(*args, **kwargs):
    return Encoder()


def test_a_healthy_run_with_states_of_the_users_own_is_resumed(make_trainer, tmp_path):
    def module():
        return PPO(
            env=CartPole(num_envs=2),
            ppo=PPOConfig(rollout_steps=4, minibatches=1),
            policy=Composed(encoder=f"{__name__}:make_encoder"),
            extensions=(CountingSpec(),),
        )

    path = tmp_path / "x.ckpt"
    trainer, saved = make_trainer(max_steps=1, callbacks=[UsersTimer()]), module()
    trainer.fit(saved)
    saved.extensions[0].calls = 8
    trainer.save_checkpoint(path)
    timer, resumed = UsersTimer(), module()
    again = make_trainer(max_steps=2, callbacks=[timer])
    again.fit(resumed, ckpt_path=path, weights_only=True)
    assert again.global_step == 2
    assert timer.restored == {"time_elapsed": 1.5, "kept": [1, 2]}
    assert resumed.extensions[0].calls == 8
    assert PPO.load_from_checkpoint(path).extensions[0].calls == 8


def test_the_state_of_a_callback_of_lightnings_is_checked(saved):
    timer = LightningTimer()
    saved["callbacks"][timer.state_key] = {"time_elapsed": 1.5}
    refuse_not_resumable(saved, "x.ckpt")
    with pytest.raises(ValueError, match=r"callbacks.Timer.time_elapsed is no dictionary"):
        refuse_not_resumable(saved, "x.ckpt", callbacks=[timer])


def test_a_checkpoint_that_the_trainer_or_a_module_loads_is_named_by_its_path(
    saved, make_trainer, tmp_path
):
    path = tmp_path / "damaged.ckpt"
    name = next(name for name in saved["state_dict"] if name.endswith("weight"))
    saved["state_dict"][name] = saved["state_dict"][name][:1]
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"got '.*/damaged.ckpt'. Its "):
        PPO.load_from_checkpoint(path)
    module = PPO(env=CartPole(num_envs=2), ppo=PPOConfig(rollout_steps=4, minibatches=1))
    with pytest.raises(ValueError, match=r"got '.*/damaged.ckpt'. Its "):
        make_trainer(max_steps=2).fit(module, ckpt_path=path, weights_only=True)
