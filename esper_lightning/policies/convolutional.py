"""Policies for images without memory."""

from dataclasses import dataclass
from typing import Literal

import torch

from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.policies.actor_critic import build_actor_critic
from esper_lightning.policies.base import Policy, PolicySpec
from esper_lightning.policies.encoders import ConvolutionSettings, ImageEncoder
from esper_lightning.policies.layers import check_std

__all__ = ["CNN"]


@dataclass(frozen=True, kw_only=True)
class CNN(ConvolutionSettings, PolicySpec):
    """A convolutional network for actor and critic, which see images ``[C, H, W]``.

    Images in a space between 0 and 255 are scaled to between 0 and 1. Of a grouped observation
    each image has convolutions of its own, and flat groups join their results before the hidden
    layers.

    Attributes:
        channels: Output channels of each convolution. The defaults are the network of Mnih et al.
            2015 for images of 84 x 84 pixels.
        kernels: Width and height in pixels of the kernel of each convolution.
        strides: Pixels by which each convolution moves its kernel.
        hidden_sizes: Width of each hidden layer behind the convolutions; may be none.
        activation: Nonlinearity after each convolution and hidden layer.
        trunk: Whether actor and critic share all layers but the last, or have layers of their own.
        action_bounds: Whether a Gaussian is cut at the bounds of the action space or squashed into
            them.
        initial_std: Standard deviation of a Gaussian at the start, in units where the bounds are -1
            and 1.
    """

    trunk: Literal["separate", "shared"] = "shared"
    action_bounds: Literal["clip", "tanh"] = "clip"
    initial_std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_std("CNN", self.initial_std)

    def build(self, spaces: EnvSpaces, generator: torch.Generator) -> Policy:
        """Allocate and initialise on the CPU, drawing from ``generator`` only.

        Raises:
            ValueError: If there is no image or one is too small, or the action space has no head.
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
