"""Values and gradients that are not finite: the step, the minibatch and the tensors are named."""

import pytest
import torch
from torch import Tensor

from esper_lightning import MLP, PPOConfig
from esper_lightning.core.buffer import allocate_rollout
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.core.types import Rollout, Samples
from esper_lightning.envs import CartPole
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.non_finite import GradientFault, find_fault, first_non_finite, is_healthy
from esper_lightning.ppo.optimizer import build_optimizer

STEPS, ENVS = 6, 3
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


def healthy() -> Rollout:
    storage = allocate_rollout(CartPole().spaces(), STEPS, ENVS, device=torch.device("cpu"))
    for field in (storage.obs, storage.reached_obs, storage.log_prob, storage.reward):
        field.zero_()
    return storage


@pytest.mark.parametrize(
    ("bad", "owner", "name", "step", "environments"),
    [
        ([("obs", 2, 1), ("log_prob", 2, 1), ("reward", 2, 1)], "environment", "obs", 2, [1]),
        ([("log_prob", 2, 1), ("reward", 2, 0)], "policy", "log_prob", 2, [1]),
        ([("reward", 3, 2), ("reached_obs", 3, 0)], "environment", "reward", 3, [2]),
        ([("reward", 4, 0), ("reached_obs", 1, 2)], "environment", "reached_obs", 1, [2]),
        (
            [("reward", 4, 0), ("reward", 0, 2), ("reward", 0, 1)],
            "environment",
            "reward",
            0,
            [1, 2],
        ),
        ([("log_prob", 5, 0), ("log_prob", 4, 2)], "policy", "log_prob", 4, [2]),
    ],
    ids=str,
)
def test_the_first_value_that_is_not_finite_is_blamed(bad, owner, name, step, environments):
    storage = healthy()
    assert first_non_finite(storage) is None
    space = CartPole().spaces().action
    assert is_healthy(storage, space)
    for field, t, env in bad:
        value = getattr(storage, field)[t]
        value[(env, 3) if value.dim() == 2 else env] = torch.inf
    fault = first_non_finite(storage)
    assert (fault.owner, fault.name, fault.step) == (owner, name, step)
    assert fault.environments == environments
    assert f"rollout step {step}" in fault.text
    assert ("column 3" in fault.text) == ("obs" in name)
    assert not is_healthy(storage, space)
