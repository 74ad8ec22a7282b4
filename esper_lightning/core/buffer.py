"""Storage of one rollout: allocated once, written in place. Axes: ``T`` step, ``B`` environment."""

import torch
from torch import Tensor

from esper_lightning.core.shapes import Shaped
from esper_lightning.core.spaces import Box, EnvSpaces, MultiDiscrete, mask_size
from esper_lightning.core.types import Observation, Rollout, StepResult

__all__ = ["allocate_rollout", "first_steps", "write_step"]


def allocate_rollout(
    spaces: EnvSpaces, steps: int, num_envs: int, *, device: torch.device
) -> Rollout:
    """A rollout of ``steps`` steps of ``num_envs`` environments, uninitialised."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(steps, num_envs, *shape, dtype=dtype, device=device)

    def empty_obs() -> Observation:
        if isinstance(spaces.obs, Box):
            return empty(*spaces.obs.shape)
        return {name: empty(*box.shape) for name, box in spaces.obs.items()}

    if isinstance(spaces.action, Box):
        action = empty(spaces.action.size)  # flat, as distributions have it
    elif isinstance(spaces.action, MultiDiscrete):
        action = empty(len(spaces.action.nvec), dtype=torch.int64)
    else:
        action = empty(dtype=torch.int64)
    return Rollout(
        obs=empty_obs(),
        reached_obs=empty_obs(),
        action=action,
        log_prob=empty(),
        action_mask=empty(mask_size(spaces.action), dtype=torch.bool) if spaces.masked else None,
        reward=empty(),
        terminated=empty(dtype=torch.bool),
        truncated=empty(dtype=torch.bool),
        episode_return=empty(),
        episode_length=empty(dtype=torch.int64),
    )


def first_steps(rollout: Rollout, steps: int) -> Rollout:
    """The first ``steps`` steps of a rollout; views of the same storage."""
    return Rollout(*(None if field is None else _head(field, steps) for field in rollout))  # pyright: ignore[reportArgumentType]


def write_step(
    rollout: Rollout,
    t: int,
    *,
    obs: Observation,
    action_mask: Shaped[Tensor, "B K"] | None,
    action: Shaped[Tensor, "B *A"],
    log_prob: Shaped[Tensor, " B"],
    result: StepResult,
) -> None:
    """Copy step ``t``: what was seen and done, and what came of it.

    Environments may then reuse their tensors.
    """
    _copy_obs(rollout.obs, t, obs)
    _copy_obs(rollout.reached_obs, t, result.reached_obs)
    rollout.action[t] = action
    rollout.log_prob[t] = log_prob
    if rollout.action_mask is not None:
        assert action_mask is not None
        rollout.action_mask[t] = action_mask
    rollout.reward[t] = result.reward
    rollout.terminated[t] = result.terminated
    rollout.truncated[t] = result.truncated
    rollout.episode_return[t] = result.episode_return
    rollout.episode_length[t] = result.episode_length


def _head(field: Observation, steps: int) -> Observation:
    if isinstance(field, Tensor):
        return field[:steps]
    return {name: value[:steps] for name, value in field.items()}


def _copy_obs(target: Observation, t: int, source: Observation) -> None:
    if isinstance(target, Tensor):
        assert isinstance(source, Tensor)
        target[t] = source
    else:
        assert isinstance(source, dict)
        for name, value in target.items():
            value[t] = source[name]
