"""PPO on a CUDA device: no host synchronisation in the hot path, and the same learning."""

import pytest
import torch

from esper_lightning import MLP, PPO, PPOConfig
from esper_lightning.envs import CartPole, Pendulum
from esper_lightning.training import module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("env", "policy"),
    [
        (CartPole(num_envs=64), MLP()),
        (Pendulum(num_envs=64, time_limit=20), MLP(action_bounds="tanh")),
    ],
    ids=["discrete", "continuous"],
)
def test_nothing_synchronises_before_the_one_copy(make_trainer, monkeypatch, env, policy):
    def forbid_synchronising(name):
        function = getattr(module, name)

        def guarded(*args, **kwargs):
            if model.iteration == 0:  # allocations of the first iteration may synchronise
                return function(*args, **kwargs)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(module, name, guarded)

    for name in ("collect", "is_finite", "scale_reward", "prepare_samples", "update"):
        forbid_synchronising(name)
    ppo = PPOConfig(
        rollout_steps=16, target_kl=0.02, normalize_obs=True, normalize_reward=True, value_clip=0.2
    )
    model = PPO(env, policy, ppo, total_env_steps=64 * 16 * 4)
    make_trainer(accelerator="gpu", devices=1).fit(model)
    assert model.iteration == 4


def test_learns(make_trainer):
    ppo = PPOConfig(rollout_steps=32, learning_rate=1e-3)
    model = PPO(CartPole(num_envs=32), ppo=ppo, total_env_steps=60_000)
    trainer = make_trainer(accelerator="gpu", devices=1)
    trainer.fit(model)
    assert trainer.callback_metrics["rollout/episode_return_mean"] > 100
