"""Building blocks with orthogonal initialisation.

Saxe et al. 2014; the gains are those of Huang et al. 2022.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

__all__ = ["Activation", "mlp", "orthogonal_linear"]

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
            _ACTIVATIONS[activation](),
        ]
        inputs = size
    return nn.Sequential(*layers)
