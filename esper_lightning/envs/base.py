"""The environment protocol, which a simulator implements and ``check_env`` verifies."""

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.types import Observation, StepResult

__all__ = [
    "BatchedEnv",
    "EnvSpec",
    "FunctionalEnv",
    "MeasuringEnv",
    "RunProgress",
    "built_env",
    "close_env",
    "closed_after_error",
    "how_fields",
    "is_functional",
    "reseed_env",
    "spec_name",
    "takes_num_envs",
]


class RunProgress(NamedTuple):
    """How far a run is; a resumed run has the numbers of its checkpoint."""

    iteration: int  # iterations finished
    env_steps: int  # environment steps taken, over all environments of all ranks
    planned_env_steps: int | None  # after which the run will end; None without a limit


@runtime_checkable
class BatchedEnv(Protocol):
    """``B`` environments as tensors on one device.

    An environment whose episode ended resets itself in the same step. A step makes no host-device
    copy and no synchronisation, and does not write into tensors that an earlier call returned.

    Four further methods are called where an environment has them. ``close()`` is called at the end
    of a run, for what holds processes or windows. After ``reseed(seed)`` the next ``reset`` starts
    as in environments that were built with the seed, or the method returns False because it cannot
    seed them; an environment that can be reseeded is built once for all evaluations, and a
    functional one is evaluated in native code on a CPU.
    ``begin_iteration(progress)`` is for curricula: it is called with a ``RunProgress`` before each
    iteration of training, and before the first reset of a run. It must depend on ``progress``
    alone, so that a resumed run continues the curriculum. ``render()`` returns pictures of all
    environments as they are now, uint8 ``[B, H, W, 3]`` with red, green and blue, for videos; the
    attribute ``frames_per_s`` says how many of them show a second (30 where there is none).
    """

    def reset(self) -> tuple[Observation, Bool[Tensor, "B K"] | None]:
        """Start a new episode everywhere; return observation and mask (``None`` if unmasked)."""
        ...

    def step(self, action: Shaped[Tensor, "B *A"]) -> StepResult:
        """Act in every environment.

        Args:
            action: One action for each environment, in the form that the action space describes.
        """
        ...

    def state_dict(self) -> dict[str, Tensor] | None:
        """Copies of everything that determines the future: simulator, episodes, random stream.

        ``None`` where a simulator cannot save its state: a resumed run then begins new episodes.
        """
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a ``state_dict`` bit for bit.

        Raises:
            ValueError: If the state comes from an environment of another size.
        """
        ...


@runtime_checkable
class FunctionalEnv(BatchedEnv, Protocol):
    """An environment whose step is also a pure function, so that rollouts can be compiled whole.

    ``step(action)`` is ``transition(episodes(), action, draw(1)[0])`` followed by ``keep``. A class
    that replaces ``step`` must replace ``transition``, too; otherwise its rollouts are not
    compiled. In compiled rollouts only ``episodes`` may change. Once an attribute that
    ``transition`` reads has changed, rollouts on a CPU run eagerly; CUDA reads attributes once.
    ``begin_iteration`` may therefore change ``episodes`` and what ``draw`` returns, nothing else.
    """

    def episodes(self) -> Any:
        """Everything that a step changes, except the random stream: a tuple of tensors."""
        ...

    def keep(self, episodes: Any) -> None:
        """Store ``episodes`` as the current episodes.

        The rollout after the next one may reuse their memory: copy what is kept for longer.
        """
        ...

    def draw(self, steps: int) -> Any:
        """Sample the random numbers of the next steps from the environment's own stream.

        Args:
            steps: Number of steps, ``T``.

        Returns:
            A tensor ``[T, B, ...]``, or a tuple of such tensors.
        """
        ...

    def transition(
        self, episodes: Any, action: Shaped[Tensor, "B *A"], drawn: Any
    ) -> tuple[Any, StepResult]:
        """Take one step as a pure function, with random numbers that were sampled before.

        Args:
            episodes: Episodes before the step, which must not be written to.
            action: Action of each environment.
            drawn: Random numbers of this step: one row ``[B, ...]`` of what ``draw`` returned.

        Returns:
            The episodes after the step, and the result of the step.
        """
        ...


@runtime_checkable
class MeasuringEnv(BatchedEnv, Protocol):
    """An environment that has metrics of its own, beside returns and lengths of episodes."""

    def metrics(self) -> dict[str, Float[Tensor, ""]]:
        """Means over environments and steps since the last call, under names that never change.

        The history has each metric as ``env/<name>``. The environment must not wait for the device.
        """
        ...


class EnvSpec(ABC):
    """Settings of the environments to build: data without tensors, to write, copy and compare.

    A frozen dataclass that derives from ``EnvSpec`` can be named in a config by its class alone.
    Any other class with ``num_envs``, ``spaces`` and ``build`` works as well.

    Five further members are used where a spec has them. ``name`` is the name of the task in
    messages and run directories, in place of that of the class. ``evaluation_spec(episodes)``
    returns the environments of an evaluation, fewer than the episodes perhaps. ``rendering_spec()``
    returns environments whose ``render`` works, where those of training must be built otherwise.
    ``shared`` says that ``build`` always returns the same simulator: training then starts new
    episodes after each evaluation. Such a simulator is not closed at the end of a run; instead
    ``release()`` of the spec is called once for each call of ``build``, where a spec has it.
    ``random_streams`` are the names of the entries of ``BatchedEnv.state_dict`` that are states
    of generators on the device; every other entry has the axis ``B`` first. Environments with
    it can be dealt anew to another number of ranks (``PPO(redeal=True)``). A dataclass field
    with ``metadata={"how": True}`` says how environments run, and not what they are: it may
    differ between a checkpoint and the run that resumes it.
    """

    num_envs: int
    """``B``: number of environments on each rank."""

    @abstractmethod
    def spaces(self) -> EnvSpaces:
        """Spaces of the observations and actions of the environments."""

    @abstractmethod
    def build(self, device: torch.device, seed: int) -> BatchedEnv:
        """Allocate the environments on ``device`` with their own random stream."""

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:  # a bool or NotImplemented
        if cls is not EnvSpec:
            return NotImplemented
        return (
            all(callable(getattr(other, name, None)) for name in ("spaces", "build"))
            or NotImplemented
        )


@runtime_checkable
class ReadsData(Protocol):
    """A spec whose environments read data from files, which may be missing or broken."""

    def check_data(self, device: torch.device) -> None:
        """Refuse data from which no environment can be built.

        Args:
            device: Where the environments will be built.

        Raises:
            ValueError: Naming the setting and what is wrong.
        """
        ...


def spec_name(spec: object) -> str:
    """Name of the task of a spec in messages and run directories."""
    name = getattr(spec, "name", None)
    return name if isinstance(name, str) and name else type(spec).__name__


def how_fields(spec: object) -> frozenset[str]:
    """Fields of a spec, and of specs within, that say how environments run, not what they are."""
    if not dataclasses.is_dataclass(spec):
        return frozenset()
    fields = dataclasses.fields(spec)
    own = frozenset(each.name for each in fields if each.metadata.get("how"))
    within = (getattr(spec, each.name) for each in fields)
    return own.union(*(how_fields(each) for each in within if isinstance(each, EnvSpec)))


def takes_num_envs(spec: object) -> bool:
    """Whether a spec can be copied with another number of environments."""
    fields = dataclasses.fields(spec) if dataclasses.is_dataclass(spec) else ()
    return any(each.name == "num_envs" and each.init for each in fields)


def close_env(spec: object, env: object) -> None:
    """Close an environment that can be closed; a shared one is released, as its spec defines."""
    method = (spec, "release") if getattr(spec, "shared", False) else (env, "close")
    close = getattr(*method, None)
    if env is not None and callable(close):
        close()


@contextlib.contextmanager
def built_env(spec: EnvSpec, device: torch.device, seed: int) -> Generator[BatchedEnv]:
    """The environments of a spec, closed where the context ends."""
    env = spec.build(device, seed)
    try:
        yield env
    finally:
        close_env(spec, env)


@contextlib.contextmanager
def closed_after_error(env: object, spec: object = None) -> Generator[None]:
    """Close environments that were built if the context, which prepares them, raises an error.

    Args:
        env: Environments or a simulator, closed where they have ``close``.
        spec: Spec that built the environments; ``None`` for a simulator.
    """
    try:
        yield
    except BaseException:
        close_env(spec, env)
        raise


def reseed_env(env: object, seed: int) -> bool:
    """Have the next reset of an environment seed everything random; whether it can."""
    reseed = getattr(env, "reseed", None)
    return callable(reseed) and reseed(seed) is not False


def is_functional(env: BatchedEnv) -> bool:
    """Whether ``transition`` does the same as ``step``.

    Only the class is inspected: a wrapper may forward methods that it does not have, and a subclass
    or an instance may have replaced ``step`` and nothing else.
    """
    kinds = type(env).__mro__
    owner = {
        name: next((i for i, kind in enumerate(kinds) if name in vars(kind)), len(kinds))
        for name in ("step", "transition", "episodes", "keep", "draw")
    }
    known = max(owner.values()) < len(kinds) and "step" not in vars(env)
    return known and owner["transition"] <= owner["step"]
