"""Storage of one rollout: allocated once, written in place. Axes: ``T`` step, ``B`` environment."""

import os
from typing import cast

import torch
from torch import Tensor

from esper_lightning.core.last_obs import allocate_last_obs, has_images, last_obs_rows
from esper_lightning.core.spaces import (
    Box,
    EnvSpaces,
    FactoredDiscrete,
    MultiDiscrete,
    ObsSpace,
    mask_size,
)
from esper_lightning.core.tensor_trees import leaves
from esper_lightning.core.types import Observation, Rollout

__all__ = [
    "allocate_rollout",
    "first_steps",
    "memory_bytes",
    "rollout_bytes",
    "stored_obs",
    "write_step",
]


def allocate_rollout(
    spaces: EnvSpaces, steps: int, num_envs: int, *, device: torch.device
) -> Rollout:
    """A rollout of ``steps`` steps of ``num_envs`` environments, uninitialised.

    Where observations have images, the rollout has ``last_obs`` in place of ``reached_obs``.
    """
    images = has_images(spaces.obs)
    rows = last_obs_rows(steps, num_envs)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(steps, num_envs, *shape, dtype=dtype, device=device)

    def empty_obs() -> Observation:
        if isinstance(spaces.obs, Box):
            return empty(*spaces.obs.shape, dtype=getattr(torch, spaces.obs.dtype))
        boxes = spaces.obs.items()
        return {name: empty(*box.shape, dtype=getattr(torch, box.dtype)) for name, box in boxes}

    if isinstance(spaces.action, Box):
        action = empty(spaces.action.size)  # flat, as distributions expect it
    elif isinstance(spaces.action, MultiDiscrete | FactoredDiscrete):
        action = empty(len(spaces.action.nvec), dtype=torch.int64)
    else:
        action = empty(dtype=torch.int64)
    return Rollout(
        obs=empty_obs(),
        reached_obs={} if images else empty_obs(),
        action=action,
        log_prob=empty(),
        action_mask=empty(mask_size(spaces.action), dtype=torch.bool) if spaces.masked else None,
        reward=empty(),
        terminated=empty(dtype=torch.bool),
        truncated=empty(dtype=torch.bool),
        episode_return=empty(),
        episode_length=empty(dtype=torch.int64),
        last_obs=allocate_last_obs(spaces.obs, rows, device=device) if images else None,
    )


def stored_obs(space: ObsSpace, obs: Observation) -> Observation:
    """Observations in the dtype in which rollouts store them."""
    if isinstance(space, Box):
        assert isinstance(obs, Tensor)
        return obs.to(getattr(torch, space.dtype))
    assert isinstance(obs, dict)
    return {name: obs[name].to(getattr(torch, box.dtype)) for name, box in space.items()}


def rollout_bytes(spaces: EnvSpaces, steps: int, num_envs: int) -> int:
    """Bytes that a rollout of this size takes; nothing is allocated."""
    one = allocate_rollout(spaces, 1, 1, device=torch.device("meta"))
    taken = steps * num_envs * sum(leaf.nbytes for leaf in leaves(one._replace(last_obs=None)))
    if one.last_obs is not None:
        last = sum(leaf.nbytes for leaf in leaves(one.last_obs)) // last_obs_rows(1, 1)
        taken += last * last_obs_rows(steps, num_envs)
    return taken


def memory_bytes(device: torch.device) -> int:
    """Memory that a device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def first_steps(rollout: Rollout, steps: int) -> Rollout:
    """The first ``steps`` steps of a rollout; views of the same storage."""
    fields = rollout._replace(last_obs=None)  # is storage for any number of steps
    head = Rollout(*(None if field is None else _head(field, steps) for field in fields))  # pyright: ignore[reportArgumentType]
    return head._replace(last_obs=rollout.last_obs)


def write_step(rollout: Rollout, t: int | slice, row: Rollout) -> None:
    """Copy ``row`` into step ``t`` of a rollout, except for what ``LastObsWriter`` writes.

    After the copy, environments may reuse their tensors.

    Args:
        rollout: Storage of the rollout.
        t: Number of the step, or a slice of several steps.
        row: Step without axis ``T``, or several steps ``[S, B, ...]``.
    """
    for storage, value in zip(rollout, row, strict=True):
        if isinstance(storage, dict):
            for name, group in storage.items():
                group[t] = cast(dict[str, Tensor], value)[name]
        elif isinstance(storage, Tensor):
            storage[t] = cast(Tensor, value)


def _head(field: Observation, steps: int) -> Observation:
    if isinstance(field, Tensor):
        return field[:steps]
    return {name: value[:steps] for name, value in field.items()}
