"""Environments of Gymnasium, by their names."""

import contextlib
import dataclasses
import inspect
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch

from esper_lightning.core.errors import require, require_int
from esper_lightning.core.imports import import_object
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.envs.adapters.host import HostEnv, require_mask_entry
from esper_lightning.envs.adapters.named import (
    SEEDS,
    NamedSpec,
    needs_package,
    require_package,
)
from esper_lightning.envs.adapters.serial import SerialEnv
from esper_lightning.envs.adapters.spaces import read_spaces
from esper_lightning.envs.adapters.workers import WorkerEnv
from esper_lightning.envs.base import closed_after_error

__all__ = ["Gymnasium"]

_INSTALL = "'esper_lightning[gymnasium]'"
_INSTALLS = {
    **dict.fromkeys(("Box2D", "gymnasium", "mujoco", "pygame"), _INSTALL),
    "ale_py": "'esper_lightning[atari]'",
    "jax": "'esper_lightning[jax]'",
    "minigrid": "'esper_lightning[minigrid]'",
}
"""What ``pip install`` takes for packages that environments need."""
_NATIVE = "with Gymnasium.native=True"
_HINT = "Set Gymnasium.native=False, which steps single environments."


@dataclass(frozen=True, kw_only=True)
class Gymnasium(NamedSpec):
    """Environments of Gymnasium, stepped one by one, in worker processes, or all at once.

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
        native: Whether the package's own vector environment steps all environments at once, where
            the environment is registered with one (``vector_entry_point``). It has other
            ``kwargs``, takes no wrappers and no workers, and must reset single environments or
            return what an episode reached.
        mask: Entry of ``info`` that holds action masks; ``None`` if the entry ``action_mask`` of a
            ``Dict`` observation holds them, or if every action is always allowed. The ``info``
            of a reset must have the entry; after a step without it, every action is allowed.
    """

    num_envs: int = 8
    wrappers: tuple[str, ...] = ()
    workers: int = field(default=0, metadata={"how": True})
    mask: str | None = None
    native: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("Gymnasium.workers", self.workers, minimum=0)
        if self.native:
            require(self.workers == 0, "Gymnasium.workers", f"be 0 {_NATIVE}", self.workers)
            rule, none = f"be empty {_NATIVE}", len(self.wrappers) == 0
            require(none, "Gymnasium.wrappers", rule, self.wrappers)

    __hash__ = NamedSpec.__hash__

    def spaces(self) -> EnvSpaces:
        """Observation and action spaces of one environment, which is made once to read them.

        Raises:
            ValueError: If there is no such environment, its package is not installed, a space has
                no counterpart, or a native vector environment cannot reset single environments.
        """

        def read() -> EnvSpaces:
            if self.native:
                env = self._native(2, torch.device("cpu"), 0)
                try:
                    env.reset()  # which asks for the entry of masks
                    return env.spaces
                finally:
                    env.close()
            env = self._one()
            try:
                obs, action = env.observation_space, env.action_space
                if self.mask is not None:
                    require_mask_entry(self.mask, env.reset(seed=0)[1])
                return read_spaces(obs, action, masked=self.mask is not None)
            finally:
                env.close()

        return self.probe(read)

    def build(self, device: torch.device, seed: int) -> HostEnv:
        """Make the environments, in this process or in workers."""
        self.spaces()  # reports a mistake from here and not from within a worker
        if self.native:
            return self._native(self.num_envs, device, seed % SEEDS)
        env: Any = (
            WorkerEnv(self._vector, self.num_envs, self.workers, name=self.id)
            if self.workers
            else self._vector(self.num_envs)
        )
        with closed_after_error(env):
            return HostEnv(
                env, device, seed % SEEDS, name=self.id, mask=self.mask, resets_rows=True
            )

    def evaluation_spec(self, episodes: int) -> "Gymnasium":
        """Environments of an evaluation: at most those of training, each for several episodes."""
        return dataclasses.replace(self, num_envs=min(episodes, self.num_envs), workers=0)

    def rendering_spec(self) -> "Gymnasium":
        """The same environments in this process, which draw pictures."""
        kwargs = {"render_mode": "rgb_array", **self.kwargs}
        return dataclasses.replace(self, kwargs=kwargs, workers=0)

    def _vector(self, num_envs: int) -> SerialEnv:
        return SerialEnv([self._one] * num_envs, entry=self.mask, name=self.id)

    def _native(self, num_envs: int, device: torch.device, seed: int) -> HostEnv:
        """The vector environment of the package, which is refused if it cannot reset rows."""
        gymnasium = require_package(self, "gymnasium", _INSTALL)
        mode = gymnasium.VectorizeMode.VECTOR_ENTRY_POINT
        with self._refusals(gymnasium):
            env: Any = gymnasium.make_vec(self.id, num_envs, mode, **self.kwargs)
        with closed_after_error(env):
            return HostEnv(env, device, seed, name=self.id, mask=self.mask, hint=_HINT)

    def _one(self) -> Any:
        """One environment with its wrappers.

        Raises:
            ValueError: If there is no such environment, its package is not installed, or its
                arguments are refused.
        """
        gymnasium = require_package(self, "gymnasium", _INSTALL)
        with self._refusals(gymnasium):
            wrappers = [self._wrapper(path) for path in self.wrappers]
            env: Any = gymnasium.make(self.id, disable_env_checker=True, **self.kwargs)
        with closed_after_error(env):
            for path, wrapper in zip(self.wrappers, wrappers, strict=True):
                env = self._wrapped(env, wrapper, path)
        return env

    @staticmethod
    def _wrapped(env: Any, wrapper: Any, path: str) -> Any:
        try:
            inspect.signature(wrapper).bind(env)
        except (TypeError, ValueError) as error:
            rule = f"take an environment and nothing else, got {path!r}: {error}"
            hint = "Name a function of your own that makes the wrapper."
            raise ValueError(f"Gymnasium.wrappers must {rule}. {hint}") from error
        try:
            return wrapper(env)
        except Exception as error:  # a wrapper may raise anything for what it does not fit
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"Gymnasium.wrappers must fit, got {path!r}: {why}") from error

    @contextlib.contextmanager
    def _refusals(self, gymnasium: Any) -> Generator[None]:
        """Turn errors of Gymnasium about an environment into one line about the setting."""
        try:
            yield
        except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
            cause = error if error.__cause__ is None else error.__cause__
            missing: str | None = getattr(cause, "name", None)
            if missing is None:  # such as an environment that has moved to another package
                raise self.refuse(error) from error
            if missing not in _INSTALLS:
                hint = "Install it, or add its folder to PYTHONPATH."
                said = f"Gymnasium.id={self.id!r} needs {missing}. {hint} ({cause})"
                raise ValueError(" ".join(said.split())) from error
            raise needs_package(self, missing, _INSTALLS[missing], error) from error
        except gymnasium.error.UnregisteredEnv as error:
            why = " ".join(str(error).split())
            form = "" if ":" in self.id else ", as package:name where a package registers it"
            rule = f"name a registered environment{form}, got {self.id!r}. {why}"
            raise ValueError(f"Gymnasium.id must {rule}") from error
        except (gymnasium.error.Error, TypeError) as error:
            raise self.refuse(error, _HINT if self.native else "") from error

    @staticmethod
    def _wrapper(path: str) -> Any:
        try:
            return import_object(path)
        except (ImportError, AttributeError, ValueError) as error:
            if isinstance(error, ImportError) and error.name in _INSTALLS:
                raise
            rule = "name importable wrappers"
            raise ValueError(f"Gymnasium.wrappers must {rule}, got {path!r} ({error}).") from error
