"""The rollout: act, step, write, ``T`` times. Axes: ``T`` step, ``B`` environment.

No gradient, no host synchronisation, no allocation of the rollout; it knows nothing of Lightning.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.core.buffer import write_step
from esper_lightning.core.gae import discounted_returns
from esper_lightning.core.running_stats import RunningStats
from esper_lightning.core.shapes import Bool, Float
from esper_lightning.core.types import Observation, Rollout, map_obs
from esper_lightning.envs.base import BatchedEnv
from esper_lightning.policies.base import Policy
from esper_lightning.training.config import PPOConfig

__all__ = [
    "ActingState",
    "Fault",
    "Normalize",
    "collect",
    "first_non_finite",
    "is_finite",
    "scale_reward",
]

Normalize = Callable[[Observation], Observation]


class ActingState(NamedTuple):
    """Where acting goes on.

    Between two rollouts nothing else of an episode is kept outside the environment.
    """

    obs: Observation  # [B, *O]
    action_mask: Bool[Tensor, "B K"] | None
    discounted_return: Float[Tensor, " B"]  # of the running episodes so far, for reward scaling

    def to(self, device: torch.device) -> "ActingState":
        """The same on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        mask = None if self.action_mask is None else move(self.action_mask)
        return ActingState(map_obs(move, self.obs), mask, move(self.discounted_return))


@torch.no_grad()
def collect(
    env: BatchedEnv,
    policy: Policy,
    normalize: Normalize,
    state: ActingState,
    rollout: Rollout,
    *,
    generator: torch.Generator,
) -> ActingState:
    """Fill ``rollout`` by acting in ``env``.

    Args:
        env: ``B`` environments.
        policy: Acts on normalised observations.
        normalize: Applied to what the policy sees; the rollout keeps observations as they are.
        state: Where the previous rollout ended.
        rollout: ``T`` steps to overwrite.
        generator: Source of exploration noise, on the device.

    Returns:
        Where the next rollout begins.
    """
    obs, action_mask = state.obs, state.action_mask
    for t in range(rollout.reward.shape[0]):
        action, log_prob = policy.act(normalize(obs), action_mask, generator)
        result = env.step(policy.to_env(action))
        write_step(
            rollout,
            t,
            obs=obs,
            action_mask=action_mask,
            action=action,
            log_prob=log_prob,
            result=result,
        )
        obs, action_mask = result.obs, result.action_mask
    return ActingState(obs, action_mask, state.discounted_return)


@torch.no_grad()
def scale_reward(
    rollout: Rollout,
    state: ActingState,
    stats: RunningStats | None,
    config: PPOConfig,
    *,
    healthy: Bool[Tensor, ""],
) -> tuple[Float[Tensor, "T B"], ActingState]:
    """Rewards as the learner sees them: one scale for a whole rollout, which it helps to set.

    Args:
        rollout: What was collected.
        state: Where acting goes on; carries the discounted returns of running episodes.
        stats: Of discounted returns, updated in place; ``None`` leaves rewards as they are.
        config: Discount and limit.
        healthy: Where False, the statistics stay as they are.

    Returns:
        The rewards, and the state to go on from.
    """
    if stats is None:
        return rollout.reward, state
    ended = rollout.terminated | rollout.truncated
    returns, carried = discounted_returns(
        rollout.reward, ended, state.discounted_return, discount=config.discount
    )
    stats.update(returns, where=healthy)
    return stats.scale(rollout.reward, clip=config.reward_clip), state._replace(
        discounted_return=carried
    )


def is_finite(rollout: Rollout) -> Bool[Tensor, ""]:
    """Whether every number of the rollout is finite; stays on the device."""
    return torch.stack([value.isfinite().all() for _, value in _watched(rollout)]).all()


class Fault(NamedTuple):
    """The first value of a rollout that is not finite."""

    owner: str  # "policy" or "environment"
    text: str
    name: str  # of the field
    environments: list[int]
    step: int


def first_non_finite(rollout: Rollout) -> Fault:
    """Say what was not finite first: whose it is, and field, step, environments, columns.

    Within a step an observation comes before the policy's answer to it, and that before what the
    environment makes of it. Synchronises.

    """
    faults = [(_first_step(value), name, value) for name, value in _watched(rollout)]
    step, name, value = min((fault for fault in faults if fault[0] >= 0), key=lambda f: f[0])
    bad = ~value[step].isfinite()
    where = bad.flatten(1) if bad.dim() > 1 else bad[:, None]
    envs = cast(list[int], where.any(1).nonzero()[:, 0].tolist())
    columns = cast(list[int], where.any(0).nonzero()[:, 0].tolist())
    of = "" if bad.dim() == 1 else f", column {_some(columns)}"
    found = f"{value[step][bad][0].item()} in {name} of environment {_some(envs)}{of}"
    owner = "policy" if name == "log_prob" else "environment"
    return Fault(owner, f"{found} at rollout step {step}", name, envs, step)


def _first_step(value: Tensor) -> int:
    """First step of ``[T, ...]`` at which not everything is finite; -1 if there is none."""
    bad = (~value.isfinite()).flatten(1).any(1).nonzero()
    return int(bad[0]) if bad.numel() else -1


def _watched(rollout: Rollout) -> list[tuple[str, Tensor]]:
    """In the order in which they come about within a step."""
    return [
        *_groups("obs", rollout.obs),
        ("log_prob", rollout.log_prob),
        ("reward", rollout.reward),
        *_groups("reached_obs", rollout.reached_obs),
    ]


def _groups(name: str, obs: Observation) -> list[tuple[str, Tensor]]:
    if isinstance(obs, Tensor):
        return [(name, obs)]
    return [(f"{name}[{group!r}]", value) for group, value in obs.items()]


def _some(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:8])) + (
        f" and {len(indices) - 8} more" if len(indices) > 8 else ""
    )
