"""Convolutions over images, and the settings that choose them.

Axes: ``M`` sample, ``C H W`` image with channels first, ``H W C`` image with channels last.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from esper_lightning.core.errors import Words, check_fields, require
from esper_lightning.core.shapes import Float
from esper_lightning.core.spaces import Box, ChannelOrder, ObsSpace, channel_axis
from esper_lightning.core.types import Observation
from esper_lightning.policies.encoders import Encoder, EncoderSpec
from esper_lightning.policies.layers import (
    WIDEST,
    Activation,
    activation_layer,
    check_widest,
    mlp,
    orthogonal_convolution,
)

__all__ = ["ConvolutionSettings", "Image", "ImageEncoder"]


@dataclass(frozen=True, kw_only=True)
class ConvolutionSettings:
    """Settings that ``Image`` and ``CNN`` share: the layers of an ``ImageEncoder``.

    Attributes:
        kind: Kind of the convolutions. ``nature`` is a chain of convolutions, by default that of
            Mnih et al. 2015 for images of 84 x 84 pixels. ``impala`` is the residual network of
            Espeholt et al. 2018, which also fits small images: for each entry of ``channels`` a
            convolution, a maximum over neighbours that halves width and height, and two residual
            blocks.
        channels: Number of output channels of each convolution, or of each stage of ``impala``.
            ``None`` means ``[32, 64, 64]`` for ``nature`` and ``[16, 32, 32]`` for ``impala``.
        kernels: Width and height in pixels of the kernel of each convolution of ``nature``.
            ``None`` means ``[8, 4, 3]``.
        strides: Number of pixels by which each convolution of ``nature`` moves its kernel. ``None``
            means ``[4, 2, 1]``.
        hidden_sizes: Width of each hidden layer behind the convolutions. An empty list means no
            such layer. ``None`` means ``[512]`` for ``nature`` and ``[256]`` for ``impala``.
        activation: Nonlinearity after each convolution and each hidden layer.
        channel_order: Place of the channels in the shape of an image: ``first`` for ``[C, H, W]``,
            ``last`` for ``[H, W, C]``. ``auto`` takes the first or last axis if it is shorter than
            both other axes, and refuses all other images.
        scale_bytes: Whether images with bounds 0 and 255 are scaled to between 0 and 1. ``False``
            is for images whose bytes are small numbers and not brightness, as in MiniGrid.
    """

    kind: Literal["nature", "impala"] = "nature"
    channels: tuple[int, ...] | None = None
    kernels: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None
    hidden_sizes: tuple[int, ...] | None = None
    activation: Activation = "relu"
    channel_order: ChannelOrder = "auto"
    scale_bytes: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        owner, nature = type(self).__name__, self.kind == "nature"
        channels, kernels, strides = self.sizes
        named = {"channels": channels, "kernels": kernels, "strides": strides}
        for name, sizes in named.items():
            rule = "be None for kind='impala', whose kernels are 3 x 3"
            require(
                nature or name == "channels" or getattr(self, name) is None,
                f"{owner}.{name}",
                rule,
                getattr(self, name),
            )
            ok = len(sizes) > 0 and min(sizes) >= 1
            require(ok, f"{owner}.{name}", "be one or more sizes of at least 1", sizes)
            check_widest(f"{owner}.{name}", *sizes)
            rule = f"have as many entries as {owner}.channels = {channels}"
            require(len(sizes) == len(channels), f"{owner}.{name}", rule, sizes)
        ok = min(self.widths, default=1) >= 1
        require(ok, f"{owner}.hidden_sizes", "be widths of at least 1", self.hidden_sizes)
        check_widest(f"{owner}.hidden_sizes", *self.widths)

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Channels, kernels and strides of the convolutions, none of them ``None``."""
        if self.kind == "impala":
            channels = (16, 32, 32) if self.channels is None else self.channels
            return channels, (3,) * len(channels), (2,) * len(channels)
        return (
            (32, 64, 64) if self.channels is None else self.channels,
            (8, 4, 3) if self.kernels is None else self.kernels,
            (4, 2, 1) if self.strides is None else self.strides,
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each hidden layer, not ``None``."""
        if self.hidden_sizes is None:
            return (512,) if self.kind == "nature" else (256,)
        return self.hidden_sizes


@dataclass(frozen=True, kw_only=True)
class Image(ConvolutionSettings, EncoderSpec):
    """Convolutions over images, for ``Recurrent(encoder=Image())`` and within ``Groups``.

    In a grouped observation each image has convolutions of its own, and the groups that are vectors
    are joined with the results of the convolutions before the hidden layers.

    The settings are those of ``ConvolutionSettings``.
    """

    def build_encoder(self, space: ObsSpace, generator: torch.Generator) -> Encoder:
        """Build the encoder on the CPU; ``generator`` is the only source of randomness.

        Raises:
            ValueError: If the space has no image, or an image is too small for the convolutions.
        """
        return ImageEncoder(self, space, generator)


class ImageEncoder(Encoder):
    """An encoder that passes images through convolutions and hidden layers.

    In a grouped observation each image has convolutions of its own, and the groups that are vectors
    are joined with the results of the convolutions before the hidden layers.

    Args:
        settings: Settings of the layers.
        space: Observation space with at least one image, which is a box of three axes.
        generator: Source of the initial weights.

    Raises:
        ValueError: If there is no image, or an image is too small for the convolutions.
    """

    def __init__(
        self, settings: ConvolutionSettings, space: ObsSpace, generator: torch.Generator
    ) -> None:
        super().__init__()
        owner = type(settings).__name__
        boxes = {"obs": space} if isinstance(space, Box) else space
        self._grouped = not isinstance(space, Box)
        self._boxes = tuple(boxes)
        self._scaled: set[str] = set()
        self._channels_last: set[str] = set()
        self.convolutions = nn.ModuleDict()
        inputs = 0
        for name, box in boxes.items():
            if len(box.shape) != 3:
                where = owner if not self._grouped else f"{owner}'s observation group {name!r}"
                rule = "see images of three axes" + (" or vectors" if self._grouped else "")
                require(self._grouped and len(box.shape) < 2, where, rule, list(box.shape))
                inputs += box.size
                continue
            shape = box.shape
            if channel_axis(shape, settings.channel_order, owner=owner) == 2:
                self._channels_last.add(name)
                shape = (shape[2], *shape[:2])
            if settings.scale_bytes and (box.low, box.high) == (0.0, 255.0):
                self._scaled.add(name)
            # The prefix keeps groups from taking the names of a module's own attributes.
            build = _residual if settings.kind == "impala" else _convolutions
            layers, size = build(settings, owner, shape, generator)
            self.convolutions[f"group_{name}"] = layers
            inputs += size
        rule, shapes = "see an image of three axes", [list(box.shape) for box in boxes.values()]
        require(len(self.convolutions) > 0, owner, rule, shapes)
        widths = settings.widths
        self.hidden = mlp(inputs, widths, activation=settings.activation, generator=generator)
        self.features = widths[-1] if widths else inputs

    def forward(self, obs: Observation) -> Float[Tensor, "M H"]:
        """Features of each row."""
        groups = {"obs": obs} if isinstance(obs, Tensor) else obs
        encoded = [self._encode(name, groups[name]) for name in self._boxes]
        return self.hidden(torch.cat(encoded, -1) if len(encoded) > 1 else encoded[0])

    def _encode(self, name: str, group: Tensor) -> Tensor:
        key = f"group_{name}"
        if key not in self.convolutions:
            return group.unsqueeze(1).flatten(1)  # [M, O] or [M] -> [M, O]
        if name in self._scaled:
            group = group * (1.0 / 255.0)
        if name in self._channels_last:
            group = group.permute(0, 3, 1, 2)  # [M, H, W, C] -> [M, C, H, W]
        return self.convolutions[key](group).flatten(1)


def _convolutions(
    settings: ConvolutionSettings,
    owner: str,
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> tuple[nn.Sequential, int]:
    """Convolutions over an image ``[C, H, W]``, and the number of features that they return."""
    inputs, height, width = shape
    layers: list[nn.Module] = []
    for number, (outputs, kernel, stride) in enumerate(zip(*settings.sizes, strict=True), start=1):
        fits = kernel <= min(height, width)
        rule = f"fit into images of {shape[1]} x {shape[2]} pixels and {shape[0]} channels"
        hint = (
            f"Convolution {number} sees {height} x {width} pixels. For small images set "
            f"{owner}.kind='impala', or kernels=(3,), strides=(1,) and channels=(16,)."
        )
        require(fits, f"{owner}.kernels", rule, settings.sizes[1], hint)
        layers += [
            orthogonal_convolution(inputs, outputs, kernel, stride, generator=generator),
            activation_layer(settings.activation),
        ]
        inputs = outputs
        height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    size = inputs * height * width
    _check_size(f"{owner}.strides", settings.sizes[2], shape, size)
    return nn.Sequential(*layers), size


def _residual(
    settings: ConvolutionSettings,
    owner: str,
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> tuple[nn.Sequential, int]:
    """The stages of ``impala`` over an image ``[C, H, W]``, and the number of their features."""
    inputs, height, width = shape
    layers: list[nn.Module] = []
    for outputs in settings.sizes[0]:
        layers += [
            _padded(inputs, outputs, generator),
            nn.MaxPool2d(3, stride=2, padding=1),
            _Block(outputs, settings.activation, generator),
            _Block(outputs, settings.activation, generator),
        ]
        inputs, height, width = outputs, -(-height // 2), -(-width // 2)
    size = inputs * height * width
    _check_size(f"{owner}.channels", settings.sizes[0], shape, size)
    return nn.Sequential(*layers, activation_layer(settings.activation)), size


class _Block(nn.Module):
    """A residual block: two convolutions, whose result is added to their input."""

    def __init__(self, channels: int, activation: Activation, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            activation_layer(activation),
            _padded(channels, channels, generator),
            activation_layer(activation),
            _padded(channels, channels, generator),
        )

    def forward(self, image: Float[Tensor, "M C H W"]) -> Float[Tensor, "M C H W"]:
        """The image with the result of the convolutions added."""
        return image + self.layers(image)


def _padded(inputs: int, outputs: int, generator: torch.Generator) -> nn.Conv2d:
    """A convolution of 3 x 3 pixels that leaves width and height as they are."""
    layer = orthogonal_convolution(inputs, outputs, 3, 1, generator=generator)
    layer.padding = (1, 1)
    return layer


def _check_size(field: str, got: tuple[int, ...], shape: tuple[int, ...], size: int) -> None:
    pixels = math.prod(shape)
    rule = f"shrink images of {pixels} numbers to at most {WIDEST} features"
    require(size <= WIDEST, field, rule, Words(f"{got}, which leave {size}"))
