"""The reward, term by term.

Axes: ``B`` environment, ``S`` slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.envs.morphogenesis.lifecycle import Stage

__all__ = ["REWARD_TERMS", "RewardWeights", "reward_terms", "stage_potential"]

REWARD_TERMS = ("gain", "rent", "intervention", "divergence", "shaping")

_POTENTIAL = {
    Stage.DORMANT: 0.0,
    Stage.TRAINING: 1.0,
    Stage.BLENDING: 2.0,
    Stage.HOLDING: 3.0,
    Stage.FOSSILIZED: 4.0,
    Stage.FADING: 0.0,
    Stage.EMBARGOED: 0.0,
}


@dataclass(frozen=True, kw_only=True)
class RewardWeights:
    """What counts how much.

    Attributes:
        gain: Of the accuracy gained in a step, in [0, 1].
        rent: Of grown parameters over host parameters, in each step.
        intervention: Price of an op that is not WAIT.
        divergence: What the step in which a host diverges is worth, instead of its gain.
        shaping: Of potential-based shaping on stages; 0 is off.
        shaping_discount: The discount of whoever learns from it.
    """

    gain: float
    rent: float
    intervention: float
    divergence: float
    shaping: float
    shaping_discount: float


def stage_potential(stage: Int[Tensor, "B S"], dtype: torch.dtype) -> Float[Tensor, " B"]:
    """How far the slots of a host have come, summed."""
    # Not a table on the device: to copy one there would wait for it.
    total = torch.zeros(stage.shape, dtype=dtype, device=stage.device)
    for each, value in _POTENTIAL.items():
        total = total.masked_fill(stage == each, value)
    return total.sum(1)


def reward_terms(
    weights: RewardWeights,
    *,
    gain: Float[Tensor, " B"],
    grown: Float[Tensor, " B"],
    intervened: Bool[Tensor, " B"],
    diverged: Bool[Tensor, " B"],
    potential: Float[Tensor, " B"],
    potential_before: Float[Tensor, " B"],
) -> dict[str, Float[Tensor, " B"]]:
    """Terms whose sum is the reward.

    The potential of the state in which an episode ends is to be given as 0 (Ng et al. 1999): then
    what shaping adds to a discounted return is the same for all policies.
    """
    dtype = grown.dtype
    return {
        "gain": (weights.gain * gain).masked_fill(diverged, 0.0),
        "rent": -weights.rent * grown,
        "intervention": -weights.intervention * intervened.to(dtype),
        "divergence": weights.divergence * diverged.to(dtype),
        "shaping": weights.shaping * (weights.shaping_discount * potential - potential_before),
    }
