"""An environment: a point on a plane that is pushed to a target.

Axes: ``B`` environment; the state has six components: position, velocity and target, each of two.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from esper_lightning.envs import Box, EnvSpaces, EnvSpec
from esper_lightning.envs.autoreset import AutoresetEnv, Transition, validate_sizes

TIMESTEP_S = 0.1
PUSH = 2.0  # acceleration of the strongest push
FRICTION = 0.9  # share of the velocity that a step keeps


@dataclass(frozen=True, kw_only=True)
class Reach(EnvSpec):
    """Push a point to a target. The reward of a step is the negative distance to the target.

    Attributes:
        num_envs: Number of environments on each rank.
        time_limit: Number of steps after which an episode is truncated.
    """

    num_envs: int = 64
    time_limit: int = 50

    def __post_init__(self) -> None:
        validate_sizes(self)

    def spaces(self) -> EnvSpaces:
        """The way to the target and the velocity are seen; the action is a push."""
        return EnvSpaces(obs=Box((4,)), action=Box((2,), low=-1.0, high=1.0))

    def build(self, device: torch.device, seed: int) -> AutoresetEnv:
        """Allocate the environments; they reset themselves, and count their episodes."""
        return AutoresetEnv(self, device=device, seed=seed)

    def sample_states(self, steps: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """States ``[T, B, 6]`` at rest, with position and target anywhere in [-1, 1]."""
        states = torch.empty(steps, self.num_envs, 6, device=device)
        states.uniform_(-1.0, 1.0, generator=generator)
        at_rest = states.new_tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
        return states * at_rest

    def observe(self, state: Tensor) -> Tensor:
        """Observation ``[B, 4]``: the way to the target, and the velocity."""
        position, velocity, target = state.split(2, dim=-1)
        return torch.cat((target - position, velocity), dim=-1)

    def advance(self, state: Tensor, action: Tensor) -> Transition:
        """One step; nothing here may depend on Python branches, for the step is compiled."""
        position, velocity, target = state.split(2, dim=-1)
        velocity = FRICTION * (velocity + TIMESTEP_S * PUSH * action.clamp(-1.0, 1.0))
        position = position + TIMESTEP_S * velocity
        distance = (target - position).square().sum(-1).sqrt()
        reached = torch.cat((position, velocity, target), dim=-1)
        return Transition(reached, -distance, torch.zeros_like(distance, dtype=torch.bool))
