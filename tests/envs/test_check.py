"""``check_env`` accepts environments that obey the contract and names each rule that is broken."""

import inspect
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_lightning.core.spaces import Box, Discrete, EnvSpaces, MultiDiscrete, mask_size
from esper_lightning.core.types import StepResult
from esper_lightning.envs import Acrobot, CartPole, MountainCar, Pendulum, check_env
from esper_lightning.envs.autoreset import AutoresetEnv
from esper_lightning.envs.contract import sample_action

CPU = torch.device("cpu")
GROUPS = {"actor": Box((2,), low=-1e6, high=1e6), "critic": Box((2, 2))}


class Walk:
    """A correct environment, with groups and masks: random walks that end at 4, or after 6 steps.

    Subclasses break one promise each.
    """

    masked = True
    action_space: Any = MultiDiscrete((2, 3))
    obs_space: Any = GROUPS

    def __init__(self, num_envs: int = 8, seed: int = 0) -> None:
        self.num_envs = num_envs
        self.generator = torch.Generator().manual_seed(seed)
        self.position, self.elapsed, self.total = self.start(), self.zeros(), self.zeros()

    @property
    def spaces(self) -> EnvSpaces:
        return EnvSpaces(obs=self.obs_space, action=self.action_space, masked=self.masked)

    def zeros(self) -> Tensor:
        return torch.zeros(self.num_envs)

    def start(self) -> Tensor:
        return torch.rand(self.num_envs, 2, generator=self.generator)

    def observe(self, position: Tensor) -> Any:
        if isinstance(self.obs_space, Box):
            return position.clone()
        return {"actor": position.clone(), "critic": position.unsqueeze(1).repeat(1, 2, 1)}

    def mask(self) -> Tensor | None:
        if not self.masked:
            return None
        mask = torch.ones(self.num_envs, mask_size(self.action_space), dtype=torch.bool)
        mask[:, 0] = self.position[:, 0] < 0.5
        return mask

    def move(self, action: Tensor) -> Tensor:
        noise = torch.rand(self.num_envs, 2, generator=self.generator)
        return self.position + action.reshape(self.num_envs, -1).float().mean(1, True) * noise

    def reset(self) -> Any:
        self.position, self.elapsed, self.total = self.start(), self.zeros(), self.zeros()
        return self.observe(self.position), self.mask()

    def step(self, action: Tensor) -> Any:
        reached = self.move(action)
        reward = reached[:, 0].clone()
        elapsed, total = self.elapsed + 1, self.total + reward
        terminated = reached[:, 0] > 4
        truncated = (elapsed >= 6) & ~terminated
        ended = terminated | truncated
        self.position = torch.where(ended[:, None], self.start(), reached)
        self.elapsed, self.total = elapsed.masked_fill(ended, 0), total.masked_fill(ended, 0)
        return StepResult(
            obs=self.observe(self.position),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            reached_obs=self.observe(reached),
            action_mask=self.mask(),
            episode_return=total.masked_fill(~ended, math.nan),
            episode_length=elapsed.masked_fill(~ended, 0).long(),
        )

    def state_dict(self) -> Any:
        return {
            "position": self.position.clone(),
            "elapsed": self.elapsed.clone(),
            "total": self.total.clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["position"].shape != self.position.shape:
            raise ValueError("another size")
        for name in ("position", "elapsed", "total"):
            setattr(self, name, state[name].clone())
        self.generator.set_state(state["generator"])


@dataclass(frozen=True, kw_only=True)
class WalkSpec:
    num_envs: int = 8
    env: type[Walk] = Walk

    def spaces(self) -> EnvSpaces:
        return self.env(self.num_envs).spaces

    def build(self, device: torch.device, seed: int) -> Any:
        return self.env(self.num_envs, seed)


def problems(env: Any, **settings: Any) -> list[str]:
    """Problems that ``check_env`` names; without the test run's type checker, which would raise."""
    with pytest.raises(ValueError, match="must") as error:
        inspect.unwrap(check_env)(env, **{"steps": 30, **settings})
    return str(error.value).splitlines()


@pytest.mark.parametrize("spec", [CartPole, Acrobot, MountainCar, Pendulum])
@pytest.mark.parametrize("num_envs", [1, 8])
def test_built_in_specs_pass(spec: Any, num_envs: int, caplog: pytest.LogCaptureFixture) -> None:
    check_env(spec(num_envs=num_envs, time_limit=25), steps=60, seed=5)
    assert not caplog.records


@pytest.mark.parametrize(
    ("masked", "action_space"),
    [
        (True, MultiDiscrete((2, 3))),
        (False, MultiDiscrete((2, 3))),
        (True, Discrete(4)),
        (False, Discrete(4)),
        (False, Box((2,), low=0.0)),
    ],
)
@pytest.mark.parametrize("obs_space", [GROUPS, Box((2,))])
def test_every_kind_of_spaces_passes(masked: bool, action_space: Any, obs_space: Any) -> None:
    kind = type(
        "Kind", (Walk,), {"masked": masked, "action_space": action_space, "obs_space": obs_space}
    )
    check_env(kind(), steps=30)
    check_env(WalkSpec(env=kind), steps=30)


def nested(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
        return torch.nested.nested_tensor([tensor])


class Unspeakable:
    """A value of a user's class with a bug."""

    def __repr__(self):
        raise RuntimeError("no text")


def changed(**fields: Callable[[StepResult], Any]) -> type[Walk]:
    """An environment whose ``step`` is right except for some fields."""

    class Broken(Walk):
        def step(self, action: Tensor) -> Any:
            result = super().step(action)
            return result._replace(**{name: change(result) for name, change in fields.items()})

    return Broken


def ended(result: StepResult) -> Tensor:
    return result.terminated | result.truncated


def first_only(value: Tensor, at: Tensor, new: float) -> Tensor:
    return torch.where(at & (at.cumsum(0) == 1), torch.full_like(value, new), value)


def unequal_groups(result: StepResult) -> Any:
    return {**result.reached_obs, "critic": result.reached_obs["critic"] + 1}


STEP_PROBLEMS = {
    "reward shape": (
        changed(reward=lambda it: it.reward[:, None]),
        "step().reward must have shape [8], got [8, 1].",
    ),
    "reward dtype": (
        changed(reward=lambda it: it.reward.long()),
        "step().reward must have a floating dtype, got torch.int64.",
    ),
    "flag dtype": (
        changed(terminated=lambda it: it.terminated.float()),
        "step().terminated must have a bool dtype, got torch.float32.",
    ),
    "length dtype": (
        changed(episode_length=lambda it: it.episode_length.float()),
        "step().episode_length must have an integer dtype, got torch.float32.",
    ),
    "device": (
        changed(reward=lambda it: it.reward.to("meta")),
        "step().reward must be on cpu, got meta.",
    ),
    "gradient": (
        changed(reward=lambda it: it.reward.clone().requires_grad_()),
        "step().reward must not require grad, got True. Step under torch.no_grad().",
    ),
    "no tensor": (
        changed(truncated=lambda it: False),
        "step().truncated must be a bool tensor of shape [8], got False.",
    ),
    "group missing": (
        changed(obs=lambda it: {"actor": it.obs["actor"]}),
        "step().obs['critic'] must be a floating tensor of shape [8, 2, 2], got groups ['actor'].",
    ),
    "group unknown": (
        changed(obs=lambda it: {**it.obs, "extra": it.reward}),
        "step().obs['extra'] must be declared in EnvSpaces, got torch.float32 of shape [8].",
    ),
    "mask missing": (
        changed(action_mask=lambda it: None),
        "step().action_mask must be a bool tensor of shape [8, 5], got None.",
    ),
    "reward sparse": (
        changed(reward=lambda it: it.reward.to_sparse()),
        "step().reward must be dense, got torch.sparse_coo.",
    ),
    "reward nested": (
        changed(reward=lambda it: nested(it.reward)),
        "step().reward must be dense, got a nested tensor.",
    ),
    "reward that cannot be shown": (
        changed(reward=lambda it: Unspeakable()),
        "step().reward must be a floating tensor of shape [8], got a Unspeakable that cannot be "
        "shown.",
    ),
    "observation that cannot be named": (
        changed(obs=lambda it: {**it.obs, Unspeakable(): it.obs["critic"]}),
        "step().obs[a Unspeakable that cannot be shown] must be declared in EnvSpaces, got "
        "torch.float32 of shape [8, 2, 2].",
    ),
    "mask of nothing": (
        changed(action_mask=lambda it: it.action_mask & (torch.arange(5) < 2)),
        "step().action_mask must allow a choice for every component, "
        "got none in environment 0, component 1.",
    ),
    "reward nan": (
        changed(reward=lambda it: first_only(it.reward, it.reward > 0, math.nan)),
        "step().reward must be finite, got nan in environment 0.",
    ),
    "obs inf": (
        changed(obs=lambda it: {**it.obs, "critic": it.obs["critic"] / 0}),
        "step().obs['critic'] must be finite, got inf in environment 0, component 0.",
    ),
    "obs outside": (
        changed(obs=lambda it: {**it.obs, "actor": it.obs["actor"] * 0 - 2e6}),
        "step().obs['actor'] must lie within its Box, "
        "got -2000000.0 in environment 0, component 0.",
    ),
    "both flags": (
        changed(truncated=lambda it: it.truncated | it.terminated),
        "step().truncated must be False where terminated, got True in environment ",
    ),
    "reached differs": (
        changed(reached_obs=unequal_groups),
        "step().reached_obs['critic'] must equal obs['critic'] where no episode ended, "
        "got another in environment 0.",
    ),
    "reached is reset": (
        changed(reached_obs=lambda it: it.obs),
        "step().reached_obs must be what the last action led to, where an episode ended, "
        "got the observation after the reset at each of ",
    ),
    "return not nan": (
        changed(episode_return=lambda it: it.episode_return.nan_to_num(0.0)),
        "step().episode_return must be NaN where no episode ended, got 0.0 in environment 0.",
    ),
    "return wrong": (
        changed(episode_return=lambda it: it.episode_return * 1.01),
        "step().episode_return must be the sum of the episode's rewards, got ",
    ),
    "return missing": (
        changed(episode_return=lambda it: it.episode_return * math.nan),
        "step().episode_return must be the sum of the episode's rewards, got nan in environment ",
    ),
    "length counts on": (
        changed(episode_length=lambda it: it.episode_length + (~ended(it)).long()),
        "step().episode_length must be 0 where no episode ended, got 1 in environment 0.",
    ),
    "length wrong": (
        changed(episode_length=lambda it: it.episode_length + ended(it).long()),
        "step().episode_length must count the episode's steps, got ",
    ),
}


@pytest.mark.parametrize("name", STEP_PROBLEMS)
def test_a_broken_step_is_named(name: str) -> None:
    env, message = STEP_PROBLEMS[name]
    found = problems(env())
    assert any(line.startswith(f"Broken.{message}") for line in found), found
    if name not in ("reward nan", "obs inf", "obs outside"):  # these break more than one rule
        assert len(found) == 1, found


class ReturnsTuple(Walk):
    def step(self, action: Tensor) -> Any:
        return tuple(super().step(action))


class ReturnsObsOnly(Walk):
    def reset(self) -> Any:
        return super().reset()[0]


class ResetObsShape(Walk):
    def reset(self) -> Any:
        obs, mask = super().reset()
        return {**obs, "actor": obs["actor"][:, :1]}, mask


class ResetInfo(Walk):
    masked = False

    def reset(self) -> Any:
        return super().reset()[0], {}


class StepInfo(Walk):
    masked = False

    def step(self, action: Tensor) -> Any:
        return super().step(action)._replace(action_mask={})


class ForgetsReset(Walk):
    def reset(self) -> Any:
        self.position = self.start()
        return self.observe(self.position), self.mask()


class ReusesReward(Walk):
    shared = torch.zeros(8)

    def step(self, action: Tensor) -> Any:
        result = super().step(action)
        self.shared.copy_(result.reward)
        return result._replace(reward=self.shared)


class ReusesResetObs(Walk):
    obs_space = Box((2,))

    def reset(self) -> Any:
        return self.start_obs(super().reset())

    def start_obs(self, start: Any) -> Any:
        self.held = start[0]
        return start

    def step(self, action: Tensor) -> Any:
        self.held.zero_()
        return super().step(action)


class WritesAction(Walk):
    def step(self, action: Tensor) -> Any:
        result = super().step(action)
        action.add_(1)
        return result


class SavesNumbers(Walk):
    def state_dict(self) -> Any:
        return {**super().state_dict(), "steps": 3}


class SavesViews(Walk):
    def step(self, action: Tensor) -> Any:
        before = self.position
        result = super().step(action)
        self.position = before.copy_(self.position)
        return result

    def state_dict(self) -> Any:
        return {**super().state_dict(), "position": self.position}


class LoadsViews(SavesViews):
    state_dict = Walk.state_dict

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.position = state["position"]


class ForgetsGenerator(Walk):
    def load_state_dict(self, state: Any) -> None:
        generator = self.generator.get_state()
        super().load_state_dict(state)
        self.generator.set_state(generator)


class LoadsAnySize(Walk):
    def load_state_dict(self, state: Any) -> None:
        for name in ("position", "elapsed", "total"):
            setattr(self, name, state[name].clone())
        self.generator.set_state(state["generator"])


class LoadFails(LoadsAnySize):
    def load_state_dict(self, state: Any) -> None:
        self.position.copy_(state["position"])
        super().load_state_dict(state)


class ForgetsSeed(Walk):
    def reseed(self, seed: int) -> None:
        """Accept a seed, and use the old one."""


class RefusesSeed(Walk):
    def reseed(self, seed: int) -> bool:
        return False


class TakesSeed(Walk):
    def reseed(self, seed: int) -> None:
        self.generator.manual_seed(seed)


@pytest.mark.parametrize("env", [RefusesSeed, TakesSeed])
def test_an_environment_takes_seeds_or_says_that_it_does_not(env: type[Walk]) -> None:
    check_env(env(), steps=40)


class NoSaving:
    num_envs = 8
    spaces = Walk().spaces

    def reset(self) -> None: ...
    def step(self, action: Tensor) -> None: ...


class SpacesMethod(Walk):
    def spaces(self) -> Any:
        return None


class NoEnvs(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.num_envs = True


OTHER_PROBLEMS = [
    (ReturnsTuple, "step() must return a StepResult, got tuple."),
    (ReturnsObsOnly, "reset() must return (obs, action_mask), got dict."),
    (ResetObsShape, "reset().obs['actor'] must have shape [8, 2], got [8, 1]."),
    (
        ResetInfo,
        "reset() must return (obs, action_mask), got (obs, info). The mask is None without one. "
        "Gymnasium(...) and Custom(...) adapt environments of Gymnasium's interface.",
    ),
    (StepInfo, "step().action_mask must be declared in EnvSpaces, got groups []."),
    (ForgetsReset, "step().episode_length must count the episode's steps, got 6 in environment "),
    (
        ReusesReward,
        "step().reward must keep its values when stepped on, got others. "
        "Return a tensor that is not written to again.",
    ),
    (ReusesResetObs, "reset().obs must keep its values when stepped on, got others."),
    (WritesAction, "step().action must be left as it was, got another."),
    (SavesNumbers, "state_dict() must hold tensors only, by names, got {'steps': int}."),
    (SavesViews, "state_dict() must return copies, got what later steps change."),
    (LoadsViews, "load_state_dict() must copy, got a state that later steps change."),
    (
        ForgetsGenerator,
        "load_state_dict() must continue bit for bit, got another ",
    ),
    (
        LoadsAnySize,
        "load_state_dict() must raise ValueError for a state of another size, got None.",
    ),
    (
        LoadFails,
        "load_state_dict() must raise ValueError for a state of another size, "
        "got <class 'RuntimeError'>.",
    ),
    (
        NoSaving,
        "members must be num_envs, spaces, reset, step, state_dict, load_state_dict, "
        "got NoSaving without state_dict, load_state_dict.",
    ),
    (SpacesMethod, "spaces must be an EnvSpaces, got <bound method"),
    (NoEnvs, "num_envs must be an integer of at least 1, got True."),
    (
        ForgetsSeed,
        "reseed().seed must decide the next reset, got other observations. "
        "Return False from reseed() if a reset takes no seed.",
    ),
]


@pytest.mark.parametrize(
    ("env", "message"), OTHER_PROBLEMS, ids=lambda it: getattr(it, "__name__", "")
)
def test_a_broken_environment_is_named(env: type[Any], message: str) -> None:
    found = problems(env())
    assert any(line.startswith(f"{env.__name__}.{message}") for line in found), found


class IgnoresSeed(Walk):
    def __init__(self, num_envs: int, seed: int = 0) -> None:
        super().__init__(num_envs, 0)


class GlobalRandomness(Walk):
    def move(self, action: Tensor) -> Tensor:
        return super().move(action) + torch.rand(self.num_envs, 1)

    def state_dict(self) -> Any:
        return {**super().state_dict(), "global": torch.get_rng_state()}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        torch.set_rng_state(state["global"])


class OneMore(Walk):
    def __init__(self, num_envs: int, seed: int = 0) -> None:
        super().__init__(num_envs + 1, seed)


@dataclass(frozen=True, kw_only=True)
class OtherSpaces(WalkSpec):
    def spaces(self) -> EnvSpaces:
        return EnvSpaces(obs=Box((3,)), action=Discrete(2))


class NoSpaces:
    num_envs = 3

    def build(self, device: torch.device, seed: int) -> None: ...


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            WalkSpec(env=IgnoresSeed),
            "WalkSpec.build().seed must make a difference, "
            "got one trajectory for the seeds 0 and 1.",
        ),
        (
            WalkSpec(env=GlobalRandomness),
            "WalkSpec.build().seed must decide everything, got another ",
        ),
        (WalkSpec(env=OneMore), "WalkSpec.num_envs must equal 9, as built, got 8."),
        (OtherSpaces(), "OtherSpaces.spaces() must equal EnvSpaces("),
        (
            NoSpaces(),
            "NoSpaces.members must be num_envs, spaces, build, got NoSpaces without spaces.",
        ),
    ],
)
def test_a_broken_spec_is_named(spec: Any, message: str) -> None:
    found = problems(spec)
    assert len(found) == 1, found
    assert found[0].startswith(message)


def test_all_problems_are_reported_at_once() -> None:
    broken = changed(
        reward=lambda it: it.reward[:, None], terminated=lambda it: it.terminated.float()
    )
    assert len(problems(broken())) == 2
    broken = changed(
        episode_return=lambda it: it.episode_return + 1,
        episode_length=lambda it: it.episode_length + 1,
        truncated=lambda it: it.truncated | it.terminated,
    )
    assert len(problems(broken())) == 4  # length is wrong in both ways


def test_a_deterministic_environment_passes() -> None:
    class Still(Walk):
        def start(self) -> Tensor:
            return torch.zeros(self.num_envs, 2)

        def move(self, action: Tensor) -> Tensor:
            return self.position + action.float().mean(1, True)

    check_env(WalkSpec(env=Still), steps=30)


def test_identical_environments_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Copies(Walk):
        def start(self) -> Tensor:
            return torch.zeros(self.num_envs, 2)

        def move(self, action: Tensor) -> Tensor:
            return self.position + 1

    check_env(Copies(), steps=30)
    assert [it.getMessage() for it in caplog.records] == [
        "Copies: all environments looked alike under random actions, step after step."
    ]


def test_unchecked_resets_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_env(Pendulum(num_envs=2), steps=20)
    assert [it.getMessage() for it in caplog.records] == [
        "Pendulum: no episode ended within 20 steps, so resetting was not checked."
    ]


def test_an_error_of_the_environment_passes_through() -> None:
    class Fails(Walk):
        def step(self, action: Tensor) -> Any:
            raise RuntimeError("simulator exploded")

    with pytest.raises(RuntimeError, match="simulator exploded"):
        check_env(Fails())


def test_more_environments_than_the_memory_holds_are_refused_before_any_is_built() -> None:
    class Huge(CartPole):
        def build(self, device: torch.device, seed: int) -> Any:
            raise AssertionError

    message = r"^Huge.num_envs must give steps that fit into the memory, \d+ GB, got 10{11}, which"
    with pytest.raises(ValueError, match=message):
        check_env(Huge(num_envs=10**11))


def test_a_number_of_steps_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"check_env.steps must be at least 1, got 0."):
        check_env(CartPole(), steps=0)


def test_sampled_actions_keep_bounds_and_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    box = Box((3,), low=(-1.0, -math.inf, 2.0), high=(3.0, math.inf, math.inf))
    action = sample_action(box, 4000, None, generator)
    assert action.amin(0)[0] >= -1
    assert action.amax(0)[0] <= 3
    assert action[:, 0].mean() == pytest.approx(1, abs=0.1)
    assert action[:, 1].std() == pytest.approx(1, abs=0.1)
    assert action[:, 2].min() >= 2
    mask = torch.tensor([[True, False, False, True, True]]).repeat(4000, 1)
    action = sample_action(MultiDiscrete((2, 3)), 4000, mask, generator)
    assert action.shape == (4000, 2)
    assert action[:, 0].unique().tolist() == [0]
    assert action[:, 1].unique().tolist() == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_synchronisation_is_named_and_the_mode_restored() -> None:
    check_env(CartPole(num_envs=64), steps=60, device="cuda")

    class Asks:
        def __init__(self) -> None:
            self.env = CartPole(num_envs=8).build(torch.device("cuda"), 0)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.env, name)

        def step(self, action: Tensor) -> StepResult:
            result = self.env.step(action)
            result.terminated.any().item()
            return result

    found = problems(Asks())
    assert found[0].startswith("Asks.step() must not wait for the device")
    assert torch.cuda.get_sync_debug_mode() == 0


class Bare:
    """An environment with the members of the protocol and no others."""

    def __init__(self, env):
        self.reset, self.step = env.reset, env.step
        self.state_dict, self.load_state_dict = env.state_dict, env.load_state_dict


class BareSpec:
    num_envs = 4

    def spaces(self):
        return CartPole().spaces()

    def build(self, device, seed):
        return Bare(CartPole(num_envs=4).build(device, seed))


def test_an_environment_with_a_spec_needs_no_number_and_spaces_of_its_own():
    check_env(BareSpec(), steps=50)
    with pytest.raises(ValueError, match="got Bare without num_envs, spaces"):
        check_env(BareSpec().build(torch.device("cpu"), 0))


# --- environments whose rollouts are compiled ---


def built(transition: Any) -> Any:
    original = AutoresetEnv.transition

    class Both(AutoresetEnv):
        def step(self, action: Tensor) -> StepResult:
            episodes, result = original(self, self.episodes(), action, self.draw(1)[0])
            self.keep(episodes)
            return result

        def transition(self, *args: Any) -> Any:
            return transition(self, *args)

    return Both(CartPole(num_envs=4, time_limit=9), device=torch.device("cpu"), seed=0)


def test_a_transition_that_equals_the_step_is_accepted() -> None:
    check_env(built(AutoresetEnv.transition), steps=30)


def test_a_transition_that_differs_from_the_step_is_named() -> None:
    def other(env: Any, *args: Any) -> Any:
        episodes, result = AutoresetEnv.transition(env, *args)
        return episodes, result._replace(reward=2.0 * result.reward)

    with pytest.raises(ValueError, match=r"transition\(\) must do what step\(\) does"):
        check_env(built(other), steps=30)


def test_a_transition_that_changes_the_environment_is_named() -> None:
    def writing(env: Any, episodes: Any, *args: Any) -> Any:
        after = AutoresetEnv.transition(env, episodes, *args)
        episodes.elapsed.add_(1)
        return after

    with pytest.raises(ValueError, match=r"transition\(\) must change nothing"):
        check_env(built(writing), steps=30)


def test_a_class_in_place_of_an_environment_is_refused() -> None:
    rule = r"^check_env.env must be a spec or an environment, not a class, got CartPole"
    with pytest.raises(ValueError, match=rule):
        inspect.unwrap(check_env)(CartPole)  # without the type checks of the test run
