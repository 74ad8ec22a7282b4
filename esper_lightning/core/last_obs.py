"""Rollouts of images, in which no image is stored twice.

Axes: ``T`` step, ``B`` environment, ``E`` row of ``LastObs``, ``N`` step of an environment.
"""

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool
from esper_lightning.core.spaces import Box, ObsSpace
from esper_lightning.core.tensor_trees import leaves, map_obs
from esper_lightning.core.types import LastObs, Observation, Rollout

__all__ = [
    "LastObsWriter",
    "allocate_last_obs",
    "has_images",
    "holds_images",
    "last_obs_rows",
    "with_reached_obs",
    "without_images",
]

_SHARE = 8  # of all steps, one in so many has room for the end of an episode


def has_images(space: ObsSpace) -> bool:
    """Whether a space has boxes of ``uint8``, so that rollouts use ``LastObs``."""
    boxes = [space] if isinstance(space, Box) else list(space.values())
    return any(box.dtype == "uint8" for box in boxes)


def holds_images(obs: Observation) -> bool:
    """Whether an observation has tensors of ``uint8``."""
    return any(leaf.dtype == torch.uint8 for leaf in leaves(obs))


def last_obs_rows(steps: int, num_envs: int) -> int:
    """``E``, the number of rows that a rollout begins with.

    There is a row of each environment for the last step, rows for episodes that end earlier, and
    one row that is written in place of nothing; ``E`` is a multiple of ``num_envs``.
    """
    return num_envs * (2 + -(-steps // _SHARE))


def allocate_last_obs(space: ObsSpace, rows: int, *, device: torch.device) -> LastObs:
    """``LastObs`` with room for ``rows`` observations, all of them zero."""

    def zeros(box: Box) -> Tensor:
        return torch.zeros(rows, *box.shape, dtype=getattr(torch, box.dtype), device=device)

    boxes = {} if isinstance(space, Box) else space
    obs = zeros(space) if isinstance(space, Box) else {n: zeros(box) for n, box in boxes.items()}
    return LastObs(obs, torch.zeros(rows, dtype=torch.int64, device=device))


class LastObsWriter:
    """Writes ``LastObs`` of one rollout, a few steps at a time and in their order.

    The storage grows where more episodes end than it has room for. Only where the storage may be
    too small does the host wait for the device.

    Args:
        rollout: Rollout to which the steps belong.

    Attributes:
        last_obs: What was written so far; other storage than that of the rollout, once it has
            grown.
    """

    def __init__(self, rollout: Rollout) -> None:
        assert rollout.last_obs is not None
        self.last_obs = rollout.last_obs
        self._steps, self._num_envs = rollout.reward.shape
        self.last_obs.sample.fill_(rollout.reward.numel())
        self._count = torch.zeros((), dtype=torch.int64, device=rollout.reward.device)
        self._at_most = 0  # upper bound of the count, known to the host

    def write(self, step: int, ended: Bool[Tensor, "S B"], reached: Observation) -> None:
        """Write what the next ``S`` steps reached, as far as ``Rollout.obs`` will not hold it.

        Args:
            step: Number of the first of these steps in the rollout.
            ended: Whether an episode ended in the step.
            reached: Observations ``[S, B, *O]`` that the steps reached.
        """
        device, num_envs, unused = ended.device, self._num_envs, self._steps * self._num_envs
        if step + len(ended) == self._steps:
            index = torch.arange(unused - num_envs, unused, device=device)
            self._put(torch.arange(num_envs, device=device), index, map_obs(_last_step, reached))
            ended = torch.cat([ended[:-1], torch.zeros_like(ended[-1:])])
        ended = ended.flatten()
        self._make_room(ended)
        slot = num_envs + self._count + ended.long().cumsum(0) - 1
        slot = torch.where(ended, slot, len(self.last_obs.sample) - 1)
        index = torch.arange(len(ended), device=device) + step * num_envs
        self._put(slot, torch.where(ended, index, unused), map_obs(_joined, reached))
        self._count += ended.sum()

    def _put(self, slot: Tensor, index: Tensor, obs: Observation) -> None:
        def put(storage: Tensor, rows: Tensor) -> Tensor:
            storage[slot] = rows
            return storage

        map_obs(put, self.last_obs.obs, obs)
        self.last_obs.sample[slot] = index

    def _make_room(self, ended: Bool[Tensor, " N"]) -> None:
        rows = len(self.last_obs.sample)
        room = rows - self._num_envs - 1
        self._at_most += len(ended)
        if self._at_most <= room:
            return
        self._at_most = int(self._count + ended.sum())
        if self._at_most <= room:
            return
        more = max(rows, -(-(self._at_most - room) // self._num_envs) * self._num_envs)

        def grown(storage: Tensor) -> Tensor:
            return torch.cat([storage, storage.new_zeros(more, *storage.shape[1:])])

        index = self.last_obs.sample
        unused = index.new_full((more,), self._steps * self._num_envs)
        self.last_obs = LastObs(map_obs(grown, self.last_obs.obs), torch.cat([index, unused]))


def with_reached_obs(rollout: Rollout) -> Rollout:
    """The rollout with ``reached_obs`` of every step, which takes as much memory as ``obs``."""
    if rollout.last_obs is None:
        return rollout
    index = rollout.last_obs.sample

    def reached(obs: Tensor, last: Tensor) -> Tensor:
        following = torch.cat([obs[1:], obs[-1:], obs[-1:]])  # and one step for unused rows
        following.flatten(0, 1)[index] = last
        return following[:-1]

    return rollout._replace(
        reached_obs=map_obs(reached, rollout.obs, rollout.last_obs.obs), last_obs=None
    )


def without_images(rollout: Rollout) -> Rollout:
    """The rollout without the groups of its observations that are images."""
    if rollout.last_obs is None:
        return rollout
    last = rollout.last_obs
    return rollout._replace(obs=_floats(rollout.obs), last_obs=last._replace(obs=_floats(last.obs)))


def _floats(obs: Observation) -> Observation:
    if isinstance(obs, Tensor):
        return {}
    return {name: group for name, group in obs.items() if group.dtype != torch.uint8}


def _last_step(reached: Tensor) -> Tensor:
    return reached[-1]


def _joined(reached: Tensor) -> Tensor:
    return reached.flatten(0, 1)  # [S, B, *O] -> [S * B, *O]
