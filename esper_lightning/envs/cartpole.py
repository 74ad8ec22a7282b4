"""Cart-pole: keep a pole upright by pushing its cart left or right.

Axes: ``B`` environment, four components of the state. Actions are not checked, because
a check would synchronise.
"""

import math
from dataclasses import dataclass
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

__all__ = ["CartPole"]

GRAVITY = 9.8  # m/s^2
CART_MASS = 1.0  # kg
POLE_MASS = 0.1  # kg
POLE_HALF_LENGTH = 0.5  # m
FORCE = 10.0  # N
TIMESTEP_S = 0.02
POSITION_LIMIT = 2.4  # m
ANGLE_LIMIT_RAD = math.radians(12)

TOTAL_MASS = CART_MASS + POLE_MASS
POLE_MOMENT = POLE_MASS * POLE_HALF_LENGTH
_VIEW = View(left=-2.6, right=2.6, bottom=-0.4, top=1.4, height=160)


@dataclass(frozen=True, kw_only=True)
class CartPole(EnvSpec):
    """The cart-pole of Barto, Sutton and Anderson (1983), as ``CartPole-v1`` of Gymnasium.

    State and observation are cart position in m, cart velocity, pole angle in rad and pole
    velocity. Action 1 pushes right, any other action left. The reward is 1 for every step, also the
    last. An episode terminates beyond 2.4 m or 12 degrees.

    Attributes:
        num_envs: Number of environments on each rank.
        time_limit: Number of steps after which an episode is truncated.
    """

    num_envs: int = 64
    time_limit: int = 500
    random_streams: ClassVar[tuple[str, ...]] = RANDOM_STREAMS
    frames_per_s: ClassVar[float] = 1 / TIMESTEP_S

    def __post_init__(self) -> None:
        validate_sizes(self)

    def spaces(self) -> EnvSpaces:
        """Four features, two actions."""
        high = (2 * POSITION_LIMIT, math.inf, 2 * ANGLE_LIMIT_RAD, math.inf)
        obs = Box((4,), low=tuple(-bound for bound in high), high=high)
        return EnvSpaces(obs=obs, action=Discrete(2))

    def build(self, device: torch.device, seed: int) -> AutoresetEnv:
        """Allocate the environments."""
        return AutoresetEnv(self, device=device, seed=seed)

    def sample_states(
        self, steps: int, generator: torch.Generator, device: torch.device
    ) -> Float[Tensor, "T B 4"]:
        """Initial states, all four components uniform in [-0.05, 0.05)."""
        state = torch.empty(steps, self.num_envs, 4, device=device)
        return state.uniform_(-0.05, 0.05, generator=generator)

    def observe(self, state: Float[Tensor, "B 4"]) -> Float[Tensor, "B 4"]:
        """The whole state."""
        return state

    def advance(self, state: Float[Tensor, "B 4"], action: Int[Tensor, " B"]) -> Transition:
        """One explicit Euler step.

        The equations are those of Florian (2007), *Correct equations for the dynamics of the
        cart-pole system*.
        """
        position, velocity, angle, angular_velocity = state.unbind(-1)
        force = torch.full_like(angle, -FORCE).masked_fill_(action == 1, FORCE)
        sin, cos = angle.sin(), angle.cos()
        push = (force + POLE_MOMENT * angular_velocity.square() * sin) / TOTAL_MASS
        inertia = POLE_HALF_LENGTH * (4.0 / 3.0 - POLE_MASS / TOTAL_MASS * cos.square())
        angular_acceleration = (GRAVITY * sin - cos * push) / inertia
        acceleration = push - POLE_MOMENT / TOTAL_MASS * angular_acceleration * cos
        rate = torch.stack((velocity, acceleration, angular_velocity, angular_acceleration), dim=-1)
        reached = torch.add(state, rate, alpha=TIMESTEP_S)
        off_track = reached[:, 0].abs() > POSITION_LIMIT
        fallen = reached[:, 2].abs() > ANGLE_LIMIT_RAD
        return Transition(reached, torch.ones_like(position), off_track | fallen)

    def render(self, state: Float[Tensor, "B 4"]) -> UInt8[Tensor, "B H W 3"]:
        """Pictures of the cart on its track, and of the pole."""
        canvas = Canvas(len(state), _VIEW, state.device)
        centre = torch.stack((state[:, 0], torch.zeros_like(state[:, 0])), dim=-1)
        angle = state[:, 2]
        tip = centre + 2 * POLE_HALF_LENGTH * torch.stack((angle.sin(), angle.cos()), dim=-1)
        end = centre.new_tensor([[POSITION_LIMIT, 0.0]])
        canvas.draw(-end, end, width=0.02, colour=GREY)
        half = centre.new_tensor([0.16, 0.0])
        canvas.draw(centre - half, centre + half, width=0.24, colour=BLUE)
        canvas.draw(centre, tip, width=0.08, colour=ORANGE)
        return canvas.pictures()
