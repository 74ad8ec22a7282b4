"""Minibatches: some rows of the samples. Axis: ``M`` sample."""

from torch import Tensor

from esper_lightning.core.shapes import Int
from esper_lightning.core.types import Samples, map_obs

__all__ = ["take"]


def take(samples: Samples, index: Int[Tensor, " M"]) -> Samples:
    """Copies of the chosen rows."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor[index]

    return Samples(
        obs=map_obs(rows, samples.obs),
        action=rows(samples.action),
        log_prob=rows(samples.log_prob),
        action_mask=None if samples.action_mask is None else rows(samples.action_mask),
        advantage=rows(samples.advantage),
        value=rows(samples.value),
        value_target=rows(samples.value_target),
    )
