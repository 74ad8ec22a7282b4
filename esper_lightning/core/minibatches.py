"""Rollouts cut into shuffled minibatches. Axes: ``T`` step, ``B`` environment, ``M`` sample."""

from collections.abc import Iterator

import torch
from torch import Tensor

from esper_lightning.core.types import Observation, Samples, map_obs

__all__ = ["flatten_steps", "minibatches"]


def flatten_steps(value: Observation) -> Observation:
    """``[T, B, ...] -> [T*B, ...]``, of a tensor or of every group; a view."""
    return map_obs(_flatten, value)


def minibatches(samples: Samples, count: int, *, generator: torch.Generator) -> Iterator[Samples]:
    """One pass over all samples in random order, in ``count`` parts of equal size give or take 1.

    Args:
        samples: ``N`` samples.
        count: Number of parts, from 1 to ``N``.
        generator: Source of the order, on the device of the samples.

    Yields:
        Copies of the chosen rows.
    """
    total = samples.log_prob.shape[0]
    order = torch.randperm(total, generator=generator, device=samples.log_prob.device)
    for index in order.tensor_split(count):

        def rows(tensor: Tensor, index: Tensor = index) -> Tensor:
            return tensor[index]

        yield Samples(
            obs=map_obs(rows, samples.obs),
            action=rows(samples.action),
            log_prob=rows(samples.log_prob),
            action_mask=None if samples.action_mask is None else rows(samples.action_mask),
            advantage=rows(samples.advantage),
            value=rows(samples.value),
            value_target=rows(samples.value_target),
        )


def _flatten(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, 1)
