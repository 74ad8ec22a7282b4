"""A user's own simulator: made by a function that a config names, or passed as an object."""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import atexit
import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from esper_lightning.core.errors import check_fields, require, require_int
from esper_lightning.core.imports import import_object
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.envs.adapters.host import HostEnv
from esper_lightning.envs.adapters.named import SEEDS
from esper_lightning.envs.adapters.rsl_rl import RslRlSimulator
from esper_lightning.envs.adapters.simulated import SimulatedEnv, Simulator
from esper_lightning.envs.adapters.stateless import Lost
from esper_lightning.envs.adapters.torch_vector import TorchSimulator
from esper_lightning.envs.adapters.vmas import VmasSimulator
from esper_lightning.envs.base import EnvSpec, built_env, closed_after_error, reseed_env

__all__ = ["Custom", "LiveEnv", "adapt"]

_log = logging.getLogger(__name__)
_shared: dict[str, Any] = {}
"""Simulators of this process that training and evaluation share, by their spec."""
_users: Counter[str] = Counter()
"""Number of times that each shared simulator was built and not released."""
_probed: dict[str, EnvSpaces] = {}


def adapt(made: Any, device: torch.device, seed: int | None, *, name: str, lost: Lost) -> Any:
    """A batched environment around a simulator, whose kind is recognised by its members.

    Args:
        made: A ``BatchedEnv`` (``state_dict``), a ``Simulator``, VMAS (``get_from_scenario``), a
            simulator of rsl_rl's interface (``get_observations``, ``num_actions``), one that
            returns five tensors (``device``), or a vector environment of Gymnasium
            (``single_observation_space``).
        device: Device of the tensors made from a vector environment of NumPy arrays.
        seed: Seed of the first reset; ``None`` where the simulator has been seeded already.
        name: Name of the task in errors.
        lost: Rule for truncated episodes, the setting ``Custom.lost``.

    Raises:
        ValueError: If ``made`` is none of these.
    """
    if all(hasattr(made, member) for member in ("reset", "step", "state_dict", "load_state_dict")):
        return made
    if isinstance(made, Simulator):
        return SimulatedEnv(made, seed, lost=lost)
    if hasattr(made, "get_from_scenario"):
        return SimulatedEnv(VmasSimulator(made, name=name), seed, lost=lost)
    if hasattr(made, "get_observations") and hasattr(made, "num_actions"):
        return SimulatedEnv(RslRlSimulator(made, name=name), seed, lost=lost)
    if hasattr(getattr(made, "unwrapped", made), "device"):
        return SimulatedEnv(TorchSimulator(made, seed, name=name), seed, lost=lost)
    if hasattr(made, "single_observation_space"):
        reseeds = not hasattr(made, "all_env_ids")  # EnvPool takes seeds, and ignores them
        return HostEnv(made, device, seed, name=name, lost=lost, reseeds=reseeds)
    rule = (
        "be a vector environment that has device (five tensors), get_observations (rsl_rl) or "
        "single_observation_space (Gymnasium), or be a Simulator or a BatchedEnv"
    )
    require(False, name, rule, type(made).__name__)
    raise AssertionError


@dataclass(frozen=True, kw_only=True)
class Custom(EnvSpec):
    """A simulator, named by the function that makes it.

    The function is called as ``make(num_envs=..., device=..., seed=..., **kwargs)`` and returns any
    object that ``adapt`` recognises.

    Attributes:
        make: Import path of the function, such as ``my_lab.envs:make_anymal``.
        num_envs: Environments on each rank. Each agent of VMAS is one, so that the function must
            make ``num_envs // agents`` worlds.
        kwargs: Further arguments of the function.
        lost: Rule for truncated episodes whose last observation the simulator does not return:
            take the ``previous`` observation, as rsl_rl does, or raise an ``error``.
        shared: Whether one simulator serves training and evaluation, for simulators of which a
            process can hold only one. Training then begins new episodes after each evaluation. The
            simulator is closed at the end of the run, or of the process that made it.
        device: Device of the simulator that is made to read its spaces, such as ``cuda:0``.
        name: Name of the task in messages and run directories; that of the function if empty.
    """

    make: str
    num_envs: int
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    lost: Lost = "error"
    shared: bool = True
    device: str = field(default="cpu", metadata={"how": True})
    name: str = field(default="", metadata={"how": True})

    def __post_init__(self) -> None:
        check_fields(self)
        require_int("Custom.num_envs", self.num_envs, minimum=1)
        if not self.name:
            function = self.make.replace(":", ".").rpartition(".")[2]
            object.__setattr__(self, "name", function)

    def __hash__(self) -> int:
        return hash(repr(self))

    def spaces(self) -> EnvSpaces:
        """Observation and action spaces of the simulator, which is made to read them.

        Raises:
            ValueError: If the function cannot be imported, returns no simulator, or one of another
                number of environments.
        """
        if self._key not in _probed:
            device = torch.device(self.device)
            if self.shared:
                _probed[self._key] = self._read(self._the_shared(device, 0))
            else:
                with built_env(self, device, 0) as env:
                    _probed[self._key] = self._read(env)
        return _probed[self._key]

    def build(self, device: torch.device, seed: int) -> Any:
        """Make the simulator; a shared one is made once in a process, and reseeded if it can be.

        One that cannot be reseeded, and was made to read its spaces, is closed and made with the
        seed: otherwise all ranks would have the same random numbers.
        """
        seed, key = seed % SEEDS, self._key
        if not self.shared:
            return self._made(device, seed)
        was_read = key in _shared and _users[key] == 0
        env = self._the_shared(device, seed)
        if not reseed_env(env, seed) and was_read:
            _close_shared(key)
            env = self._the_shared(device, seed)
        _users[key] += 1
        return env

    def release(self) -> None:
        """Close the shared simulator when this was called as often as ``build``."""
        _users[self._key] -= 1
        if _users[self._key] <= 0:
            _close_shared(self._key)

    def evaluation_spec(self, episodes: int) -> "Custom":  # noqa: ARG002 - one simulator
        """The spec of an evaluation: the same environments as in training."""
        return self

    @staticmethod
    def of(env: Any, *, name: str | None = None, lost: Lost = "error") -> "LiveEnv":
        """The spec of a simulator that exists already.

        Checkpoints do not hold the simulator: code that loads a checkpoint passes the spec again.

        Args:
            env: Any object that ``adapt`` recognises.
            name: Name of the task in messages and run directories; ``None`` for the name of the
                simulator's class.
            lost: Rule for truncated episodes, the setting ``Custom.lost``.

        Raises:
            ValueError: If ``adapt`` does not recognise ``env``.
        """
        return LiveEnv(env, name or type(getattr(env, "unwrapped", env)).__name__, lost)

    @property
    def _key(self) -> str:
        return repr((self.make, self.num_envs, sorted(self.kwargs.items(), key=repr), self.lost))

    def _read(self, env: Any) -> EnvSpaces:
        made = getattr(env, "num_envs", self.num_envs)
        hint = ""
        if isinstance(getattr(env, "simulator", None), VmasSimulator):
            hint = "Each agent is one: name a function that makes num_envs // agents worlds."
        rule = f"be {made}, the number of environments of the simulator"
        require(made == self.num_envs, "Custom.num_envs", rule, self.num_envs, hint)
        return _spaces_of(env, self.name)

    def _the_shared(self, device: torch.device, seed: int) -> Any:
        if self._key not in _shared:
            _shared[self._key] = self._made(device, seed)
            atexit.register(_close_in, os.getpid(), self._key)
        return _shared[self._key]

    def _made(self, device: torch.device, seed: int) -> Any:
        function = _import(self.make)
        arguments = {"num_envs": self.num_envs, "device": str(device), "seed": seed, **self.kwargs}
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            rule = "name a function of num_envs, device, seed and Custom.kwargs"
            raise ValueError(f"Custom.make must {rule}, got {self.make!r}: {error}.") from error
        try:
            made = function(**arguments)
        except ModuleNotFoundError as error:
            said = f"Custom.make={self.make!r} needs {error.name}: it is not installed. ({error})"
            raise ValueError(said) from error
        with closed_after_error(made):
            return adapt(made, device, seed, name=self.name, lost=self.lost)


class LiveEnv(EnvSpec):
    """The spec of a simulator that exists already; ``Custom.of`` returns it."""

    shared = True

    def __init__(self, env: Any, name: str, lost: Lost) -> None:
        self.name = name
        device = getattr(getattr(env, "unwrapped", env), "device", "cpu")
        self._env = adapt(env, torch.empty(0, device=device).device, None, name=name, lost=lost)
        self._spaces = _spaces_of(self._env, name)
        self.num_envs = int(self._env.num_envs)
        self._has_warned = False

    def spaces(self) -> EnvSpaces:
        """Observation and action spaces of the simulator."""
        return self._spaces

    def build(self, device: torch.device, seed: int) -> Any:  # noqa: ARG002 - it has its own
        """The simulator itself, reseeded if it can be."""
        if not reseed_env(self._env, seed % SEEDS) and _ranks() > 1 and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%s takes no seed at a reset: make it with another seed on each rank, or ranks "
                "learn from the same episodes.",
                self.name,
            )
        return self._env

    def evaluation_spec(self, episodes: int) -> "LiveEnv":  # noqa: ARG002 - one simulator
        """The spec of an evaluation: the same environments as in training."""
        return self


def _ranks() -> int:
    there = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if there else 1


def _close_shared(key: str) -> None:
    _users.pop(key, None)
    close = getattr(_shared.pop(key, None), "close", None)
    if callable(close):
        close()


def _close_in(process: int, key: str) -> None:
    """Close a shared simulator when the process that made the simulator ends.

    A forked process inherits the call and must not close the simulator.

    Args:
        process: Identifier of the process that made the simulator.
        key: Key of the simulator in ``_shared``.
    """
    if os.getpid() == process:
        _close_shared(key)


def _spaces_of(env: Any, name: str) -> EnvSpaces:
    spaces = getattr(env, "spaces", None)
    found = spaces() if callable(spaces) else spaces
    rule = "say its spaces: an attribute spaces that is an EnvSpaces"
    require(isinstance(found, EnvSpaces), name, rule, found)
    assert isinstance(found, EnvSpaces)
    return found


def _import(path: str) -> Callable[..., Any]:
    rule = "name a function that can be imported, package.module:function"
    try:
        function = import_object(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"Custom.make must {rule}, got {path!r} ({error}).") from error
    require(callable(function), "Custom.make", rule, path)
    return function
