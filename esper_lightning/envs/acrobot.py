"""Acrobot: swing up a two-link pendulum by torque at its elbow.

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

__all__ = ["Acrobot"]

GRAVITY = 9.8  # m/s^2
TIMESTEP_S = 0.2
MAX_VELOCITY_1 = 4 * math.pi  # rad/s
MAX_VELOCITY_2 = 9 * math.pi  # rad/s
_VIEW = View(left=-2.2, right=2.2, bottom=-2.2, top=2.2)


@dataclass(frozen=True, kw_only=True)
class Acrobot(EnvSpec):
    """The acrobot of Sutton (1996), as ``Acrobot-v1`` of Gymnasium (dynamics of the book).

    The state is the angle of the first link from hanging down and the angle of the second link
    relative to the first (rad), and the velocities of both. The observation is cosine and sine of
    both angles and the velocities. The torque is ``action - 1`` N m. The reward is -1 for each
    step, and 0 for the step that lifts the tip one link above the base, which terminates.

    Attributes:
        num_envs: Number of environments on each rank.
        time_limit: Number of steps after which an episode is truncated.
    """

    num_envs: int = 64
    time_limit: int = 500
    random_streams: ClassVar[tuple[str, ...]] = RANDOM_STREAMS
    frames_per_s: ClassVar[float] = 15.0  # three times as fast as the simulated time

    def __post_init__(self) -> None:
        validate_sizes(self)

    def spaces(self) -> EnvSpaces:
        """Six features, three actions."""
        high = (1.0, 1.0, 1.0, 1.0, MAX_VELOCITY_1, MAX_VELOCITY_2)
        obs = Box((6,), low=tuple(-bound for bound in high), high=high)
        return EnvSpaces(obs=obs, action=Discrete(3))

    def build(self, device: torch.device, seed: int) -> AutoresetEnv:
        """Allocate the environments."""
        return AutoresetEnv(self, device=device, seed=seed)

    def sample_states(
        self, steps: int, generator: torch.Generator, device: torch.device
    ) -> Float[Tensor, "T B 4"]:
        """Initial states, all four components uniform in [-0.1, 0.1)."""
        state = torch.empty(steps, self.num_envs, 4, device=device)
        return state.uniform_(-0.1, 0.1, generator=generator)

    def observe(self, state: Float[Tensor, "B 4"]) -> Float[Tensor, "B 6"]:
        """Cosines and sines of the angles, and the velocities."""
        angle_1, angle_2, velocity_1, velocity_2 = state.unbind(-1)
        circle = (angle_1.cos(), angle_1.sin(), angle_2.cos(), angle_2.sin())
        return torch.stack((*circle, velocity_1, velocity_2), dim=-1)

    def advance(self, state: Float[Tensor, "B 4"], action: Int[Tensor, " B"]) -> Transition:
        """One Runge-Kutta step of fourth order; then angles are wrapped and velocities bounded."""
        torque = action - 1
        start = state.t().contiguous()  # [B, S] -> [S, B]
        rate_1 = _rate(start, torque)
        rate_2 = _rate(torch.add(start, rate_1, alpha=TIMESTEP_S / 2), torque)
        rate_3 = _rate(torch.add(start, rate_2, alpha=TIMESTEP_S / 2), torque)
        rate_4 = _rate(torch.add(start, rate_3, alpha=TIMESTEP_S), torque)
        slope = torch.add(rate_1 + rate_4, rate_2 + rate_3, alpha=2)
        end = torch.add(start, slope, alpha=TIMESTEP_S / 6)
        angle_1, angle_2, velocity_1, velocity_2 = end.unbind()
        reached = torch.stack(
            (
                _wrap(angle_1),
                _wrap(angle_2),
                velocity_1.clamp(-MAX_VELOCITY_1, MAX_VELOCITY_1),
                velocity_2.clamp(-MAX_VELOCITY_2, MAX_VELOCITY_2),
            ),
            dim=-1,
        )
        terminated = -angle_1.cos() - (angle_1 + angle_2).cos() > 1.0
        reward = torch.full_like(angle_1, -1.0).masked_fill_(terminated, 0.0)
        return Transition(reached, reward, terminated)

    def render(self, state: Float[Tensor, "B 4"]) -> UInt8[Tensor, "B H W 3"]:
        """Pictures of the two links, and of the line that the tip has to reach."""
        canvas = Canvas(len(state), _VIEW, state.device)
        low, high = state.new_tensor([[-2.2, 1.0]]), state.new_tensor([[2.2, 1.0]])
        canvas.draw(low, high, width=0.03, colour=GREY)
        pivot, angle = state.new_zeros(1, 2), state[:, 0]
        joint = torch.stack((angle.sin(), -angle.cos()), dim=-1)
        angle = angle + state[:, 1]
        tip = joint + torch.stack((angle.sin(), -angle.cos()), dim=-1)
        canvas.draw(pivot, joint, width=0.16, colour=BLUE)
        canvas.draw(joint, tip, width=0.16, colour=ORANGE)
        return canvas.pictures()


def _rate(state: Float[Tensor, "4 B"], torque: Int[Tensor, " B"]) -> Float[Tensor, "4 B"]:
    """Time derivative of the state (Sutton and Barto 1998, section 11.3).

    The constants are those of the book: links of 1 m, 1 kg and 1 kg m^2, centres of mass in the
    middle of the links.
    """
    angle_1, angle_2, velocity_1, velocity_2 = state.unbind()
    sin_2, cos_2 = angle_2.sin(), angle_2.cos()
    d_1 = cos_2 + 3.5
    d_2 = 0.5 * cos_2 + 1.25
    phi_2 = 0.5 * GRAVITY * (angle_1 + angle_2).sin()
    coriolis = (0.5 * velocity_2 + velocity_1) * velocity_2 * sin_2
    phi_1 = 1.5 * GRAVITY * angle_1.sin() + phi_2 - coriolis
    ratio = d_2 / d_1
    force = torque + ratio * phi_1 - 0.5 * velocity_1.square() * sin_2 - phi_2
    acceleration_2 = force / (1.25 - d_2 * ratio)
    acceleration_1 = -(d_2 * acceleration_2 + phi_1) / d_1
    return torch.stack((velocity_1, velocity_2, acceleration_1, acceleration_2))


def _wrap(angle: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The same angle in [-pi, pi]; an angle that lies there already does not change a bit."""
    return torch.sub(angle, (angle / math.tau).round(), alpha=math.tau)
