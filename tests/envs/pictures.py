"""Environments that observe small images, and end their episodes often or seldom."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.core.types import Observation
from esper_lightning.envs.autoreset import AutoresetEnv, Transition
from esper_lightning.envs.base import EnvSpec

PLACES = 97


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures(EnvSpec):
    """An image of noise for each of 97 places; actions lead from place to place.

    With ``grouped`` the observation has a group ``vector`` beside the group ``image``.
    """

    num_envs: int = 4
    time_limit: int = 10
    shape: tuple[int, ...] = (1, 5, 5)
    dtype: Literal["uint8", "float32"] = "uint8"
    grouped: bool = False
    last_places: int = 5  # places at which an episode is terminated

    def spaces(self) -> EnvSpaces:
        image = Box(self.shape, 0.0, 255.0, dtype=self.dtype)
        obs = {"image": image, "vector": Box((2,))} if self.grouped else image
        return EnvSpaces(obs=obs, action=Discrete(3))

    def build(self, device: torch.device, seed: int) -> AutoresetEnv:
        return AutoresetEnv(self, device=device, seed=seed)

    def sample_states(self, steps: int, generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.randint(
            PLACES, (steps, self.num_envs, 1), generator=generator, device=device
        ).float()

    def observe(self, state: Tensor) -> Observation:
        pixels = torch.arange(1, 1 + Box(self.shape).size, device=state.device)
        image = ((state + 1.0) * pixels * 37.0) % 251.0
        image = image.view(-1, *self.shape).to(getattr(torch, self.dtype))
        vector = torch.cat([state, -state], 1)
        return {"image": image, "vector": vector} if self.grouped else image

    def advance(self, state: Tensor, action: Tensor) -> Transition:
        place = (state * 5.0 + action[:, None] * 7.0 + 3.0) % PLACES
        reward = (place[:, 0] % 3.0) - 1.0
        return Transition(place, reward, place[:, 0] < self.last_places)
