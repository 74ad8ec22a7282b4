"""Rollouts cut into shuffled minibatches. Axes: ``T`` step, ``B`` environment, ``M`` sample."""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from esper_lightning.core.types import Samples, map_obs

__all__ = ["flatten_steps", "minibatches"]

_Obs = TypeVar("_Obs", Tensor, Tensor | dict[str, Tensor])


def flatten_steps(value: _Obs) -> _Obs:
    """``[T, B, ...] -> [T*B, ...]``, of a tensor or of every group; a view."""
    return map_obs(lambda tensor: tensor.flatten(0, 1), value)  # pyright: ignore[reportReturnType]


def minibatches(samples: Samples, count: int, *, generator: torch.Generator) -> Iterator[Samples]:
    """One pass over all samples in random order, in ``count`` parts whose sizes differ by one at most.

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
        yield Samples(
            obs=map_obs(lambda tensor, index=index: tensor[index], samples.obs),
            action=samples.action[index],
            log_prob=samples.log_prob[index],
            action_mask=None if samples.action_mask is None else samples.action_mask[index],
            advantage=samples.advantage[index],
            value=samples.value[index],
            value_target=samples.value_target[index],
        )
