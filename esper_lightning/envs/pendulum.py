"""Pendulum: swing it up and hold it there with a weak motor.

Axes: ``B`` environment, two components of the state, one of the action, which is clipped.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from esper_lightning.core.shapes import Float, UInt8
from esper_lightning.core.spaces import Box, EnvSpaces
from esper_lightning.envs.autoreset import (
    RANDOM_STREAMS,
    AutoresetEnv,
    Transition,
    validate_sizes,
)
from esper_lightning.envs.base import EnvSpec
from esper_lightning.envs.drawing import GREY, ORANGE, Canvas, View

__all__ = ["Pendulum"]

GRAVITY = 10.0  # m/s^2; mass and length are 1
TIMESTEP_S = 0.05
MAX_SPEED = 8.0  # rad/s
MAX_TORQUE = 2.0  # N m
_VIEW = View(left=-1.2, right=1.2, bottom=-1.2, top=1.2)


@dataclass(frozen=True, kw_only=True)
class Pendulum(EnvSpec):
    """The swing-up of ``Pendulum-v1`` of Gymnasium (``classic_control/pendulum.py``).

    The state is the angle from upright in rad, unwrapped, and its velocity. The observation is
    cosine, sine and velocity. The action is a torque, clipped to [-2, 2] N m. The reward is
    ``-(angle^2 + 0.1 velocity^2 + 0.001 torque^2)`` of the state before the step, with the angle in
    [-pi, pi]. An episode never terminates.

    Attributes:
        num_envs: Number of environments on each rank.
        time_limit: Number of steps after which an episode is truncated.
    """

    num_envs: int = 64
    time_limit: int = 200
    random_streams: ClassVar[tuple[str, ...]] = RANDOM_STREAMS
    frames_per_s: ClassVar[float] = 1 / TIMESTEP_S

    def __post_init__(self) -> None:
        validate_sizes(self)

    def spaces(self) -> EnvSpaces:
        """Three features, one torque."""
        obs = Box((3,), low=(-1.0, -1.0, -MAX_SPEED), high=(1.0, 1.0, MAX_SPEED))
        return EnvSpaces(obs=obs, action=Box((1,), low=-MAX_TORQUE, high=MAX_TORQUE))

    def build(self, device: torch.device, seed: int) -> AutoresetEnv:
        """Allocate the environments."""
        return AutoresetEnv(self, device=device, seed=seed)

    def sample_states(
        self, steps: int, generator: torch.Generator, device: torch.device
    ) -> Float[Tensor, "T B 2"]:
        """Initial states, with an angle uniform in [-pi, pi) and a velocity in [-1, 1)."""
        unit = torch.empty(steps, self.num_envs, 2, device=device).uniform_(
            -1.0, 1.0, generator=generator
        )
        return torch.stack((unit[..., 0] * math.pi, unit[..., 1]), dim=-1)

    def observe(self, state: Float[Tensor, "B 2"]) -> Float[Tensor, "B 3"]:
        """Cosine and sine of the angle, and the velocity."""
        angle, velocity = state.unbind(-1)
        return torch.stack((angle.cos(), angle.sin(), velocity), dim=-1)

    def advance(self, state: Float[Tensor, "B 2"], action: Float[Tensor, "B 1"]) -> Transition:
        """One semi-implicit Euler step."""
        angle, velocity = state.unbind(-1)
        torque = action[:, 0].clamp(-MAX_TORQUE, MAX_TORQUE)
        from_upright = angle - math.tau * (angle / math.tau).round()
        cost = from_upright.square() + 0.1 * velocity.square() + 0.001 * torque.square()
        acceleration = 1.5 * GRAVITY * angle.sin() + 3.0 * torque
        velocity = torch.add(velocity, acceleration, alpha=TIMESTEP_S).clamp(-MAX_SPEED, MAX_SPEED)
        angle = torch.add(angle, velocity, alpha=TIMESTEP_S)
        reached = torch.stack((angle, velocity), dim=-1)
        return Transition(reached, -cost, torch.zeros_like(angle, dtype=torch.bool))

    def render(self, state: Float[Tensor, "B 2"]) -> UInt8[Tensor, "B H W 3"]:
        """Pictures of the rod and its pivot."""
        canvas = Canvas(len(state), _VIEW, state.device)
        pivot = state.new_zeros(1, 2)
        tip = torch.stack((-state[:, 0].sin(), state[:, 0].cos()), dim=-1)
        canvas.draw(pivot, tip, width=0.2, colour=ORANGE)
        canvas.draw(pivot, pivot, width=0.1, colour=GREY)
        return canvas.pictures()
