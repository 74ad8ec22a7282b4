"""The environment protocol: what a simulator implements; ``check_env`` verifies it."""

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.types import Observation, StepResult

__all__ = ["BatchedEnv", "EnvSpec", "FunctionalEnv", "MeasuringEnv", "is_functional"]


@runtime_checkable
class BatchedEnv(Protocol):
    """``B`` environments as tensors on one device.

    An environment whose episode ended resets itself in the same step. A step makes no host-device
    copy and no synchronisation, and writes into nothing that it returned before.
    """

    def reset(self) -> tuple[Observation, Bool[Tensor, "B K"] | None]:
        """Start a new episode everywhere; returns observation and mask (``None`` if unmasked)."""
        ...

    def step(self, action: Shaped[Tensor, "B *A"]) -> StepResult:
        """Act in every environment."""
        ...

    def state_dict(self) -> dict[str, Tensor] | None:
        """Everything that decides the future, copied: simulator, episodes, random stream.

        ``None`` where a simulator cannot tell: a resumed run then begins new episodes.
        """
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a ``state_dict`` bit for bit.

        Raises:
            ValueError: If it comes from an environment of another size.
        """
        ...


@runtime_checkable
class FunctionalEnv(BatchedEnv, Protocol):
    """An environment whose step is also a pure function: a rollout of it can be compiled whole.

    ``step(action)`` is ``transition(episodes(), action, draw(1)[0])`` followed by ``keep``. A class
    that replaces ``step`` replaces ``transition`` too, or is stepped. Where it is compiled, only
    ``episodes`` may change: other attributes are read once.
    """

    def episodes(self) -> Any:
        """Everything that a step changes, but for the random stream: a tuple of tensors."""
        ...

    def keep(self, episodes: Any) -> None:
        """Go on from ``episodes``."""
        ...

    def draw(self, steps: int) -> Any:
        """What so many steps need of the random stream: a tensor ``[T, B, ...]``, or a tuple."""
        ...

    def transition(
        self, episodes: Any, action: Shaped[Tensor, "B *A"], drawn: Any
    ) -> tuple[Any, StepResult]:
        """The step: episodes after it and what it returns, from one row of ``draw``."""
        ...


@runtime_checkable
class MeasuringEnv(BatchedEnv, Protocol):
    """An environment that has metrics of its own, beside returns and lengths of episodes."""

    def metrics(self) -> dict[str, Float[Tensor, ""]]:
        """Means over environments and steps since the last call, under names that never change.

        History has them as ``env/<name>``. Not waiting for the device is up to the environment.
        """
        ...


class EnvSpec(ABC):
    """Which environments to build: data without tensors, to be written, copied and compared.

    A frozen dataclass that derives from this can be named in a config by its class alone. Any other
    class with ``num_envs``, ``spaces`` and ``build`` will do as well.
    """

    num_envs: int
    """``B``: environments on each rank."""

    @abstractmethod
    def spaces(self) -> EnvSpaces:
        """What the environments will show and take."""

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


def is_functional(env: BatchedEnv) -> bool:
    """Whether ``transition`` is what ``step`` does.

    Asked of the class alone: a wrapper may pass on what it does not have, and a subclass or an
    instance may have replaced ``step`` and nothing else.
    """
    kinds = type(env).__mro__
    owner = {
        name: next((i for i, kind in enumerate(kinds) if name in vars(kind)), len(kinds))
        for name in ("step", "transition", "episodes", "keep", "draw")
    }
    known = max(owner.values()) < len(kinds) and "step" not in vars(env)
    return known and owner["transition"] <= owner["step"]
