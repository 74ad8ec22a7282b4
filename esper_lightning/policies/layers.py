"""Building blocks with orthogonal initialisation.

Saxe et al. 2014; the gains are those of Huang et al. 2022.
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

WIDEST = 65_536  # inputs or outputs of a layer

Activation = Literal["tanh", "relu", "elu", "gelu", "silu"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def orthogonal_linear(
    inputs: int, outputs: int, *, gain: float, generator: torch.Generator, parts: int = 1
) -> nn.Linear:
    """A linear layer with orthogonal weight and zero bias, which draws from ``generator`` only.

    With ``parts``, each of so many equal parts of the outputs is orthogonal in itself.
    """
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    for part in layer.weight.detach().chunk(parts):
        nn.init.orthogonal_(part, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def orthogonal_convolution(
    inputs: int, outputs: int, kernel: int, stride: int, *, generator: torch.Generator
) -> nn.Conv2d:
    """A convolution with orthogonal weight and zero bias, which draws from ``generator`` only."""
    layer = nn.utils.skip_init(nn.Conv2d, inputs, outputs, kernel, stride)
    assert isinstance(layer, nn.Conv2d)
    nn.init.orthogonal_(layer.weight, math.sqrt(2.0), generator=generator)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def activation_layer(activation: Activation) -> nn.Module:
    """The nonlinearity of that name."""
    return _ACTIVATIONS[activation]()


def mlp(
    inputs: int,
    hidden_sizes: tuple[int, ...],
    *,
    activation: Activation,
    generator: torch.Generator,
) -> nn.Sequential:
    """Linear layers of ``hidden_sizes``, each followed by the activation."""
    layers: list[nn.Module] = []
    for size in hidden_sizes:
        layers += [
            orthogonal_linear(inputs, size, gain=math.sqrt(2.0), generator=generator),
            activation_layer(activation),
        ]
        inputs = size
    return nn.Sequential(*layers)


def check_layers(owner: str, hidden_sizes: tuple[int, ...]) -> None:
    """Refuse hidden layers of which there are none, or that are too narrow or too wide.

    Raises:
        ValueError: In the name of ``owner``.
    """
    ok = len(hidden_sizes) > 0 and min(hidden_sizes) >= 1
    require(ok, f"{owner}.hidden_sizes", "be one or more widths of at least 1", hidden_sizes)
    check_widest(f"{owner}.hidden_sizes", *hidden_sizes)


def check_std(owner: str, std: float) -> None:
    """Refuse an initial deviation of a Gaussian that is out of range.

    Raises:
        ValueError: In the name of ``owner``.
    """
    require(0.0 < std < 100.0, f"{owner}.initial_std", "lie in (0, 100)", std)


def check_widest(field: str, *widths: int) -> None:
    """Refuse a layer that no machine initialises in a human time.

    Raises:
        ValueError: In the name of ``field``.
    """
    widest = max(widths, default=0)
    require(widest <= WIDEST, field, f"be at most {WIDEST}", widest)
