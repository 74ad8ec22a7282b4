"""Environments of EnvPool, by their names."""

import dataclasses
import importlib
from dataclasses import dataclass, field
from typing import Any

import torch

from esper_lightning.core.errors import check_fields, require, require_int
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.envs.adapters.host import HostEnv
from esper_lightning.envs.adapters.spaces import read_spaces
from esper_lightning.envs.base import EnvSpec

__all__ = ["EnvPool"]

_SEEDS = 2**31
_probed: dict[str, EnvSpaces] = {}


@dataclass(frozen=True, kw_only=True)
class EnvPool(EnvSpec):
    """Environments of EnvPool (Weng et al. 2022), stepped by its threads.

    Checkpoints hold no simulator: a resumed run begins new episodes.

    Attributes:
        id: Name of the environment, such as ``LunarLander-v3``.
        num_envs: Environments on each rank.
        kwargs: Arguments of the environment.
        threads: Threads that step the environments; 0 for as many as there are cores.
    """

    id: str
    num_envs: int = 64
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    threads: int = field(default=0, metadata={"how": True})

    def __post_init__(self) -> None:
        check_fields(self)
        require_int("EnvPool.num_envs", self.num_envs, minimum=1)
        require_int("EnvPool.threads", self.threads, minimum=0)
        size = self.kwargs.get("batch_size", self.num_envs)
        rule = "be absent: all environments are stepped together"
        require(size == self.num_envs, "EnvPool.kwargs['batch_size']", rule, size)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def name(self) -> str:
        """Name of the task in messages and run directories."""
        return self.id

    def spaces(self) -> EnvSpaces:
        """Observation and action spaces of one environment, which is made once to read them.

        Raises:
            ValueError: If there is no such environment, EnvPool is not installed, or a space has
                no counterpart.
        """
        key = repr(dataclasses.replace(self, num_envs=1, threads=0))
        if key not in _probed:
            env = self._pool(1, 0)
            try:
                obs, action = env.single_observation_space, env.single_action_space
                _probed[key] = read_spaces(obs, action)
            finally:
                env.close()
        return _probed[key]

    def build(self, device: torch.device, seed: int) -> HostEnv:
        """Make the pool, which is seeded when it is made."""
        env = self._pool(self.num_envs, seed % _SEEDS)
        return HostEnv(env, device, None, name=self.id)

    def evaluation_spec(self, episodes: int) -> "EnvPool":
        """Environments of an evaluation: at most those of training, each for several episodes."""
        return dataclasses.replace(self, num_envs=min(episodes, self.num_envs))

    def _pool(self, num_envs: int, seed: int) -> Any:
        hint = "Install it with: pip install 'esper_lightning[envpool]'."
        try:
            envpool: Any = importlib.import_module("envpool")
        except ImportError as error:
            raise ValueError(f"EnvPool.id={self.id!r} needs envpool. {hint}") from error
        rule = "name an environment of EnvPool"
        require(self.id in envpool.list_all_envs(), "EnvPool.id", rule, self.id)
        return envpool.make(
            self.id,
            env_type="gymnasium",
            num_envs=num_envs,
            seed=seed,
            num_threads=self.threads,
            **{name: value for name, value in self.kwargs.items() if name != "batch_size"},
        )
