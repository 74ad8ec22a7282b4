"""An evaluation counts the first episodes of each environment, whatever comes after them."""

import re
from functools import partial

import pytest
import torch
from torch import Tensor

from esper_lightning import MLP, PPO, PPOConfig, Recurrent
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.core.types import StepResult
from esper_lightning.envs import CartPole, FrameStack, MountainCar, Pendulum
from esper_lightning.ppo.agent import prepare_obs
from esper_lightning.ppo.evaluation import Episodes, Stride, evaluate_policy
from esper_lightning.training.evaluation import Evaluation
from esper_lightning.training.settings import PPOSettings

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


CPU = torch.device("cpu")


class Strides:
    """Evaluations of one model: each step by itself, or many at once as ``mode`` says."""

    def __init__(self, env=None, kind=MLP, **settings):
        self.model = PPO(
            env or CartPole(num_envs=6, time_limit=90),
            policy=kind(**settings),
            ppo=PPOConfig(rollout_steps=4, minibatches=1, normalize_obs=True),
        )
        self.model.obs_normalizer.update(torch.randn(9, *self.model.env_spaces.obs.shape))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # so that much decides
            for weight in self.model.policy.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator))

    def evaluate(self, mode=None, env=None, each=1):
        model, env = self.model, env or self.model.env.build(CPU, 3)
        policy, normalizer = model.policy, model.obs_normalizer
        stride = mode and Stride(policy, normalizer, env, mode=mode, device=CPU)
        normalize = partial(prepare_obs, normalizer=normalizer)
        return evaluate_policy(policy, normalize, env, stride=stride, episodes_each=each)


@pytest.mark.parametrize("kind", [MLP, Recurrent])
def test_many_steps_at_once_are_those_of_single_steps(kind):
    strides = Strides(kind=kind)
    alone, many = strides.evaluate(each=8), strides.evaluate("off", each=8)
    assert torch.equal(alone.episode_return, many.episode_return)
    assert torch.equal(alone.episode_length, many.episode_length)
    assert alone.episode_length.view(-1, 8).sum(1).max() > 2 * 32


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize(
    ("env", "kind", "each"),
    [
        (None, MLP, 2),
        (Pendulum(num_envs=5, time_limit=37), Recurrent, 1),
        (FrameStack(env=CartPole(num_envs=4, time_limit=70), frames=2), MLP, 1),
    ],
)
def test_native_evaluations_are_those_of_eager_ones(env, kind, each, caplog):
    strides = Strides(env, kind)
    eager, native = strides.evaluate("off", each=each), strides.evaluate("auto", each=each)
    assert torch.equal(native.episode_length, eager.episode_length)
    torch.testing.assert_close(native.episode_return, eager.episode_return, rtol=2e-3, atol=0)
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


@pytest.mark.usefixtures("native_code")
def test_a_native_evaluation_sees_the_weights_of_its_time():
    strides = Strides()
    env = strides.model.env.build(CPU, 3)
    policy, normalizer = strides.model.policy, strides.model.obs_normalizer
    stride = Stride(policy, normalizer, env, mode="auto", device=CPU)
    normalize, found = partial(prepare_obs, normalizer=normalizer), []
    for _ in range(4):
        env.reseed(3)
        got = evaluate_policy(policy, normalize, env, stride=stride)
        torch.testing.assert_close(got, strides.evaluate("off"))
        found.append((got, [*map(Tensor.clone, got)]))
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        normalizer.update(torch.randn(9, 4))
    assert len({tuple(copy[0].tolist()) for _, copy in found}) > 1
    assert all(
        torch.equal(kept, copy)
        for got, copies in found
        for kept, copy in zip(got, copies, strict=True)
    )


def test_an_evaluation_is_of_the_policy_that_it_is_given():
    evaluation = Evaluation(PPOSettings(env=MountainCar(num_envs=2, time_limit=9), eval_episodes=2))
    spaces = MountainCar(num_envs=2).spaces()
    seen = []

    def noting(act, seed, *args):
        seen.append(seed)
        return act(*args)

    for seed in range(2):
        played = MLP().build(spaces, torch.Generator().manual_seed(seed))
        act = played.act_deterministically
        played.act_deterministically = lambda *args, act=act, seed=seed: (
            seen.append(seed) or act(*args)
        )
        evaluation.play(played, None, device=CPU, rank=0)
    assert set(seen[-9:]) == {1}
