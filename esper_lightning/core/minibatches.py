"""Minibatches: some rows of the samples. Axes: ``M`` sample, ``P`` chosen row or sequence."""

import torch
from torch import Tensor

from esper_lightning.core.shapes import Int
from esper_lightning.core.tensor_trees import map_obs, map_tree
from esper_lightning.core.types import Samples

__all__ = ["take"]


def take(samples: Samples, index: Int[Tensor, " P"]) -> Samples:
    """Copies of the chosen rows or, where there is memory, of the chosen whole sequences."""
    row, memory = index, samples.memory
    if memory is not None:
        steps = torch.arange(0, len(samples.log_prob), len(memory), device=index.device)
        row, memory = (steps[:, None] + index).flatten(), memory[index]  # [T, P] -> [T * P]

    def rows(tensor: Tensor) -> Tensor:
        return tensor[row]

    def rows_if_any(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else rows(tensor)

    return Samples(
        obs=map_obs(rows, samples.obs),
        action=rows(samples.action),
        log_prob=rows(samples.log_prob),
        action_mask=rows_if_any(samples.action_mask),
        advantage=rows(samples.advantage),
        value=rows(samples.value),
        value_target=rows(samples.value_target),
        actor_weight=rows_if_any(samples.actor_weight),
        memory=memory,
        begins=rows_if_any(samples.begins),
        kept=None if samples.kept is None else map_tree(rows, samples.kept),
    )
