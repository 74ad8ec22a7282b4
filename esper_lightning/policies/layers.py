"""Layers with orthogonal initialisation, and checks of their sizes.

The initialisation is that of Saxe et al. 2014, with the gains of Huang et al. 2022.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from esper_lightning.core.errors import require

__all__ = [
    "WIDEST",
    "Activation",
    "activation_layer",
    "check_layers",
    "check_std",
    "check_widest",
    "mlp",
    "orthogonal_convolution",
    "orthogonal_linear",
]

WIDEST = 65_536
"""Greatest number of inputs or outputs of a layer."""

Activation = Literal["tanh", "relu", "elu", "gelu", "silu"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def orthogonal_linear(
    inputs: int, outputs: int, *, gain: float, generator: torch.Generator, chunks: int = 1
) -> nn.Linear:
    """A linear layer with an orthogonal weight and a bias of zero.

    Args:
        inputs: Number of inputs.
        outputs: Number of outputs.
        gain: Factor of the orthogonal weight.
        generator: Source of the weight, and the only one.
        chunks: Number of equal chunks of outputs, each with an orthogonal weight of its own.
    """
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    for chunk in layer.weight.detach().chunk(chunks):
        nn.init.orthogonal_(chunk, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def orthogonal_convolution(
    inputs: int, outputs: int, kernel: int, stride: int, *, generator: torch.Generator
) -> nn.Conv2d:
    """A convolution with an orthogonal weight and a bias of zero.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        kernel: Width and height of the kernel in pixels.
        stride: Pixels by which the kernel moves.
        generator: Source of the weight, and the only one.
    """
    layer = nn.utils.skip_init(nn.Conv2d, inputs, outputs, kernel, stride)
    assert isinstance(layer, nn.Conv2d)
    nn.init.orthogonal_(layer.weight, math.sqrt(2.0), generator=generator)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def activation_layer(activation: Activation) -> nn.Module:
    """The module of a nonlinearity, by the name that settings use."""
    return _ACTIVATIONS[activation]()


def mlp(
    inputs: int,
    hidden_sizes: tuple[int, ...],
    *,
    activation: Activation,
    generator: torch.Generator,
) -> nn.Sequential:
    """Linear layers, each followed by a nonlinearity.

    Args:
        inputs: Number of inputs of the first layer.
        hidden_sizes: Number of outputs of each layer; may be empty.
        activation: Nonlinearity after each layer.
        generator: Source of the initial weights.
    """
    layers: list[nn.Module] = []
    for size in hidden_sizes:
        layers += [
            orthogonal_linear(inputs, size, gain=math.sqrt(2.0), generator=generator),
            activation_layer(activation),
        ]
        inputs = size
    return nn.Sequential(*layers)


def check_layers(owner: str, hidden_sizes: tuple[int, ...]) -> None:
    """Refuse an empty list of hidden layers, and layers that are too narrow or too wide.

    Args:
        owner: Name of the spec, for the error.
        hidden_sizes: Width of each hidden layer.

    Raises:
        ValueError: If ``hidden_sizes`` is empty or a width is out of range.
    """
    ok = len(hidden_sizes) > 0 and min(hidden_sizes) >= 1
    require(ok, f"{owner}.hidden_sizes", "be one or more widths of at least 1", hidden_sizes)
    check_widest(f"{owner}.hidden_sizes", *hidden_sizes)


def check_std(owner: str, std: float) -> None:
    """Refuse an initial standard deviation of a Gaussian that is out of range.

    Args:
        owner: Name of the spec, for the error.
        std: Standard deviation at the start.

    Raises:
        ValueError: If ``std`` lies outside (0, 100).
    """
    require(0.0 < std < 100.0, f"{owner}.initial_std", "lie in (0, 100)", std)


def check_widest(field: str, *widths: int) -> None:
    """Refuse a layer so wide that no machine initialises it in a reasonable time.

    Args:
        field: Name of the setting, for the error.
        *widths: Widths of layers.

    Raises:
        ValueError: If a width is greater than ``WIDEST``.
    """
    widest = max(widths, default=0)
    require(widest <= WIDEST, field, f"be at most {WIDEST}", widest)
