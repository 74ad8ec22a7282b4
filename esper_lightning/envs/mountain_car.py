"""Mountain car: reach the hilltop with an engine too weak to climb.

Axes: ``B`` environment, two components of the state. Actions are not checked, because
a check would synchronise.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from esper_lightning.core.shapes import Float, Int, UInt8
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.envs.autoreset import (
    RANDOM_STREAMS,
    AutoresetEnv,
    Transition,
    validate_sizes,
)
from esper_lightning.envs.base import EnvSpec
from esper_lightning.envs.drawing import BLUE, GREY, ORANGE, Canvas, View

__all__ = ["MountainCar"]

FORCE = 0.001
GRAVITY = 0.0025
MIN_POSITION = -1.2
MAX_POSITION = 0.6
MAX_SPEED = 0.07
GOAL_POSITION = 0.5
_VIEW = View(left=MIN_POSITION, right=MAX_POSITION, bottom=-0.1, top=1.2)
_PIECES = 40  # straight pieces of the slope in a picture


@dataclass(frozen=True, kw_only=True)
class MountainCar(EnvSpec):
    """The mountain car of Moore (1990), as ``MountainCar-v0`` of Gymnasium.

    State and observation are the position, and the velocity per step. Actions push left, not at
    all, or right. The reward is -1 for every step. An episode terminates at the goal, unless the
    car is rolling back. The wall on the left stops the car.

    Attributes:
        num_envs: Number of environments on each rank.
        time_limit: Number of steps after which an episode is truncated.
    """

    num_envs: int = 64
    time_limit: int = 200
    random_streams: ClassVar[tuple[str, ...]] = RANDOM_STREAMS

    def __post_init__(self) -> None:
        validate_sizes(self)

    def spaces(self) -> EnvSpaces:
        """Two features, three actions."""
        obs = Box((2,), low=(MIN_POSITION, -MAX_SPEED), high=(MAX_POSITION, MAX_SPEED))
        return EnvSpaces(obs=obs, action=Discrete(3))

    def build(self, device: torch.device, seed: int) -> AutoresetEnv:
        """Allocate the environments."""
        return AutoresetEnv(self, device=device, seed=seed)

    def sample_states(
        self, steps: int, generator: torch.Generator, device: torch.device
    ) -> Float[Tensor, "T B 2"]:
        """Initial states, with a position uniform in [-0.6, -0.4), at rest."""
        position = torch.empty(steps, self.num_envs, device=device).uniform_(
            -0.6, -0.4, generator=generator
        )
        return torch.stack((position, torch.zeros_like(position)), dim=-1)

    def observe(self, state: Float[Tensor, "B 2"]) -> Float[Tensor, "B 2"]:
        """The whole state."""
        return state

    def advance(self, state: Float[Tensor, "B 2"], action: Int[Tensor, " B"]) -> Transition:
        """The engine and the slope change the velocity, then the velocity the position."""
        position, velocity = state.unbind(-1)
        velocity = velocity + (action - 1) * FORCE - (3 * position).cos() * GRAVITY
        velocity = velocity.clamp(-MAX_SPEED, MAX_SPEED)
        position = (position + velocity).clamp(MIN_POSITION, MAX_POSITION)
        at_wall = (position <= MIN_POSITION) & (velocity < 0)
        velocity = velocity.masked_fill(at_wall, 0.0)
        terminated = (position >= GOAL_POSITION) & (velocity >= 0)
        reached = torch.stack((position, velocity), dim=-1)
        return Transition(reached, torch.full_like(position, -1.0), terminated)

    def render(self, state: Float[Tensor, "B 2"]) -> UInt8[Tensor, "B H W 3"]:
        """Pictures of the car on its slope, whose height is ``0.45 sin(3 position) + 0.55``."""
        canvas = Canvas(len(state), _VIEW, state.device)
        place = torch.linspace(MIN_POSITION, MAX_POSITION, _PIECES + 1, device=state.device)
        slope = _on_slope(place)
        for start, end in pairwise(slope[:, None]):
            canvas.draw(start, end, width=0.015, colour=GREY)
        goal = _on_slope(place.new_tensor([GOAL_POSITION]))
        canvas.draw(goal, goal + goal.new_tensor([0.0, 0.15]), width=0.03, colour=ORANGE)
        car = _on_slope(state[:, 0]) + state.new_tensor([0.0, 0.04])
        canvas.draw(car, car, width=0.08, colour=BLUE)
        return canvas.pictures()


def _on_slope(position: Float[Tensor, " M"]) -> Float[Tensor, "M 2"]:
    return torch.stack((position, 0.45 * (3 * position).sin() + 0.55), dim=-1)
