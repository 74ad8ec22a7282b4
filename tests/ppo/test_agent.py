"""An agent sees observations as its statistics have them, and computes with whatever weights."""

import torch

from esper_lightning import MLP, PPOConfig
from esper_lightning.core.running_stats import ObsNormalizer
from esper_lightning.core.types import Samples
from esper_lightning.envs import CartPole
from esper_lightning.ppo.agent import Agent, Weights, prepare_obs
from esper_lightning.ppo.optimizer import build_optimizer

SPACES = CartPole().spaces()
OBS = 3.0 + 2.0 * torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(1))


def make() -> Agent:
    policy = MLP(hidden_sizes=(8,)).build(SPACES, torch.Generator().manual_seed(0))
    normalizer = ObsNormalizer(SPACES.obs, clip=10.0)
    normalizer.update(OBS)
    agent = Agent(policy, normalizer)
    agent.bind(build_optimizer(policy, PPOConfig()))
    return agent


def test_acting_and_values_of_both_ends_see_normalised_observations() -> None:
    agent, (obs, reached) = make(), OBS.flatten(1, 2).view(2, 10, 4)
    seen = [prepare_obs(each, agent.normalizer) for each in (obs, reached)]
    assert seen[0].mean().abs() < 1
    noise = agent.policy.noise((10,), torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        agent.act(obs, None, noise, None).sampled, agent.policy.act(seen[0], None, noise)
    )
    values = agent.value(obs, reached, None, None)
    torch.testing.assert_close(values.obs, seen[0])
    torch.testing.assert_close(values.value, agent.policy.value(seen[0]))
    torch.testing.assert_close(values.next_value, agent.policy.value(seen[1]))


def test_other_weights_decide_and_the_agent_has_its_own_again_afterwards() -> None:
    agent, obs = make(), OBS[0]
    own = agent.value(obs, obs, None, None).value
    zeros = Weights(torch.zeros_like(agent.weights.parameters), agent.weights.buffers)
    values = agent.with_weights(zeros, agent.value, obs, obs, None, None)
    assert values.value.abs().max() == 0
    torch.testing.assert_close(agent.value(obs, obs, None, None).value, own, rtol=0, atol=0)


def test_gradients_reach_the_weights_that_are_given() -> None:
    agent = make()
    weight = agent.weights.parameters.clone().requires_grad_()
    batch = Samples(
        obs=OBS[0],
        action=torch.zeros(5, dtype=torch.int64),
        log_prob=torch.zeros(5),
        action_mask=None,
        advantage=torch.zeros(5),
        value=torch.zeros(5),
        value_target=torch.zeros(5),
    )
    given = Weights(weight, agent.weights.buffers)
    evaluation = agent.with_weights(given, agent.evaluate, batch)
    (gradient,) = torch.autograd.grad(evaluation.log_prob.sum(), weight)
    named = agent.named(gradient)
    assert list(named) == [name for name, _ in agent.policy.named_parameters()]
    assert named["actor.0.weight"].any()
    assert not named["value_head.weight"].any()
    assert all(parameter.grad is None for parameter in agent.policy.parameters())


def test_a_buffer_that_somebody_replaces_is_noticed_before_the_next_iteration() -> None:
    agent = make()
    agent.policy.register_buffer("scale", torch.ones(1))
    agent.refresh()
    new = torch.full((1,), 2.0)
    agent.policy.scale = new
    assert agent.weights.buffers["policy.scale"] is not new
    agent.refresh()
    assert agent.weights.buffers["policy.scale"] is new
