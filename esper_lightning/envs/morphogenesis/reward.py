"""The terms of the reward.

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
    """Weights of the terms of the reward.

    Attributes:
        gain: Weight of the accuracy gained in a step, in [0, 1].
        rent: Weight of grown parameters over host parameters, in each step.
        intervention: Price of an op that is not WAIT.
        divergence: Reward of the step in which a host diverges, instead of the gain.
        shaping: Weight of potential-based shaping on stages; 0 is off.
        shaping_discount: Discount of the learner.
    """

    gain: float
    rent: float
    intervention: float
    divergence: float
    shaping: float
    shaping_discount: float


def stage_potential(stage: Int[Tensor, "B S"], dtype: torch.dtype) -> Float[Tensor, " B"]:
    """Potential of a host: the sum over its slots of how far each has come in its life."""
    # There is no table on the device: copying a table there would wait for the device.
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

    The caller must give 0 as the potential of the state in which an episode ends (Ng et al. 1999):
    shaping then adds the same to the discounted return of every policy.
    """
    dtype = grown.dtype
    return {
        "gain": (weights.gain * gain).masked_fill(diverged, 0.0),
        "rent": -weights.rent * grown,
        "intervention": -weights.intervention * intervened.to(dtype),
        "divergence": weights.divergence * diverged.to(dtype),
        "shaping": weights.shaping * (weights.shaping_discount * potential - potential_before),
    }
