"""Simulators of others, as their packages are: they keep the contract, and PPO trains in them.

The packages are those of the extra ``dev``. ``make worlds`` does the same for larger ones.
"""

import math

import pytest
import torch
from lightning.pytorch import Trainer

from esper_lightning import MLP, PPO, PPOConfig, check_env
from esper_lightning.envs import Custom, Gymnasium

SMALL = PPOConfig(rollout_steps=16, minibatches=2, epochs=1, normalize_obs=True)
VMAS = {"make": "tests.envs.adapters.factories:make_vmas", "shared": False}
WORLDS = {
    "CartPole-v1": Gymnasium(id="CartPole-v1", num_envs=4, kwargs={"max_episode_steps": 9}),
    "LunarLander-v3": Gymnasium(id="LunarLander-v3", num_envs=4, kwargs={"max_episode_steps": 9}),
    "Hopper-v5": Gymnasium(id="Hopper-v5", num_envs=4, kwargs={"max_episode_steps": 9}),
    "VMAS, simple": Custom(**VMAS, num_envs=4, kwargs={"scenario": "simple"}),
    "VMAS, navigation": Custom(**VMAS, num_envs=6, kwargs={"scenario": "navigation", "agents": 3}),
}


@pytest.mark.parametrize("world", WORLDS)
def test_the_contract_is_kept(world):
    check_env(WORLDS[world], steps=15)


@pytest.mark.parametrize("two_flags", [False, True])
def test_the_time_limit_of_vmas_is_no_failure(two_flags):
    kwargs = {"scenario": "simple", "max_steps": 3, "continuous_actions": True}
    more = {"terminated_truncated": True} if two_flags else {}
    spec = Custom(make="vmas:make_env", num_envs=2, kwargs={**kwargs, **more}, shared=False)
    env = spec.build(torch.device("cpu"), 0)
    env.reset()
    results = [env.step(torch.zeros(2, 2)) for _ in range(3)]
    assert [r.truncated.tolist() for r in results] == [[False] * 2, [False] * 2, [True] * 2]
    assert not any(r.terminated.any() for r in results)


@pytest.mark.parametrize("world", WORLDS)
def test_ppo_trains(world):
    model = PPO(env=WORLDS[world], policy=MLP(hidden_sizes=(8,)), ppo=SMALL)
    Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(model)
    assert model.iteration == 2
    assert model.env_steps == 2 * 16 * WORLDS[world].num_envs
    assert all(math.isfinite(weight.abs().sum()) for weight in model.state_dict().values())
