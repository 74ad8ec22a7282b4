"""Environments of Gymnasium, by their names."""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from esper_lightning.core.errors import check_fields, require, require_int
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.envs.adapters.host import HostEnv
from esper_lightning.envs.adapters.spaces import read_spaces
from esper_lightning.envs.adapters.workers import WorkerEnv
from esper_lightning.envs.base import EnvSpec

__all__ = ["Gymnasium"]

_SEEDS = 2**31
_probed: dict[str, EnvSpaces] = {}


@dataclass(frozen=True, kw_only=True)
class Gymnasium(EnvSpec):
    """Single environments of Gymnasium, stepped one after another or in worker processes.

    Any registered environment will do: classic control, Box2D, MuJoCo, ALE, MiniGrid and others.
    Episodes end as Gymnasium says: by ``terminated``, or by ``truncated`` at a time limit. Actions
    of a box are scaled from [-1, 1] to its bounds. Checkpoints hold no simulator: a resumed run
    begins new episodes.

    Attributes:
        id: Name of the environment, such as ``HalfCheetah-v5``, or ``package:Name-v0`` where
            importing ``package`` registers the name.
        num_envs: Environments on each rank.
        kwargs: Arguments of the environment.
        wrappers: Import paths of wrappers, the innermost first.
        workers: Processes that share the environments; 0 steps them in this process.
        mask: Entry of ``info`` that holds action masks; ``None`` if the entry ``action_mask`` of a
            ``Dict`` observation holds them, or if every action is always allowed.
    """

    id: str
    num_envs: int = 8
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    wrappers: tuple[str, ...] = ()
    workers: int = field(default=0, metadata={"how": True})
    mask: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        require_int("Gymnasium.num_envs", self.num_envs, minimum=1)
        require_int("Gymnasium.workers", self.workers, minimum=0)
        require(bool(self.id), "Gymnasium.id", "name a registered environment", self.id)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def name(self) -> str:
        """Name of the task in messages and run directories."""
        return self.id

    def spaces(self) -> EnvSpaces:
        """Observation and action spaces of one environment, which is made once to read them.

        Raises:
            ValueError: If there is no such environment, its package is not installed, or a space
                has no counterpart.
        """
        key = repr(dataclasses.replace(self, num_envs=1, workers=0))
        if key not in _probed:
            env = self._one()
            try:
                obs, action = env.observation_space, env.action_space
                _probed[key] = read_spaces(obs, action, masked=self.mask is not None)
            finally:
                env.close()
        return _probed[key]

    def build(self, device: torch.device, seed: int) -> HostEnv:
        """Make the environments, in this process or in workers."""
        self.spaces()  # reports a mistake from here and not from within a worker
        env: Any = (
            WorkerEnv(self._vector, self.num_envs, self.workers, name=self.id)
            if self.workers
            else self._vector(self.num_envs)
        )
        return HostEnv(env, device, seed % _SEEDS, name=self.id, mask=self.mask, resets_rows=True)

    def evaluation_spec(self, episodes: int) -> "Gymnasium":
        """Environments of an evaluation: at most those of training, each for several episodes."""
        return dataclasses.replace(self, num_envs=min(episodes, self.num_envs), workers=0)

    def _vector(self, num_envs: int) -> Any:
        from gymnasium.vector import AutoresetMode, SyncVectorEnv  # noqa: PLC0415

        return SyncVectorEnv(
            [self._one] * num_envs, copy=False, autoreset_mode=AutoresetMode.DISABLED
        )

    def _one(self) -> Any:
        """One environment with its wrappers.

        Raises:
            ValueError: If there is no such environment, its package is not installed, or its
                arguments are refused.
        """
        wrappers = [_import("Gymnasium.wrappers", path) for path in self.wrappers]
        hint = "Install it with: pip install 'esper_lightning[gymnasium]'."
        try:
            import gymnasium  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise ValueError(f"Gymnasium.id={self.id!r} needs gymnasium. {hint}") from error
        try:
            env: Any = gymnasium.make(self.id, disable_env_checker=True, **self.kwargs)
        except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"Gymnasium.id={self.id!r} needs a package: {why}. {hint}") from error
        except gymnasium.error.UnregisteredEnv as error:
            why = " ".join(str(error).split())
            rule = f"name a registered environment, got {self.id!r}. {why}"
            raise ValueError(f"Gymnasium.id must {rule}") from error
        except (gymnasium.error.Error, TypeError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"Gymnasium.id={self.id!r} cannot be made: {why}") from error
        for wrapper in wrappers:
            env = wrapper(env)
        return env


def _import(owner: str, path: str) -> Callable[..., Any]:
    """The object that an import path names.

    Raises:
        ValueError: If it cannot be imported; the error names the setting ``owner``.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{owner} must name importable wrappers, got {path!r}.") from error
