"""Small simulators with the interfaces of other projects, and with the traps of those."""

import importlib
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete


class Counter(gymnasium.Env):
    """An environment that counts steps, and ends after ``length`` by truncation or termination.

    Each episode has another length if the environment ``varies``. The first count is random, so
    that a reset is visible; observations have the groups and dtypes that ``kind`` asks for.
    """

    def __init__(
        self, length: int = 5, *, truncates: bool = True, kind: str = "box", varies: bool = False
    ) -> None:
        self._length, self._truncates, self._kind = length, truncates, kind
        self._varies = varies
        self.observation_space = {
            "box": Box(-1e3, 1e3, (2,), np.float64),
            "empty": Box(-1.0, 1.0, (0,)),
            "image": Box(0, 255, (3, 8, 8), np.uint8),
            "number": Box(-1e3, 1e3, (), np.float64),
            "discrete": Discrete(2000, start=5000),
            "multi": MultiDiscrete([3, 4], start=[11, 12]),
            "binary": MultiBinary(3),
            "dict": Dict(
                {
                    "place": Box(-1e3, 1e3, (2,), np.float64),
                    "kind": Discrete(3, start=1),
                    "action_mask": Box(0, 1, (3,), np.int8),
                }
            ),
        }[kind]
        self.action_space = {
            "discrete": Discrete(3, start=5),
            "multi": MultiBinary(2),
            "box": Box(-2.0, 2.0, (1,), np.float32),
        }.get(kind, Discrete(3))
        self.steps, self.start, self.actions = 0, 0.0, []

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps, self.start = 0, float(np.round(self.np_random.uniform(10, 90), 3))
        if seed is not None:
            self.first_start = self.start
        if self._varies:
            self._length = int(self.np_random.integers(2, 6))
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), (action, self.action_space)
        self.actions.append(action)
        self.steps += 1
        over = self.steps >= self._length
        flags = (over and not self._truncates, over and self._truncates)
        return self._obs(), 1.0 + self.steps / 8, *flags, {}

    def _obs(self) -> Any:
        if self._kind == "image":
            return np.full((3, 8, 8), (int(self.start) + self.steps) % 256, np.uint8)
        if self._kind in ("number", "discrete"):
            count = self.start + self.steps
            return int(count) + 5000 if self._kind == "discrete" else np.float64(count)
        if self._kind == "multi":
            return np.array([11 + self.steps % 3, 12 + int(self.start) % 4])
        if self._kind == "binary":
            return np.array([self.steps % 2, 1, int(self.start) % 2], np.int8)
        place = np.array([self.start, self.steps], np.float64)
        if self._kind == "dict":
            mask = np.array([1, self.steps % 2, 0], np.int8)
            return {"place": place, "kind": 1 + self.steps % 3, "action_mask": mask}
        return place


class Masked(Counter):
    """An environment whose action masks are in ``info``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.action_space = Discrete(3)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        obs, _ = super().reset(seed=seed)
        return obs, {"allowed": self._mask()}

    def step(self, action: Any) -> Any:
        assert self._allowed[action], action
        *rest, _ = super().step(action)
        return *rest, {"allowed": self._mask()}

    def _mask(self) -> Any:
        self._allowed = np.array([True, self.steps % 2 == 0, int(self.start) % 2 == 0])
        return self._allowed


class Rarely(Masked):
    """An environment whose ``info`` has masks in the steps with these numbers, 0 for the reset."""

    def __init__(self, *, with_masks: tuple[int, ...] = (0,), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._with_masks = with_masks

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        obs, info = super().reset(seed=seed)
        return obs, self._some(info)

    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        return *rest, self._some(info)

    def _some(self, info: Any) -> Any:
        if self.steps in self._with_masks:
            return {**info, "seconds": 1.0}
        self._allowed = np.ones(3, bool)
        return {"seconds": 1.0}


class Dying(Counter):
    """An environment whose process dies in the third step."""

    def step(self, action: Any) -> Any:
        if self.steps == 2:
            import os  # noqa: PLC0415
            import signal  # noqa: PLC0415

            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Failing(Counter):
    """An environment that raises in the third step."""

    def step(self, action: Any) -> Any:
        if self.steps == 2:
            raise RuntimeError("the gripper is stuck")
        return super().step(action)


class Rising(Counter):
    """An environment with a curriculum: the first count is 100 and the iteration."""

    def begin_iteration(self, progress: Any) -> None:
        self.level = 100.0 + progress.iteration

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.start = getattr(self, "level", 0.0)
        return self._obs(), {}


class Numbered(gymnasium.vector.SyncVectorEnv):
    """A vector environment of its own package, with each mode of resetting itself."""

    def __init__(self, num_envs: int, *, autoreset_mode: str, kind: str = "box", **kwargs: Any):
        kind_of = {"masked": Masked}.get(kind, lambda **given: Counter(kind=kind, **given))
        makers = [lambda: kind_of(**kwargs)] * num_envs
        super().__init__(makers, autoreset_mode=gymnasium.vector.AutoresetMode(autoreset_mode))


class Deaf(Numbered):
    """A vector environment that hears no options, and starts each episode in the same state."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(seed=0)


def one_of_numbered(*, autoreset_mode: str = "", kind: str = "box", **kwargs: Any) -> Any:
    """The single environment of ``Numbered``."""
    return Masked(**kwargs) if kind == "masked" else Counter(kind=kind, **kwargs)


for name, made in (("Numbered", Numbered), ("Deaf", Deaf)):
    gymnasium.register(f"Esper{name}-v0", one_of_numbered, vector_entry_point=made)


for name, made in (
    ("Counter", Counter),
    ("Masked", Masked),
    ("Rarely", Rarely),
    ("Dying", Dying),
    ("Failing", Failing),
    ("Rising", Rising),
):
    gymnasium.register(f"Esper{name}-v0", made)


class Points:
    """Points that drift: the state that every simulator below shares, and its episode lengths."""

    def __init__(self, num_envs: int, *, limit: int = 6, seed: int = 0, **_: Any) -> None:
        self.num_envs, self.limit, self.device = num_envs, limit, "cpu"
        self.generator = torch.Generator().manual_seed(seed)
        self.state = torch.zeros(num_envs, 2)
        self.steps = torch.zeros(num_envs, dtype=torch.int64)
        self.reward = torch.zeros(num_envs)
        self.closed = 0

    def begin(self, rows: torch.Tensor) -> None:
        fresh = torch.rand(self.num_envs, 2, generator=self.generator) * 2 - 1
        self.state[rows] = fresh[rows]
        self.steps[rows] = 0

    def advance(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether points fell, and whether their time is over."""
        self.state[:, 1] += 0.4 * action.reshape(self.num_envs, -1)[:, 0].clamp(-1, 1)
        self.state[:, 0] += 0.4 * self.state[:, 1]
        self.steps += 1
        self.reward[:] = 1 - self.state.square().sum(1)
        return self.state[:, 0].abs() > 1.5, self.steps >= self.limit

    def close(self) -> None:
        self.closed += 1


class TorchFive(Points):
    """Isaac Lab's interface: five tensors, buffers that are reused, a log that stays."""

    def __init__(self, num_envs: int, *, says_final: bool = True, **kwargs: Any) -> None:
        super().__init__(num_envs, **kwargs)
        self.says_final, self.extras = says_final, {}
        self.single_action_space = SimpleNamespace(shape=(1,))

    @property
    def unwrapped(self) -> "TorchFive":
        return self

    def reset(self, *, seed: int | None = None) -> Any:
        if seed is not None:
            self.generator.manual_seed(seed)
        self.begin(torch.ones(self.num_envs, dtype=torch.bool))
        return {"policy": self.state}, {}

    def step(self, action: torch.Tensor) -> Any:
        fell, over = self.advance(action)
        ended = fell | over
        if self.says_final:
            self.extras["final_obs"] = {"policy": self.state.clone()} if ended.any() else None
        if ended.any():
            self.extras["log"] = {"Episode/hold": self.reward[ended].mean()}
        self.begin(ended)
        return {"policy": self.state}, self.reward, fell, over, self.extras


class ManiSkill(Points):
    """ManiSkill's environments without a vector wrapper: five tensors, and no resets."""

    def __init__(self, num_envs: int, **kwargs: Any) -> None:
        super().__init__(num_envs, **kwargs)
        self.single_action_space = SimpleNamespace(shape=(1,))

    @property
    def unwrapped(self) -> "ManiSkill":
        return self

    @property
    def elapsed_steps(self) -> torch.Tensor:
        return self.steps

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            self.generator.manual_seed(seed)
        rows = torch.zeros(self.num_envs, dtype=torch.bool)
        rows[(options or {}).get("env_idx", slice(None))] = True
        self.begin(rows)
        return self.state, {}

    def step(self, action: torch.Tensor) -> Any:
        return self.state, self.reward, *self.advance(action), {}


class ManiSkillVector:
    """ManiSkill's vector wrapper, which resets rows if it has ``auto_reset``."""

    def __init__(self, env: Any, *, auto_reset: bool) -> None:
        self._env, self.auto_reset, self.reset = env, auto_reset, env.reset

    @property
    def unwrapped(self) -> ManiSkill:
        return self._env.unwrapped

    def step(self, action: torch.Tensor) -> Any:
        obs, reward, fell, over, info = self._env.step(action)
        ended = fell | over
        if self.auto_reset and ended.any():
            info = {"final_observation": obs.clone()}
            self.unwrapped.begin(ended)
        return obs, reward, fell, over, info


class Wrapper:
    """A wrapper of Gymnasium, which hides the attributes of what it wraps."""

    def __init__(self, env: Any) -> None:
        self.env, self.reset, self.step = env, env.reset, env.step

    @property
    def unwrapped(self) -> Any:
        return self.env.unwrapped


class RslRl(Points):
    """rsl_rl's interface: four results, time-outs beside failures, no last observation.

    With ``privileged`` there are five, as in legged_gym and unitree_rl_gym: the second one holds
    the privileged observations (``"some"``), or is None where there are none (``"none"``).
    """

    def __init__(self, num_envs: int, *, privileged: str = "", **kwargs: Any) -> None:
        super().__init__(num_envs, **kwargs)
        self.num_actions, self.extras, self.privileged = 1, {}, privileged
        self.begin(torch.ones(num_envs, dtype=torch.bool))

    def get_observations(self) -> Any:
        return self.state

    def reset(self) -> Any:
        self.begin(torch.ones(self.num_envs, dtype=torch.bool))
        return self.state, self.seen_by_critic()

    def seen_by_critic(self) -> Any:
        return torch.ones(self.num_envs, 5) if self.privileged == "some" else None

    def step(self, action: torch.Tensor) -> Any:
        fell, over = self.advance(action)
        ended = fell | over
        self.extras["time_outs"] = over.clone()
        if ended.any():
            self.extras["episode"] = {"rew_hold": self.reward[ended].mean()}
        self.begin(ended)
        more = (self.seen_by_critic(),) if self.privileged else ()
        return self.state, *more, self.reward, ended.long(), self.extras


class VmasLike(Points):
    """VMAS's interface: worlds of agents, lists of tensors, resets of one world at a time."""

    def __init__(self, num_envs: int, *, agents: int = 2, **kwargs: Any) -> None:
        super().__init__(num_envs * agents, **kwargs)
        self.worlds, self.agents = num_envs, [object()] * agents
        spaces = [Box(-np.inf, np.inf, (2,), np.float32)] * agents
        self.observation_space = SimpleNamespace(spaces=spaces)
        self.action_space = SimpleNamespace(spaces=[Box(-1, 1, (1,), np.float32)] * agents)

    @property
    def num_envs(self) -> int:
        return self.worlds if hasattr(self, "worlds") else self._rows

    @num_envs.setter
    def num_envs(self, value: int) -> None:
        self._rows = value

    def _lists(self, value: torch.Tensor) -> list[torch.Tensor]:
        return list(value.view(self.worlds, len(self.agents), *value.shape[1:]).unbind(1))

    def begin(self, rows: torch.Tensor) -> None:
        fresh = torch.rand(len(rows), 2, generator=self.generator) * 2 - 1
        self.state[rows] = fresh[rows]
        self.steps[rows] = 0

    def advance(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.state[:, 0] += 0.2 * action.reshape(len(self.state), -1)[:, 0]
        self.steps += 1
        self.reward[:] = -self.state[:, 0].abs()
        return self.state[:, 0].abs() > 1.5, self.steps >= self.limit

    def reset(self, *, seed: int | None = None) -> Any:
        if seed is not None:
            self.generator.manual_seed(seed)
        self.begin(torch.ones(len(self.state), dtype=torch.bool))
        return self._lists(self.state)

    def reset_at(self, index: int, *, return_observations: bool) -> None:
        rows = torch.zeros(self.worlds, len(self.agents), dtype=torch.bool)
        rows[index] = True
        self.begin(rows.flatten())

    def get_from_scenario(self, **_: bool) -> Any:
        return [self._lists(self.state)]

    def step(self, actions: list[torch.Tensor]) -> Any:
        fell, over = self.advance(torch.stack(actions, 1).flatten(0, 1))
        fell, over = (flag.view(self.worlds, -1).any(1) for flag in (fell, over))
        return self._lists(self.state), self._lists(self.reward), fell, over, {}


def make_torch_five(
    *, num_envs: int, device: str, seed: int, kind: type[TorchFive] = TorchFive, **kwargs: Any
) -> TorchFive:
    assert device == "cpu"
    return kind(num_envs, seed=seed, **kwargs)


def make_rsl_rl(
    *, num_envs: int, device: str, seed: int, kind: type[RslRl] = RslRl, **kwargs: Any
) -> RslRl:
    assert device == "cpu"
    return kind(num_envs, seed=seed, **kwargs)


def make_vmas(*, num_envs: int, device: str, seed: int, **kwargs: Any) -> VmasLike:
    assert device == "cpu"
    return VmasLike(num_envs, seed=seed, **kwargs)


def make_missing(num_envs: int, device: str, seed: int) -> object:
    """Needs a package that is not installed."""
    return importlib.import_module("no_such_package")


def make_nothing(**_: Any) -> object:
    return object()


def make_faulty(**_: Any) -> object:
    return 1 + "one"  # type: ignore[operator]


def make_nothing_at_all(*, num_envs: int, device: str, seed: int) -> object:
    raise AssertionError((num_envs, device, seed))
