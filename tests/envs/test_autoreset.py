"""Time limits, resets within the step, saving and loading, seeds; no step synchronises."""

import dataclasses
import inspect
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.core.types import StepResult
from esper_lightning.envs import Acrobot, BatchedEnv, CartPole, EnvSpec, MountainCar, Pendulum
from esper_lightning.envs.autoreset import AutoresetEnv, Transition, validate_sizes

CPU = torch.device("cpu")
SPECS = [CartPole, Acrobot, MountainCar, Pendulum]
each_spec = pytest.mark.parametrize("spec", SPECS)


def random_action(env: BatchedEnv, generator: torch.Generator) -> Tensor:
    space = env.spaces.action
    if isinstance(space, Box):
        return torch.rand(env.num_envs, 1, generator=generator) * 4 - 2
    return torch.randint(space.n, (env.num_envs,), generator=generator)


def play(env: BatchedEnv, steps: int) -> list[StepResult]:
    generator = torch.Generator().manual_seed(3)
    return [env.step(random_action(env, generator)) for _ in range(steps)]


def play_and_save(spec: EnvSpec) -> dict[str, Tensor]:
    env = spec.build(CPU, 5)
    play(env, 2)
    return env.state_dict()


def assert_equal(first: list[StepResult], second: list[StepResult]) -> None:
    for one, other in zip(first, second, strict=True):
        for name, value in one._asdict().items():
            if value is not None:
                got = getattr(other, name)
                torch.testing.assert_close(value, got, rtol=0, atol=0, equal_nan=True, msg=name)


class Countdown:
    """A task whose state counts down to 0, which terminates; every result is known in advance."""

    def __init__(self, start: list[int], time_limit: int) -> None:
        self.start, self.num_envs, self.time_limit = start, len(start), time_limit

    def spaces(self) -> EnvSpaces:
        return EnvSpaces(obs=Box((1,)), action=Discrete(2))

    def sample_states(self, steps: int, generator: torch.Generator, device: torch.device) -> Tensor:
        start = torch.tensor(self.start, dtype=torch.float32).unsqueeze(-1)
        return start.expand(steps, *start.shape)

    def observe(self, state: Tensor) -> Tensor:
        return state

    def advance(self, state: Tensor, action: Tensor) -> Transition:
        reached = state - 1
        return Transition(reached, reached[:, 0] * 10, reached[:, 0] <= 0)


def test_each_kind_of_end_gives_the_result_computed_by_hand() -> None:
    env = AutoresetEnv(Countdown([2, 3, 5], time_limit=3), device=CPU, seed=0)
    obs, mask = env.reset()
    assert obs.tolist() == [[2], [3], [5]]
    assert mask is None
    action = torch.zeros(3, dtype=torch.int64)
    one, two, three = (env.step(action) for _ in range(3))

    assert one.obs.tolist() == one.reached_obs.tolist() == [[1], [2], [4]]
    assert one.reward.tolist() == [10, 20, 40]
    assert not (one.terminated | one.truncated).any()
    assert one.episode_return.isnan().all()
    assert one.episode_length.tolist() == [0, 0, 0]

    assert two.terminated.tolist() == [True, False, False]
    assert two.obs.tolist() == [[2], [1], [3]]
    assert two.reached_obs.tolist() == [[0], [1], [3]]
    assert two.episode_return[0] == 10
    assert two.episode_return[1:].isnan().all()
    assert two.episode_length.tolist() == [2, 0, 0]

    # Terminated at the limit is terminated: there is no value beyond. (Gymnasium sets both flags.)
    assert three.terminated.tolist() == [False, True, False]
    assert three.truncated.tolist() == [False, False, True]
    assert three.obs.tolist() == [[1], [3], [5]]
    assert three.reached_obs.tolist() == [[1], [0], [2]]
    assert three.episode_return[1:].tolist() == [20 + 10 + 0, 40 + 30 + 20]
    assert three.episode_length.tolist() == [0, 3, 3]
    assert one.obs.tolist() == [[1], [2], [4]], "overwritten by a later step"


def test_gymnasium_sets_both_flags_where_only_terminated_is_set_here() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    env = gymnasium.make("MountainCar-v0", max_episode_steps=1)
    env.reset(seed=0)
    env.unwrapped.state = (0.49, 0.05)
    assert env.step(2)[2:4] == (True, True)


@given(
    start=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    limit=st.integers(1, 9),
    steps=st.integers(1, 30),
)
@settings(deadline=None, max_examples=60)
def test_episodes_are_as_long_as_the_start_or_the_limit(
    start: list[int], limit: int, steps: int
) -> None:
    env = AutoresetEnv(Countdown(start, limit), device=CPU, seed=0)
    results = play(env, steps)
    for index, first in enumerate(start):
        length = min(first, limit)
        for step, result in enumerate(results, start=1):
            ends = step % length == 0
            assert bool(result.terminated[index]) == (ends and first <= limit)
            assert bool(result.truncated[index]) == (ends and first > limit)
            assert int(result.episode_length[index]) == (length if ends else 0)
            value = float(result.episode_return[index])
            total = 10.0 * sum(first - k for k in range(1, length + 1))
            assert value == total if ends else math.isnan(value)


@each_spec
def test_an_episode_is_truncated_exactly_at_the_limit(spec: type[Any]) -> None:
    env = spec(num_envs=4, time_limit=5).build(CPU, 0)
    env.reset()
    for step, result in enumerate(play(env, 11), start=1):
        assert not result.terminated.any()
        assert result.truncated.tolist() == [step % 5 == 0] * 4


@each_spec
def test_a_reset_within_an_episode_starts_a_new_episode(spec: type[Any]) -> None:
    env = spec(num_envs=4, time_limit=5).build(CPU, 0)
    env.reset()
    play(env, 3)
    env.reset()
    results = play(env, 5)
    assert [int(result.episode_length[0]) for result in results] == [0, 0, 0, 0, 5]
    total = torch.stack([result.reward for result in results]).sum(0)
    torch.testing.assert_close(results[-1].episode_return, total)


@each_spec
def test_a_caller_may_write_into_results(spec: type[Any]) -> None:
    plain, abused = (spec(num_envs=3, time_limit=4).build(CPU, 0) for _ in range(2))
    plain.reset()
    abused.reset()[0].zero_()
    expected = play(plain, 10)
    generator = torch.Generator().manual_seed(3)
    for one in expected:
        result = abused.step(random_action(abused, generator))
        assert_equal([one], [StepResult(*(None if it is None else it.clone() for it in result))])
        for value in result:
            if value is not None:
                value.zero_()


@each_spec
def test_an_environment_continues_bit_for_bit_from_a_saved_state(spec: type[Any]) -> None:
    env = spec(num_envs=5, time_limit=17).build(CPU, 0)
    env.reset()
    play(env, 20)
    saved = env.state_dict()
    expected = play(env, 40)
    env.load_state_dict(saved)
    assert_equal(expected, play(env, 40))
    other = spec(num_envs=5, time_limit=17).build(CPU, 99)
    other.load_state_dict(saved)
    assert_equal(expected, play(other, 40))


def test_a_refused_state_changes_nothing() -> None:
    env = CartPole(num_envs=3).build(CPU, 0)
    other = CartPole(num_envs=4).build(CPU, 1)
    before = env.state_dict()
    message = (
        r"CartPole.load_state_dict\(\)\['state'\] must be torch.float32 of shape \[3, 4\], "
        r"got \(torch.float32, \[4, 4\]\). The state was saved with another num_envs"
    )
    with pytest.raises(ValueError, match=message):
        env.load_state_dict(other.state_dict())
    wrong_generator = {
        **CartPole(num_envs=3).build(CPU, 5).state_dict(),
        "generator": torch.ones(1),
    }
    with pytest.raises(ValueError, match=r"\['generator'\] must be torch.uint8"):
        env.load_state_dict(wrong_generator)
    with pytest.raises(ValueError, match=r"must get .*, got"):
        env.load_state_dict({"state": torch.zeros(3, 4)})
    for name, value in env.state_dict().items():
        assert torch.equal(value, before[name])


@each_spec
def test_the_seed_determines_initial_states_that_differ(spec: type[Any]) -> None:
    def start(seed: int) -> Tensor:
        return spec(num_envs=6).build(CPU, seed).reset()[0]

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    assert len({tuple(row) for row in start(1).tolist()}) == 6


@each_spec
def test_reseeded_environments_are_new_ones_at_the_same_addresses(spec: type[Any]) -> None:
    env, new = (spec(num_envs=3, time_limit=4).build(CPU, seed) for seed in (1, 2))
    addresses = [tensor.data_ptr() for tensor in env.episodes()]
    play(env, 3)
    env.reseed(2)
    assert_equal(play(env, 6), play(new, 6))
    assert torch.equal(env.reset()[0], new.reset()[0])
    assert [tensor.data_ptr() for tensor in env.episodes()] == addresses


@each_spec
def test_an_environment_is_independent_of_the_global_stream(spec: type[Any]) -> None:
    before = torch.get_rng_state()
    play(spec(num_envs=2, time_limit=2).build(CPU, 0), 5)
    assert torch.equal(torch.get_rng_state(), before)


@each_spec
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1, got 0."),
        ({"num_envs": True}, "num_envs must be an integer, got True."),
        ({"time_limit": -1}, "time_limit must be at least 1, got -1."),
    ],
)
def test_settings_are_checked(spec: type[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{spec.__name__}.{message}')}$"):
        spec(**settings)


@pytest.mark.parametrize("value", [2.0, "2", None])
def test_sizes_that_are_no_integers_are_refused(value: Any) -> None:
    # In a dataclass the type checker of the test run would refuse such sizes first.
    task = Countdown([1], time_limit=value)
    with pytest.raises(ValueError, match=f"Countdown.time_limit must be an integer, got {value!r}"):
        validate_sizes(task)


def test_a_seed_that_is_no_integer_or_negative_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Pendulum.build\(\).seed must be an integer, got True."):
        Pendulum().build(CPU, True)
    with pytest.raises(ValueError, match=r"Pendulum.build\(\).seed must be at least 0, got -1."):
        Pendulum().build(CPU, -1)


@each_spec
def test_specs_with_equal_settings_are_equal(spec: type[Any]) -> None:
    assert spec(num_envs=3) == spec(num_envs=3) != spec(num_envs=4)
    assert isinstance(spec(), EnvSpec)
    assert isinstance(spec().build(CPU, 0), BatchedEnv)


@each_spec
def test_actions_out_of_range_raise_nothing(spec: type[Any]) -> None:
    env = spec(num_envs=3).build(CPU, 0)
    action = torch.tensor([-7, 99, 3])
    if spec is Pendulum:
        action = torch.tensor([[-1e9], [math.inf], [math.nan]])
    env.step(action)


@each_spec
def test_results_need_no_gradient(spec: type[Any]) -> None:
    env = spec(num_envs=3).build(CPU, 0)
    action = random_action(env, torch.Generator())
    if spec is Pendulum:
        action.requires_grad_()
    tensors = [value for value in env.step(action) if value is not None]
    assert not any(value.requires_grad for value in [*tensors, *env.state_dict().values()])


class Recorder(TorchDispatchMode):
    """Records the name of every operation, and the addresses of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func.overloadpacket).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


SYNCHRONISING = {
    "_local_scalar_dense",  # item(), bool()
    "nonzero",
    "masked_select",
    "index",
    "index_put_",
    "lift_fresh",  # torch.tensor(...)
    "equal",
    "is_nonzero",
}


@each_spec
def test_a_step_is_the_same_operations_whatever_happens(spec: type[Any]) -> None:
    env = spec(num_envs=4, time_limit=2).build(CPU, 0)
    action = random_action(env, torch.Generator())
    traces = []
    for _ in range(3):
        with Recorder() as recorder:
            env.step(action)
        traces.append(recorder.names)
    assert traces[0] == traces[1] == traces[2]
    assert len(traces[0]) > 10
    assert not SYNCHRONISING & set(traces[0])


@each_spec
def test_the_state_stays_at_its_address(spec: type[Any]) -> None:
    env = spec(num_envs=4, time_limit=2).build(CPU, 0)
    addresses = [buffer.data_ptr() for buffer in env.episodes()]
    env.reset()
    play(env, 3)
    env.load_state_dict(env.state_dict())
    assert addresses == [buffer.data_ptr() for buffer in env.episodes()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_spec
def test_a_step_does_not_synchronise(spec: type[Any]) -> None:
    device = torch.device("cuda")
    env = spec(num_envs=64, time_limit=3).build(device, 0)
    env.reset()
    action = random_action(env, torch.Generator()).to(device)
    env.step(action)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [env.step(action) for _ in range(5)]
        env.reset()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(value.device.type == "cuda" for value in results[-1] if value is not None)


def test_a_task_that_lacks_a_member_is_named_with_what_it_lacks() -> None:
    class Falling(EnvSpec):
        num_envs, time_limit = 2, 5

        def spaces(self) -> EnvSpaces:
            return CartPole().spaces()

        def build(self, device: torch.device, seed: int) -> AutoresetEnv:
            env = object.__new__(AutoresetEnv)
            # Without the type checks of the test run.
            inspect.unwrap(AutoresetEnv.__init__)(env, self, device=device, seed=seed)
            return env

    message = (
        "^Falling must be a Task, with num_envs, time_limit, spaces, sample_states, observe,"
        " advance, got Falling without sample_states, observe, advance.$"
    )
    with pytest.raises(ValueError, match=message):
        Falling().build(CPU, 0)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(validate_sizes)(Falling())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mistaken(CartPole):
    """CartPole with one method that returns what it must not."""

    mistake: str = ""

    def sample_states(self, steps, generator, device):
        whole = torch.zeros(steps, self.num_envs, 4)
        wrong = {
            "no time": whole[0],
            "an axis more": whole[..., None],
            "whole numbers": whole.long(),
        }
        return wrong.get(self.mistake, whole)

    def advance(self, state, action):
        whole = Transition(state, torch.ones(self.num_envs), torch.zeros(self.num_envs).bool())
        wrong = {
            "the state": state,
            "less state": whole._replace(state=state[:, :3]),
            "one reward": whole._replace(reward=torch.ones(())),
        }
        return wrong.get(self.mistake, whole)

    def build(self, device, seed):
        env = object.__new__(Unchecked)
        inspect.unwrap(AutoresetEnv.__init__)(env, self, device=device, seed=seed)
        return env


class Unchecked(AutoresetEnv):
    """Environments without the type checks of the test run."""

    draw = inspect.unwrap(AutoresetEnv.draw)
    transition = inspect.unwrap(AutoresetEnv.transition)
    _first_episodes = inspect.unwrap(AutoresetEnv._first_episodes)
    _refuse_shapes = inspect.unwrap(AutoresetEnv._refuse_shapes)


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        ("no time", r"sample_states\(\) must return states \[T, B, S\], .*, got \[2, 4\]"),
        ("an axis more", r"sample_states\(\) must return states .*, got \[1, 2, 4, 1\]"),
        ("whole numbers", r"sample_states\(\) must return floating states, got torch.int64"),
        ("the state", r"advance\(\) must return a Transition, got tensor"),
        ("less state", r"advance\(\).state must have shape \[2, 4\], got \[2, 3\]"),
        ("one reward", r"advance\(\).reward must have shape \[2\], got \[\]"),
    ],
)
def test_what_a_method_of_a_task_must_not_return_is_named_by_the_method(mistake, line):
    with pytest.raises(ValueError, match=rf"^Mistaken\.{line}"):
        Mistaken(num_envs=2, mistake=mistake).build(torch.device("cpu"), 0).step(torch.zeros(2))
