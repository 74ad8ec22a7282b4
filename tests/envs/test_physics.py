"""Classic tasks equal Gymnasium's step by step, from random states, in both precisions."""

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from esper_lightning.envs import Acrobot, CartPole, MountainCar, Pendulum
from esper_lightning.envs.autoreset import AutoresetEnv, Task

STATES = 3000


@dataclass
class Reference:
    """A task and the Gymnasium environment that it must equal."""

    name: str
    spec: type[Any]
    low: tuple[float, ...]  # bounds of the random states, beyond those of termination and clipping
    high: tuple[float, ...]

    def gym(self) -> gymnasium.Env:
        return gymnasium.make(self.name)

    def states(self, count: int) -> Tensor:
        unit = torch.rand(count, len(self.low), generator=torch.Generator().manual_seed(1))
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        return low + (high - low) * unit

    def actions(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        if self.spec is Pendulum:
            return torch.randn(count, 1, generator=generator) * 2.0
        return torch.randint(self.spec().spaces().action.n, (count,), generator=generator)


REFERENCES = [
    Reference("CartPole-v1", CartPole, (-2.6, -3, -0.25, -3), (2.6, 3, 0.25, 3)),
    Reference(
        "Acrobot-v1",
        Acrobot,
        (-math.pi, -math.pi, -4 * math.pi, -9 * math.pi),
        (math.pi, math.pi, 4 * math.pi, 9 * math.pi),
    ),
    Reference("MountainCar-v0", MountainCar, (-1.2, -0.07), (0.6, 0.07)),
    Reference("Pendulum-v1", Pendulum, (-10.0, -8.0), (10.0, 8.0)),
]
each_task = pytest.mark.parametrize("reference", REFERENCES, ids=lambda it: it.name)


def set_state(env: gymnasium.Env, state: Tensor) -> None:
    env.unwrapped.state = state.double().numpy()
    env.unwrapped.steps_beyond_terminated = None


def gym_action(action: Tensor) -> Any:
    return action.double().numpy() if action.ndim else int(action)


@dataclass
class Steps:
    """Results of Gymnasium for a batch of states."""

    state: Tensor
    obs: Tensor
    reward: Tensor
    terminated: Tensor


@pytest.fixture(scope="module")
def gym_steps() -> dict[str, Steps]:
    steps = {}
    for reference in REFERENCES:
        env = reference.gym().unwrapped
        rows = []
        for state, action in zip(reference.states(STATES), reference.actions(STATES), strict=True):
            set_state(env, state)
            obs, reward, terminated, _, _ = env.step(gym_action(action))
            rows.append((np.array(env.state), obs, reward, terminated))
        state, obs, reward, terminated = (
            torch.as_tensor(np.array(it)) for it in zip(*rows, strict=True)
        )
        steps[reference.name] = Steps(state, obs, reward.double(), terminated)
    return steps


@each_task
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-3)], ids=str
)
def test_one_step_from_random_states_equals_that_of_gymnasium(
    reference: Reference, dtype: torch.dtype, tolerance: float, gym_steps: dict[str, Steps]
) -> None:
    task, expected = reference.spec(num_envs=STATES), gym_steps[reference.name]
    action = reference.actions(STATES)
    if action.is_floating_point():
        action = action.to(dtype)
    state, reward, terminated = task.advance(reference.states(STATES).to(dtype), action)
    assert state.dtype == reward.dtype == dtype
    obs = task.observe(state)

    # Single precision may fall on the other side of a threshold, or of a wrapped angle's cut.
    agree = terminated == expected.terminated
    difference = (state - expected.state).abs()
    if reference.spec is Acrobot and dtype == torch.float32:
        assert state[:, :2].abs().max() <= math.pi + 1e-6
        difference[:, :2] = torch.minimum(difference[:, :2], math.tau - difference[:, :2])
    assert (~agree).sum() <= (0 if dtype == torch.float64 else 3)
    assert difference.max() < tolerance
    torch.testing.assert_close(obs.float(), expected.obs, atol=max(tolerance, 1e-6), rtol=1e-6)
    torch.testing.assert_close(
        reward.double()[agree], expected.reward[agree], atol=tolerance, rtol=1e-6
    )
    ends = expected.terminated.float().mean()
    assert reference.spec is Pendulum or 0.001 < ends < 0.9, "the states must test both outcomes"


def test_acrobot_that_stays_below_pi_is_not_wrapped() -> None:
    state = torch.tensor([[3.0, -3.0, 0.0, 0.0]], dtype=torch.float64)
    reached = Acrobot(num_envs=1).advance(state, torch.tensor([1])).state
    env = gymnasium.make("Acrobot-v1").unwrapped
    set_state(env, state[0])
    env.step(1)
    torch.testing.assert_close(reached[0], torch.as_tensor(env.state), atol=1e-12, rtol=0.0)


def test_mountain_car_stops_at_the_wall() -> None:
    state = torch.tensor([[-1.19, -0.07], [-1.19, 0.07]])
    reached = MountainCar(num_envs=2).advance(state, torch.tensor([0, 2])).state
    assert reached[0].tolist() == pytest.approx([-1.2, 0.0])
    assert reached[1, 1] > 0.06


def test_a_mountain_car_that_rolls_back_over_the_goal_does_not_terminate() -> None:
    state = torch.tensor([[0.55, -0.01], [0.55, 0.01]])
    result = MountainCar(num_envs=2).advance(state, torch.tensor([0, 2]))
    assert result.terminated.tolist() == [False, True]


def test_pendulum_torque_is_clipped() -> None:
    task, state = Pendulum(num_envs=2), torch.zeros(2, 2)
    result = task.advance(state, torch.tensor([[2.0], [50.0]]))
    assert torch.equal(result.state[0], result.state[1])
    assert torch.equal(result.reward[0], result.reward[1])


@each_task
def test_spaces_equal_those_of_gymnasium(reference: Reference) -> None:
    spaces, env = reference.spec().spaces(), reference.gym()
    for ours, theirs in (
        (spaces.obs, env.observation_space),
        (spaces.action, env.action_space),
    ):
        if hasattr(theirs, "n"):
            assert ours.n == theirs.n
        else:
            assert ours.shape == theirs.shape
            np.testing.assert_array_equal(np.float32(ours.lows), theirs.low.flatten())
            np.testing.assert_array_equal(np.float32(ours.highs), theirs.high.flatten())


@each_task
def test_default_time_limits_equal_those_of_gymnasium(reference: Reference) -> None:
    assert reference.spec().time_limit == reference.gym().spec.max_episode_steps


@each_task
def test_initial_states_are_distributed_like_those_of_gymnasium(reference: Reference) -> None:
    env = reference.gym().unwrapped
    env.reset(seed=0)
    theirs = []
    for _ in range(1000):
        env.reset()
        theirs.append(np.array(env.state, dtype=np.float64))
    expected = torch.as_tensor(np.stack(theirs))
    generator = torch.Generator().manual_seed(0)
    state = reference.spec(num_envs=1000).sample_states(1, generator, torch.device("cpu"))[0]
    width = (expected.amax(0) - expected.amin(0)).float()
    for ours, other in (
        (state.amin(0), expected.amin(0)),
        (state.amax(0), expected.amax(0)),
        (state.mean(0), expected.mean(0)),
        (state.std(0), expected.std(0)),
    ):
        assert ((ours - other).abs() <= 0.06 * width).all()
    high = {CartPole: 0.05, Acrobot: 0.1, MountainCar: 0.6, Pendulum: math.pi}[reference.spec]
    assert state.abs().max() <= high + 1e-6


class DoublePrecision:
    """A task that starts in double precision, so that whole episodes can be compared."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.num_envs, self.time_limit = task.num_envs, task.time_limit
        self.spaces, self.observe, self.advance = task.spaces, task.observe, task.advance

    def sample_states(self, steps: int, generator: torch.Generator, device: torch.device) -> Tensor:
        return self._task.sample_states(steps, generator, device).double()


def energetic(name: str, obs: np.ndarray, step: int) -> Any:
    """Actions that end MountainCar and Acrobot; balance for CartPole."""
    if name == "MountainCar-v0":
        return 2 if obs[1] >= 0 else 0
    if name == "Acrobot-v1":
        return 2 if obs[5] >= 0 else 0
    if name == "CartPole-v1":
        return int(obs[2] + 0.5 * obs[3] > 0)
    return np.array([math.sin(0.3 * step)], dtype=np.float32)


@each_task
def test_whole_episodes_equal_those_of_gymnasium(reference: Reference) -> None:
    # A balanced pole doubles every difference in 0.2 s, so its episodes are kept short.
    limit = 100 if reference.spec is CartPole else reference.spec().time_limit
    task = DoublePrecision(reference.spec(num_envs=1, time_limit=limit))
    env = AutoresetEnv(task, device=torch.device("cpu"), seed=7)
    gym = gymnasium.make(reference.name, max_episode_steps=limit)
    ends = set()
    env.reset()
    for _ in range(2):
        gym.reset(seed=0)
        set_state(gym, env.state_dict()["state"][0])
        obs, ended, step, total = gym.unwrapped.state, False, 0, 0.0
        if reference.spec is not CartPole and reference.spec is not MountainCar:
            obs = gym.unwrapped._get_ob() if reference.spec is Acrobot else gym.unwrapped._get_obs()
        while not ended:
            action = energetic(reference.name, obs, step)
            result = env.step(torch.as_tensor(np.array(action)).unsqueeze(0))
            obs, reward, terminated, truncated, _ = gym.step(action)
            step, total, ended = step + 1, total + float(reward), terminated or truncated
            reached = result.reached_obs[0].float()
            torch.testing.assert_close(reached, torch.as_tensor(obs), atol=1e-5, rtol=1e-5)
            assert result.reward.item() == pytest.approx(float(reward), abs=1e-6)
            assert result.terminated.item() == terminated
            assert result.truncated.item() == (truncated and not terminated)
        assert result.episode_length.item() == step
        assert result.episode_return.item() == pytest.approx(total)
        ends.add("terminated" if terminated else "truncated")
    expected = {"MountainCar-v0": "terminated", "Acrobot-v1": "terminated"}
    assert ends == {expected.get(reference.name, "truncated")}
