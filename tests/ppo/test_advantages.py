"""The explained variance of the critic, where the true share is known."""

import pytest
import torch

from esper_lightning import PPOConfig
from esper_lightning.core.buffer import allocate_rollout
from esper_lightning.envs import CartPole
from esper_lightning.ppo.advantages import prepare_samples
from esper_lightning.ppo.agent import Values

STEPS, ENVS = 5, 4
MYOPIC = PPOConfig(discount=0.0, gae_lambda=0.0, normalize_advantage=False)


@pytest.mark.parametrize(
    ("share", "explained"), [(1.0, 1.0), (0.5, 0.75), (0.0, 0.0), (-1.0, -3.0)]
)
def test_a_critic_without_a_horizon_regresses_on_rewards(share, explained, generator):
    rollout = allocate_rollout(CartPole().spaces(), STEPS, ENVS, device=torch.device("cpu"))
    rollout.reward.normal_(generator=generator)
    rollout.terminated.fill_(False)
    rollout.truncated.fill_(False)
    reward, elsewhere = rollout.reward.flatten(), torch.randn(STEPS * ENVS, generator=generator)
    values = Values(rollout.obs.flatten(0, 1), share * reward, elsewhere)
    samples, found = prepare_samples(values, rollout, rollout.reward, MYOPIC)
    torch.testing.assert_close(samples.value_target, reward)
    torch.testing.assert_close(samples.advantage, (1.0 - share) * reward)
    assert torch.equal(samples.value, share * reward)
    assert found.item() == pytest.approx(explained, abs=1e-5)
