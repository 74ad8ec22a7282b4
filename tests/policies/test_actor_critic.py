"""An actor-critic is its encoders and heads, one after the other."""

from typing import Literal

import pytest
import torch

from esper_lightning.core.spaces import Box, Discrete
from esper_lightning.policies.actor_critic import ActorCritic, build_actor_critic
from esper_lightning.policies.encoders import FlatEncoder

M = 5


def make(space, *, shares: bool = False) -> ActorCritic:
    generator = torch.Generator().manual_seed(0)
    actor, critic = (
        FlatEncoder(Box((3,)), None, (4,), activation="tanh", generator=generator) for _ in range(2)
    )
    bounds: Literal["clip", "tanh"] = "clip"
    return build_actor_critic(
        actor, actor if shares else critic, space,
        owner="Mine", action_bounds=bounds, initial_std=1.0, generator=generator,
    )  # fmt: skip


def test_probabilities_of_all_actions_sum_to_1_and_give_entropy_and_the_best_action() -> None:
    policy, obs = make(Discrete(3)), torch.randn(M, 3)
    action = torch.tensor([0, 1, 2, 1, 0])
    found = policy.evaluate(obs, action, None)
    every = torch.stack(
        [policy.evaluate(obs, torch.full((M,), k), None).log_prob for k in range(3)], 1
    )
    torch.testing.assert_close(every.exp().sum(1), torch.ones(M))
    torch.testing.assert_close(found.log_prob, every[torch.arange(M), action])
    torch.testing.assert_close(found.entropy, -(every.exp() * every).sum(1))
    assert torch.equal(policy.act_deterministically(obs, None), every.argmax(1))
    torch.testing.assert_close(found.value, policy.value(obs))


@pytest.mark.parametrize("shares", [False, True])
def test_the_value_moves_the_actors_encoder_only_where_the_critic_shares_it(
    shares,
) -> None:
    policy, obs = make(Discrete(2), shares=shares), torch.randn(M, 3)
    policy.evaluate(obs, torch.zeros(M, dtype=torch.int64), None).value.sum().backward()
    moved = any(weight.grad is not None for weight in policy.actor.parameters())
    assert moved == shares


def test_actions_are_sampled_by_the_noise_alone_and_come_with_their_log_probability() -> None:
    policy, obs = make(Box((2,), -1.0, 1.0)), torch.randn(M, 3)
    noise = policy.noise((M,), torch.Generator().manual_seed(1))
    one, two = policy.act(obs, None, noise), policy.act(obs, None, noise)
    assert torch.equal(one.action, two.action)
    found = policy.evaluate(obs, one.action, None)
    torch.testing.assert_close(found.log_prob, one.log_prob)
    assert policy.to_env(10.0 * one.action).abs().max() <= 1.0
