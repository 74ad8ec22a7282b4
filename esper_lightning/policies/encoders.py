"""Encoders: modules from observations to features.

Axes: ``M`` sample, ``*O`` observation, ``C H W`` image, ``H`` feature.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from esper_lightning.core.errors import Words, check_fields, require
from esper_lightning.core.shapes import Float
from esper_lightning.core.spaces import Box, ObsSpace
from esper_lightning.core.types import Observation
from esper_lightning.policies.layers import (
    WIDEST,
    Activation,
    activation_layer,
    check_widest,
    mlp,
    orthogonal_convolution,
)

__all__ = [
    "ConvolutionSettings",
    "Encoder",
    "EncoderSpec",
    "FlatEncoder",
    "Image",
    "ImageEncoder",
    "with_hidden_layers",
]


class Encoder(nn.Module):
    """A module from observations ``[M, *O]`` to features ``[M, H]``."""

    features: int
    """``H``, the number of features."""


class EncoderSpec(ABC):
    """The settings of an encoder: data without tensors."""

    @abstractmethod
    def build_encoder(self, space: ObsSpace, generator: torch.Generator) -> Encoder:
        """Build the encoder on the CPU.

        Args:
            space: Observation space.
            generator: Source of the initial weights, and the only one.

        Raises:
            ValueError: If the encoder does not fit the space.
        """


class FlatEncoder(nn.Sequential, Encoder):  # pyright: ignore[reportIncompatibleVariableOverride]
    """An encoder that flattens observations to vectors and passes them through hidden layers.

    Args:
        space: Observation space.
        groups: Names of the observation groups to see, in this order; ``None`` for all.
        hidden_sizes: Width of each hidden layer; may be empty.
        activation: Nonlinearity after each hidden layer.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        space: ObsSpace,
        groups: tuple[str, ...] | None,
        hidden_sizes: tuple[int, ...],
        *,
        activation: Activation,
        generator: torch.Generator,
    ) -> None:
        # Groups come in the order of the space, because equal dicts of observations may be ordered
        # differently.
        groups = None if isinstance(space, Box) else groups or tuple(space)
        boxes = [space] if isinstance(space, Box) else [space[name] for name in groups or ()]
        inputs = sum(box.size for box in boxes)
        super().__init__(*mlp(inputs, hidden_sizes, activation=activation, generator=generator))
        self._groups = groups
        self.features = hidden_sizes[-1] if hidden_sizes else inputs

    def forward(self, obs: Observation) -> Float[Tensor, "M H"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Features of each row."""
        if isinstance(obs, Tensor):
            flat = _flat(obs)
        else:
            assert self._groups is not None
            flat = torch.cat([_flat(obs[name]) for name in self._groups], -1)
        return cast(Tensor, super().forward(flat))


class ImageEncoder(Encoder):
    """An encoder that passes images ``[C, H, W]`` through convolutions and hidden layers.

    In a grouped observation each image has convolutions of its own, and the groups that are vectors
    are joined with the results of the convolutions before the hidden layers.

    Args:
        settings: Sizes of the layers.
        space: Observation space with at least one image. An image whose bounds are 0 and 255 holds
            bytes, and is scaled to between 0 and 1.
        generator: Source of the initial weights.

    Raises:
        ValueError: If there is no image, or an image is too small for the convolutions.
    """

    def __init__(
        self, settings: "ConvolutionSettings", space: ObsSpace, generator: torch.Generator
    ) -> None:
        super().__init__()
        owner = type(settings).__name__
        boxes = {"obs": space} if isinstance(space, Box) else space
        self._grouped = not isinstance(space, Box)
        self._scales: dict[str, float | None] = {}
        self.convolutions = nn.ModuleDict()
        inputs = 0
        for name, box in boxes.items():
            self._scales[name] = 1.0 / 255.0 if (box.low, box.high) == (0.0, 255.0) else None
            if len(box.shape) == 3:
                # The prefix keeps groups from taking the names of a module's own attributes.
                layers, size = _convolutions(settings, owner, box.shape, generator)
                self.convolutions[f"group_{name}"] = layers
                inputs += size
            else:
                where = owner if not self._grouped else f"{owner}'s observation group {name!r}"
                rule = "see images [C, H, W]" + (" or vectors" if self._grouped else "")
                require(self._grouped and len(box.shape) < 2, where, rule, list(box.shape))
                inputs += box.size
        rule, shapes = "see an image [C, H, W]", [list(box.shape) for box in boxes.values()]
        require(len(self.convolutions) > 0, owner, rule, shapes)
        self.hidden = mlp(
            inputs, settings.hidden_sizes, activation=settings.activation, generator=generator
        )
        self.features = settings.hidden_sizes[-1] if settings.hidden_sizes else inputs

    def forward(self, obs: Observation) -> Float[Tensor, "M H"]:
        """Features of each row."""
        groups = {"obs": obs} if isinstance(obs, Tensor) else obs
        encoded = [self._encode(name, groups[name]) for name in self._scales]
        return self.hidden(torch.cat(encoded, -1) if len(encoded) > 1 else encoded[0])

    def _encode(self, name: str, group: Tensor) -> Tensor:
        scale, key = self._scales[name], f"group_{name}"
        if scale is not None:
            group = group * scale
        return _flat(self.convolutions[key](group) if key in self.convolutions else group)


@dataclass(frozen=True, kw_only=True)
class ConvolutionSettings:
    """Settings that ``Image`` and ``CNN`` share: the layers of an ``ImageEncoder``.

    Attributes:
        channels: Number of output channels of each convolution. The defaults of ``channels``,
            ``kernels`` and ``strides`` are the network of Mnih et al. 2015 for images of 84 x 84
            pixels.
        kernels: Width and height in pixels of the kernel of each convolution.
        strides: Number of pixels by which each convolution moves its kernel.
        hidden_sizes: Width of each hidden layer behind the convolutions. An empty list means no
            such layer.
        activation: Nonlinearity after each convolution and each hidden layer.
    """

    channels: tuple[int, ...] = (32, 64, 64)
    kernels: tuple[int, ...] = (8, 4, 3)
    strides: tuple[int, ...] = (4, 2, 1)
    hidden_sizes: tuple[int, ...] = (512,)
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        check_fields(self)
        owner = type(self).__name__
        for name in ("channels", "kernels", "strides"):
            sizes = getattr(self, name)
            ok = len(sizes) > 0 and min(sizes) >= 1
            require(ok, f"{owner}.{name}", "be one or more sizes of at least 1", sizes)
            check_widest(f"{owner}.{name}", *sizes)
            rule = f"have as many entries as {owner}.channels = {self.channels}"
            require(len(sizes) == len(self.channels), f"{owner}.{name}", rule, sizes)
        ok = min(self.hidden_sizes, default=1) >= 1
        require(ok, f"{owner}.hidden_sizes", "be widths of at least 1", self.hidden_sizes)
        check_widest(f"{owner}.hidden_sizes", *self.hidden_sizes)


@dataclass(frozen=True, kw_only=True)
class Image(ConvolutionSettings, EncoderSpec):
    """Convolutions over images ``[C, H, W]``, for ``Recurrent(encoder=Image())``.

    Images in a space between 0 and 255 are scaled to between 0 and 1. In a grouped observation each
    image has convolutions of its own, and the groups that are vectors are joined with the results
    of the convolutions before the hidden layers.

    The settings are those of ``ConvolutionSettings``.
    """

    def build_encoder(self, space: ObsSpace, generator: torch.Generator) -> Encoder:
        """Build the encoder on the CPU; ``generator`` is the only source of randomness.

        Raises:
            ValueError: If the space has no image, or an image is too small for the convolutions.
        """
        return ImageEncoder(self, space, generator)


class _Stacked(nn.Sequential, Encoder):  # pyright: ignore[reportIncompatibleVariableOverride]
    """An encoder with hidden layers behind it."""

    def __init__(self, encoder: Encoder, hidden: nn.Sequential, features: int) -> None:
        super().__init__(encoder, *hidden)
        self.features = features


def with_hidden_layers(
    encoder: Encoder,
    hidden_sizes: tuple[int, ...],
    *,
    activation: Activation,
    generator: torch.Generator,
) -> Encoder:
    """An encoder with further hidden layers behind it.

    Args:
        encoder: The first layers.
        hidden_sizes: Width of each further layer; if there are none, ``encoder`` itself is
            returned.
        activation: Nonlinearity after each further layer.
        generator: Source of the initial weights.
    """
    if not hidden_sizes:
        return encoder
    hidden = mlp(encoder.features, hidden_sizes, activation=activation, generator=generator)
    return _Stacked(encoder, hidden, hidden_sizes[-1])


def _flat(group: Tensor) -> Tensor:
    """[M, *O] -> [M, O], and [M] -> [M, 1]."""
    return group.unsqueeze(1).flatten(1)


def _convolutions(
    settings: ConvolutionSettings,
    owner: str,
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> tuple[nn.Sequential, int]:
    """Convolutions over an image ``[C, H, W]``, and the number of features that they return."""
    inputs, height, width = shape
    sizes = zip(settings.channels, settings.kernels, settings.strides, strict=True)
    layers: list[nn.Module] = []
    for number, (outputs, kernel, stride) in enumerate(sizes, start=1):
        fits = kernel <= min(height, width)
        rule = f"fit into images {list(shape)}, which are [C, H, W]"
        hint = f"Convolution {number} sees {height} x {width} pixels."
        require(fits, f"{owner}.kernels", rule, settings.kernels, hint)
        layers += [
            orthogonal_convolution(inputs, outputs, kernel, stride, generator=generator),
            activation_layer(settings.activation),
        ]
        inputs = outputs
        height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    size = inputs * height * width
    rule = f"shrink images {list(shape)} to at most {WIDEST} features"
    got = Words(f"{settings.strides}, which leave {size}")
    require(size <= WIDEST, f"{owner}.strides", rule, got)
    return nn.Sequential(*layers), size
