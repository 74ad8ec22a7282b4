"""An evaluation counts the first episodes of each environment, whatever comes after them."""

import re

import pytest
import torch
from torch import Tensor

from esper_lightning import MLP, Recurrent
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.core.types import StepResult
from esper_lightning.ppo.evaluation import Episodes, evaluate_policy

ENVS = 3


class Written:
    """Environments whose episodes are written down: ``{step: (environment, return, how)}``."""

    num_envs = ENVS
    spaces = EnvSpaces(obs=Box((2,)), action=Discrete(2), masked=True)

    def __init__(self, *ends: tuple[int, int, float, str]) -> None:
        self.ends, self.steps, self.began = ends, 0, [0] * ENVS

    def seen(self) -> tuple[Tensor, Tensor]:
        """The number of the step, and a mask that allows one action, not always the same."""
        obs = torch.arange(ENVS)[:, None] + torch.tensor([0.0, self.steps])
        allowed = torch.full((ENVS,), self.steps % 2)
        return obs, torch.nn.functional.one_hot(allowed, 2).bool()

    def reset(self) -> tuple[Tensor, Tensor]:
        return self.seen()

    def step(self, action: Tensor) -> StepResult:
        assert (action == self.steps % 2).all(), "a forbidden action"
        self.steps += 1
        terminated, truncated = torch.zeros(2, ENVS, dtype=torch.bool)
        episode_return, length = (
            torch.full((ENVS,), torch.nan),
            torch.zeros(ENVS, dtype=torch.int64),
        )
        for step, env, value, how in self.ends:
            if step == self.steps:
                (terminated if how == "terminated" else truncated)[env] = True
                episode_return[env], length[env] = value, step - self.began[env]
                self.began[env] = step
        obs, mask = self.seen()
        nothing = torch.zeros(ENVS)
        return StepResult(obs, nothing, terminated, truncated, obs, mask, episode_return, length)


# The second episode of the first environment is longer and better, that of the second shorter.
LATEST_LAST = (
    (2, 0, 1.0, "terminated"),
    (3, 1, 2.0, "truncated"),
    (5, 1, 20.0, "terminated"),
    (6, 0, 10.0, "truncated"),
    (7, 2, 3.0, "terminated"),
)


def policy(kind=MLP, **settings):
    spec = kind(**settings)
    return spec.build(Written.spaces, torch.Generator().manual_seed(0))


def evaluate(*ends, max_steps=100) -> tuple[Episodes, int]:
    env = Written(*ends)
    return evaluate_policy(policy(), lambda obs: obs, env, max_steps=max_steps), env.steps


def test_the_first_episode_of_each_environment_counts_and_no_later_one():
    episodes, steps = evaluate(*LATEST_LAST)
    assert episodes.episode_return.tolist() == [1.0, 2.0, 3.0]
    assert episodes.episode_length.tolist() == [2, 3, 7]
    assert steps == 7


def test_an_episode_may_take_max_steps_and_no_more():
    episodes, steps = evaluate(*LATEST_LAST, max_steps=7)
    assert (episodes.episode_length.max(), steps) == (7, 7)
    message = "Written must end every episode within 6 steps to be evaluated, got '1 running'."
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(*LATEST_LAST, max_steps=6)
    single = [(1, env, 1.0, "terminated") for env in range(ENVS)]
    assert evaluate(*single, max_steps=1)[1] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_return_that_is_not_finite_is_refused(value):
    ends = [(1, env, value if env == 1 else 0.0, "terminated") for env in range(ENVS)]
    with pytest.raises(ValueError, match=r"got 'non-finite returns of environments \[1\]'"):
        evaluate(*ends)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_memory_ends_with_its_episode_however_that_ends(cell):
    remembers, seen = policy(Recurrent, cell=cell, memory_size=4), []
    act = remembers.act_deterministically
    remembers.act_deterministically = lambda memory, mask: seen.append(memory) or act(memory, mask)
    evaluate_policy(remembers, lambda obs: obs, Written(*LATEST_LAST))
    env = Written(*LATEST_LAST)
    memory = torch.zeros(ENVS, remembers.memory_size)
    obs, mask = env.reset()
    for got in seen:
        with torch.no_grad():
            expected, memory = remembers.step_memory(obs, memory)
            assert torch.equal(got, expected)
            result = env.step(act(expected, mask))
        memory = remembers.reset_memory(memory, result.terminated | result.truncated)
        obs, mask = result.obs, result.action_mask
    assert len(seen) == 7
