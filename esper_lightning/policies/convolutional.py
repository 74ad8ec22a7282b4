"""Policies for images, without memory."""

from dataclasses import dataclass
from typing import Literal

import torch

from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.policies.actor_critic import build_actor_critic
from esper_lightning.policies.base import Policy, PolicySpec
from esper_lightning.policies.images import ConvolutionSettings, ImageEncoder
from esper_lightning.policies.layers import check_std

__all__ = ["CNN"]


@dataclass(frozen=True, kw_only=True)
class CNN(ConvolutionSettings, PolicySpec):
    """A convolutional network for actor and critic, for images, without memory.

    In a grouped observation each image has convolutions of its own, and the groups that are vectors
    are joined with the results of the convolutions before the hidden layers. ``Composed`` with
    ``Groups`` chooses an encoder for each group, and other groups for the critic.

    The settings of the layers are those of ``ConvolutionSettings``.

    Attributes:
        trunk: Whether actor and critic share all layers but the last (``shared``) or have layers of
            their own (``separate``).
        action_bounds: Way to keep continuous actions within a bounded action space: ``clip`` cuts
            sampled actions at the bounds, ``tanh`` squashes the distribution into the bounds.
        initial_std: Standard deviation of continuous actions at the start, in units where the
            bounds are -1 and 1.
    """

    trunk: Literal["separate", "shared"] = "shared"
    action_bounds: Literal["clip", "tanh"] = "clip"
    initial_std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_std("CNN", self.initial_std)

    def build(self, spaces: EnvSpaces, generator: torch.Generator) -> Policy:
        """Build the policy on the CPU; ``generator`` is the only source of randomness.

        Raises:
            ValueError: If there is no image, an image is too small for the convolutions, or no head
                fits the action space.
        """
        actor = ImageEncoder(self, spaces.obs, generator)
        separate = self.trunk == "separate"
        return build_actor_critic(
            actor,
            ImageEncoder(self, spaces.obs, generator) if separate else actor,
            spaces.action,
            owner="CNN",
            action_bounds=self.action_bounds,
            initial_std=self.initial_std,
            generator=generator,
        )
