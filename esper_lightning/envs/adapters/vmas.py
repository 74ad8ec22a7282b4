"""VMAS, recognised by its members and never imported. Axes: ``B`` agents of all worlds."""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esper_lightning.core.errors import Words, require
from esper_lightning.core.types import Observation
from esper_lightning.envs.adapters.curriculum import pass_progress
from esper_lightning.envs.adapters.simulated import Simulator, Stepped
from esper_lightning.envs.adapters.spaces import read_spaces
from esper_lightning.envs.adapters.tensors import read_count, read_device, to_range
from esper_lightning.envs.base import RunProgress

__all__ = ["VmasSimulator"]


class VmasSimulator(Simulator):
    """Agents of a ``vmas.Environment`` that share a policy; each agent is one environment.

    Env steps therefore count steps of agents, and episodes of a world's agents end together.

    Args:
        env: The simulator.
        name: Name of the task in errors.

    Raises:
        ValueError: If agents observe or act differently, or if the simulator was made with
            ``dict_spaces=True``.
    """

    def __init__(self, env: Any, *, name: str) -> None:
        self._env, self.name = env, name
        self._agents = len(env.agents)
        self.num_envs = read_count(env, "num_envs", name=name) * self._agents
        self.device = read_device(env, name=name)
        kinds = [type(space.spaces) for space in (env.observation_space, env.action_space)]
        listed = not any(issubclass(kind, Mapping) for kind in kinds)
        require(listed, name, "be made with dict_spaces=False", Words("spaces by name"))
        observed = sorted({tuple(space.shape) for space in env.observation_space.spaces})
        require(len(observed) == 1, f"{name} agents", "observe alike to share a policy", observed)
        acted = sorted({str(space) for space in env.action_space.spaces})
        require(len(acted) == 1, f"{name} agents", "act alike to share a policy", acted)
        action_space = env.action_space.spaces[0]
        self.spaces = read_spaces(env.observation_space.spaces[0], action_space)
        self._to_range = to_range(action_space, self.device)

    def reset(self, rows: Tensor | None, seed: int | None) -> Observation:
        """Start new episodes in whole worlds."""
        worlds = None if rows is None else rows.view(-1, self._agents)[:, 0]
        if worlds is None or bool(worlds.all()):
            return self._fold(self._env.reset() if seed is None else self._env.reset(seed=seed))
        for world in worlds.nonzero()[:, 0].tolist():
            self._env.reset_at(world, return_observations=False)
        return self._fold(
            self._env.get_from_scenario(
                get_observations=True, get_rewards=False, get_infos=False, get_dones=False
            )[0]
        )

    def step(self, action: Tensor) -> Stepped:
        """Act with every agent."""
        action = self._to_range(action)
        worlds = action.reshape(-1, self._agents, *action.shape[1:])
        actions = [worlds[:, agent].reshape(len(worlds), -1) for agent in range(self._agents)]
        obs, reward, done, truncated = self._step(actions)

        def of_each_agent(flag: Tensor) -> Tensor:
            return flag[:, None].expand(-1, self._agents).flatten()

        flags = of_each_agent(done), of_each_agent(truncated)
        return Stepped(self._fold(obs), self._fold(reward), *flags)

    def _step(self, actions: list[Tensor]) -> tuple[Any, Any, Tensor, Tensor]:
        """Results of a step in which the time limit is no failure.

        By default VMAS returns one flag for both; its attribute ``terminated_truncated`` is
        therefore true while it steps.
        """
        env = self._env
        two_flags = getattr(env, "terminated_truncated", None)
        if two_flags is None:
            stepped = env.step(actions)
        else:
            env.terminated_truncated = True
            try:
                stepped = env.step(actions)
            finally:
                env.terminated_truncated = two_flags
        obs, reward, done = stepped[:3]
        return obs, reward, done, stepped[3] if len(stepped) == 5 else torch.zeros_like(done)

    def begin_iteration(self, progress: RunProgress) -> None:
        """Pass the progress of the run to the simulator or its scenario."""
        pass_progress(self._env, progress)

    def _fold(self, of_agents: list[Tensor]) -> Tensor:
        return torch.stack(of_agents, 1).flatten(0, 1)
