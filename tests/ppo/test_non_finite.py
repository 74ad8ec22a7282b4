"""Where a gradient is not finite, or too large, the minibatch and the tensors are named."""

import pytest
import torch
from torch import Tensor

from esper_lightning import MLP, PPOConfig
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.core.types import Samples
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.non_finite import GradientFault, find_fault
from esper_lightning.ppo.optimizer import build_optimizer

CONFIG = PPOConfig(normalize_advantage=False, value_clip=None)


@pytest.fixture
def agent(generator: torch.Generator) -> Agent:
    spaces = EnvSpaces(obs=Box((3,)), action=Discrete(2))
    policy = MLP(hidden_sizes=(8,)).build(spaces, generator)
    agent = Agent(policy, None)
    agent.bind(build_optimizer(policy, CONFIG))
    return agent


def samples_of(number: int, generator: torch.Generator) -> Samples:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Samples(
        obs=random(number, 3),
        action=torch.randint(2, (number,), generator=generator),
        log_prob=torch.full((number,), -0.7),
        action_mask=None,
        advantage=random(number),
        value=random(number),
        value_target=1e6 * random(number),
    )


def fault_of(agent: Agent, samples: Samples, *minibatches: list[int]) -> GradientFault:
    order = [torch.tensor(minibatch) for minibatch in minibatches]
    return find_fault(agent, agent.weights, samples, CONFIG, order)


def test_the_largest_gradient_is_that_of_the_mean_over_a_minibatch(
    agent: Agent, generator: torch.Generator
) -> None:
    samples = samples_of(6, generator)
    once = fault_of(agent, samples, [0, 1, 2, 3])
    twice = fault_of(agent, samples, [0, 1, 2, 3] * 2)
    assert once.largest > 1e3
    assert twice.largest == pytest.approx(once.largest, rel=1e-5)
    assert twice.largest_name == once.largest_name
    alone = [fault_of(agent, samples, [k]).largest for k in range(4)]
    assert once.largest <= max(alone)


def test_where_all_is_finite_the_minibatch_with_the_largest_gradient_is_found(
    agent: Agent, generator: torch.Generator
) -> None:
    samples = samples_of(6, generator)
    samples.value_target[4] = 1e9
    fault = fault_of(agent, samples, [0, 1], [2, 4], [3, 5])
    assert (fault.step, fault.names) == (2, [])
    assert torch.equal(fault.minibatch.obs, samples.obs[[2, 4]])


def test_the_first_minibatch_that_is_not_finite_is_found_and_its_tensors_are_named(
    agent: Agent, generator: torch.Generator
) -> None:
    samples = samples_of(6, generator)
    samples.value_target[2] = torch.inf
    samples.advantage[5] = torch.nan
    fault = fault_of(agent, samples, [0, 1], [3, 2], [4, 5])
    assert fault.step == 2
    assert fault.names[0] == "loss/value"
    assert "loss/policy" not in fault.names
    assert any(name.startswith("gradient of critic") for name in fault.names)
    assert not any(name.startswith("gradient of actor") for name in fault.names)
