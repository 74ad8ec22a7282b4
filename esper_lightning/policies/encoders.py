"""Encoders: modules from observations to features.

Axes: ``M`` sample, ``*O`` observation, ``H`` feature.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from esper_lightning.core.errors import check_fields, require
from esper_lightning.core.shapes import Float
from esper_lightning.core.spaces import Box, ObsSpace
from esper_lightning.core.types import Observation
from esper_lightning.policies.layers import (
    Activation,
    check_widest,
    mlp,
)

__all__ = [
    "Encoder",
    "EncoderSpec",
    "Flat",
    "FlatEncoder",
    "Groups",
    "HiddenLayers",
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


@dataclass(frozen=True, kw_only=True)
class Flat(EncoderSpec):
    """Hidden layers over vectors, for a group within ``Groups``.

    Observations of any shape are flattened to vectors.

    Attributes:
        hidden_sizes: Width of each hidden layer. An empty list means that the vector itself is
            passed on.
        activation: Nonlinearity after each hidden layer.
    """

    hidden_sizes: tuple[int, ...] = (64,)
    activation: Activation = "tanh"

    def __post_init__(self) -> None:
        check_fields(self)
        ok = min(self.hidden_sizes, default=1) >= 1
        require(ok, "Flat.hidden_sizes", "be widths of at least 1", self.hidden_sizes)
        check_widest("Flat.hidden_sizes", *self.hidden_sizes)

    def build_encoder(self, space: ObsSpace, generator: torch.Generator) -> Encoder:
        """Build the encoder on the CPU; ``generator`` is the only source of randomness."""
        sizes, activation = self.hidden_sizes, self.activation
        return FlatEncoder(space, None, sizes, activation=activation, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Groups(EncoderSpec):
    """An encoder for each group of an observation; their features are joined.

    Groups without an encoder are not seen.

    Attributes:
        encoders: Encoder of each group by the name of the group, such as ``{"image": Image(),
            "speed": Flat()}``.
    """

    encoders: dict[str, EncoderSpec]

    def __post_init__(self) -> None:
        rule = "be a dict of encoder specs by group, such as {'image': Image()}"
        ok = bool(self.encoders) and all(
            isinstance(encoder, EncoderSpec)  # pyright: ignore[reportUnnecessaryIsInstance]
            for encoder in self.encoders.values()
        )
        require(ok, "Groups.encoders", rule, self.encoders)

    def __hash__(self) -> int:
        return hash(repr(self))

    def build_encoder(self, space: ObsSpace, generator: torch.Generator) -> Encoder:
        """Build the encoders on the CPU; ``generator`` is the only source of randomness.

        Raises:
            ValueError: If a group does not exist, or an encoder does not fit its group.
        """
        known = [] if isinstance(space, Box) else list(space)
        for name in self.encoders:
            rule = f"name groups of the observation ({', '.join(known) or 'it has none'})"
            require(name in known, "Groups.encoders", rule, name)
        assert not isinstance(space, Box)
        # In the order of the space, because equal dicts of encoders may be ordered differently.
        return _GroupsEncoder(
            {
                name: self.encoders[name].build_encoder(box, generator)
                for name, box in space.items()
                if name in self.encoders
            }
        )


class _GroupsEncoder(Encoder):
    """Encoders of groups, whose features are joined in the order of the groups."""

    def __init__(self, encoders: dict[str, Encoder]) -> None:
        super().__init__()
        # The prefix keeps groups from taking the names of a module's own attributes.
        self.encoders = nn.ModuleDict({f"group_{name}": each for name, each in encoders.items()})
        self._groups = tuple(encoders)
        self.features = sum(encoder.features for encoder in encoders.values())

    def forward(self, obs: Observation) -> Float[Tensor, "M H"]:
        """Features of each row."""
        assert isinstance(obs, dict)
        return torch.cat([self.encoders[f"group_{name}"](obs[name]) for name in self._groups], -1)


class HiddenLayers(nn.Sequential, Encoder):  # pyright: ignore[reportIncompatibleVariableOverride]
    """An encoder of features that another module has computed: hidden layers alone.

    Args:
        inputs: Number of features that the layers see.
        hidden_sizes: Width of each hidden layer; may be empty.
        activation: Nonlinearity after each hidden layer.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        inputs: int,
        hidden_sizes: tuple[int, ...],
        *,
        activation: Activation,
        generator: torch.Generator,
    ) -> None:
        super().__init__(*mlp(inputs, hidden_sizes, activation=activation, generator=generator))
        self.features = hidden_sizes[-1] if hidden_sizes else inputs


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
