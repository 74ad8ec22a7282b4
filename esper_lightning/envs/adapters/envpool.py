"""Environments of EnvPool, by their names."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from esper_lightning.core.errors import require, require_int
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.envs.adapters.host import HostEnv
from esper_lightning.envs.adapters.named import SEEDS, NamedSpec, require_package
from esper_lightning.envs.adapters.spaces import read_spaces
from esper_lightning.envs.base import closed_after_error

__all__ = ["EnvPool"]


@dataclass(frozen=True, kw_only=True)
class EnvPool(NamedSpec):
    """Environments of EnvPool (Weng et al. 2022), stepped by its threads.

    Checkpoints hold no simulator: a resumed run begins new episodes. Bounds of observations are not
    taken over, because some simulators do not keep them (``LunarLander-v3`` in EnvPool 1.2.5).

    Attributes:
        id: Name of the environment, such as ``LunarLander-v3``.
        num_envs: Environments on each rank.
        kwargs: Arguments of the environment.
        threads: Threads that step the environments; 0 for as many as there are cores.
    """

    threads: int = field(default=0, metadata={"how": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("EnvPool.threads", self.threads, minimum=0)
        size = self.kwargs.get("batch_size", self.num_envs)
        rule = "be absent: all environments are stepped together"
        require(size == self.num_envs, "EnvPool.kwargs['batch_size']", rule, size)

    __hash__ = NamedSpec.__hash__

    def spaces(self) -> EnvSpaces:
        """Observation and action spaces of one environment, which is made once to read them.

        Raises:
            ValueError: If there is no such environment, EnvPool is not installed, or a space has
                no counterpart.
        """

        def read() -> EnvSpaces:
            env = self._pool(1, 0)
            try:
                obs, action = env.single_observation_space, env.single_action_space
                return read_spaces(obs, action, keeps_bounds=False)
            finally:
                env.close()

        return self.probe(read)

    def build(self, device: torch.device, seed: int) -> HostEnv:
        """Make the pool, which is seeded when it is made."""
        env = self._pool(self.num_envs, seed % SEEDS)
        with closed_after_error(env):
            return HostEnv(env, device, None, name=self.id, keeps_bounds=False, reseeds=False)

    def evaluation_spec(self, episodes: int) -> "EnvPool":
        """Environments of an evaluation: at most those of training, each for several episodes."""
        return dataclasses.replace(self, num_envs=min(episodes, self.num_envs))

    def _pool(self, num_envs: int, seed: int) -> Any:
        envpool = require_package(self, "envpool", "'esper_lightning[envpool]'")
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
