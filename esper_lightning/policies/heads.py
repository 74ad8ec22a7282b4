"""Action heads: from features to a distribution, and from its samples to the environment's actions.

Axes: ``M`` sample, ``H`` feature, ``A`` action component, ``K`` choice.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from esper_lightning.core.distributions import (
    Categorical,
    ConditionedCategorical,
    DiagonalGaussian,
    Distribution,
    FactoredCategorical,
    TanhGaussian,
)
from esper_lightning.core.errors import require
from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.spaces import (
    ActionSpace,
    Box,
    Discrete,
    FactoredDiscrete,
    MultiDiscrete,
    mask_size,
)
from esper_lightning.policies.layers import orthogonal_linear

__all__ = ["ActionHead", "CategoricalHead", "GaussianHead", "action_head"]

_HEAD_GAIN = 0.01  # a nearly uniform policy at the start


class CategoricalHead(nn.Module):
    """Action head for one choice, or for several choices at once.

    Args:
        features: Number of features ``H``.
        space: Action space.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        features: int,
        space: Discrete | MultiDiscrete | FactoredDiscrete,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._space = space
        self.logits = orthogonal_linear(
            features, mask_size(space), gain=_HEAD_GAIN, generator=generator
        )

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "... K"]:
        """Random numbers for sampling, ``[*shape, K]``, on the device of the generator."""
        size = self.logits.out_features
        return torch.empty(*shape, size, device=generator.device).exponential_(generator=generator)

    def forward(
        self, features: Float[Tensor, "M H"], mask: Bool[Tensor, "M K"] | None
    ) -> Distribution:
        """The distribution over the choices that the mask allows."""
        logits = self.logits(features)
        if isinstance(self._space, FactoredDiscrete):
            return ConditionedCategorical(logits, self._space, mask)
        if isinstance(self._space, MultiDiscrete):
            return FactoredCategorical(logits, self._space.nvec, mask)
        return Categorical(logits, mask)

    def to_env(self, action: Shaped[Tensor, "M *A"]) -> Shaped[Tensor, "M ..."]:
        """The choices themselves, since environments take them as they are sampled."""
        return action


class GaussianHead(nn.Module):
    """Action head for continuous actions: a Gaussian whose mean alone depends on the state.

    In a bounded space the Gaussian has units in which the bounds are -1 and 1. ``clip`` cuts
    samples at the bounds when they are passed to the environment; ``tanh`` squashes the
    distribution itself. In an unbounded space the environment gets the samples as they are.

    Args:
        features: Number of features ``H``.
        space: Action space.
        bounds: Way to keep samples within a bounded space: ``clip`` or ``tanh``.
        initial_std: Standard deviation at the start, in units where the bounds are -1 and 1.
        generator: Source of the initial weights.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        features: int,
        space: Box,
        *,
        bounds: Literal["clip", "tanh"],
        initial_std: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._shape, self._bounded, self._squashed = space.shape, space.bounded, bounds == "tanh"
        self.mean = orthogonal_linear(features, space.size, gain=_HEAD_GAIN, generator=generator)
        self.log_std = nn.Parameter(torch.full((space.size,), initial_std).log())
        self.register_buffer("low", torch.tensor(space.lows), persistent=False)
        self.register_buffer("high", torch.tensor(space.highs), persistent=False)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "... A"]:
        """Random numbers for sampling, ``[*shape, A]``, on the device of the generator."""
        size = self.mean.out_features
        return torch.empty(*shape, size, device=generator.device).normal_(generator=generator)

    def forward(
        self, features: Float[Tensor, "M H"], mask: Bool[Tensor, "M K"] | None
    ) -> Distribution:
        """The distribution over actions ``[M, A]``; ``mask`` must be ``None``."""
        assert mask is None
        mean = self.mean(features)
        kind = TanhGaussian if self._squashed else DiagonalGaussian
        return kind(mean, self.log_std.expand_as(mean))

    def to_env(self, action: Shaped[Tensor, "M A"]) -> Shaped[Tensor, "M ..."]:
        """Samples within the bounds of the space and in its units and shape."""
        if self._bounded:
            unit = action.tanh() if self._squashed else action.clamp(-1.0, 1.0)
            # Without the clamp, rounding could carry an action out of the bounds.
            action = (self.low + (unit + 1.0) * 0.5 * (self.high - self.low)).clamp(
                self.low, self.high
            )
        return action.reshape(*action.shape[:-1], *self._shape)  # [M, A] -> [M, *A]


ActionHead = CategoricalHead | GaussianHead


def action_head(
    features: int,
    space: ActionSpace,
    *,
    owner: str,
    bounds: Literal["clip", "tanh"],
    initial_std: float,
    generator: torch.Generator,
) -> ActionHead:
    """The head that fits an action space.

    Args:
        features: Number of features ``H``.
        space: Action space of the environment.
        owner: Name of the policy spec, for errors.
        bounds: Way to keep continuous actions within a bounded space: ``clip`` or ``tanh``.
        initial_std: Standard deviation of continuous actions at the start, in units where the
            bounds are -1 and 1.
        generator: Source of the initial weights.

    Raises:
        ValueError: If no head fits the space.
    """
    if isinstance(space, Discrete | MultiDiscrete | FactoredDiscrete):
        return CategoricalHead(features, space, generator=generator)
    supported = isinstance(space, Box)  # pyright: ignore[reportUnnecessaryIsInstance]
    rule = "be Discrete, MultiDiscrete, FactoredDiscrete or Box"
    require(supported, f"{owner}'s action space", rule, space)
    free = all(low == -torch.inf for low in space.lows) and all(
        high == torch.inf for high in space.highs
    )
    hint = "Bound both sides of every component, or none."
    require(
        space.bounded or free,
        f"{owner}'s action space",
        "be bounded everywhere or nowhere",
        space,
        hint,
    )
    ok = space.bounded or bounds == "clip"
    require(ok, f"{owner}.action_bounds", "be 'clip' where the action space has no bounds", bounds)
    return GaussianHead(
        features, space, bounds=bounds, initial_std=initial_std, generator=generator
    )
