"""Between rollout and update: values, advantages and value targets of every step.

Axes: ``T`` step, ``B`` environment, ``N = T * B`` step of an environment, ``S`` number in a memory.
This file knows nothing of Lightning.
"""

import torch
from torch import Tensor

from esper_lightning.compiling.loops import CompileMode, compile_function, compile_map
from esper_lightning.core.diagnostics import explained_variance
from esper_lightning.core.gae import compute_gae, discounted_returns
from esper_lightning.core.losses import normalize_advantage
from esper_lightning.core.ranks import SINGLE_RANK, Ranks
from esper_lightning.core.running_stats import Moments
from esper_lightning.core.shapes import Bool, Float
from esper_lightning.core.tensor_trees import leaves, map_obs, map_tree
from esper_lightning.core.types import LastObs, Observation, Rollout, Samples
from esper_lightning.ppo.agent import Agent, Values, Weights
from esper_lightning.ppo.config import PPOConfig

__all__ = ["Critic", "prepare_samples", "scale_reward"]

_PIECE_BYTES = {"cpu": 2**24, "cuda": 2**28}  # of images in float32 that are valued at once


class Critic:
    """Values of a rollout under the weights that acted, in one pass over all states.

    Args:
        agent: Agent whose critic computes the values.
        mode: Compile mode of the pass over the states.
        device: Device of agent and rollouts.
    """

    def __init__(self, agent: Agent, *, mode: CompileMode, device: torch.device) -> None:
        self._agent, self._device = agent, device
        self._rows = compile_map("values", self._value_rows, mode=mode, device=device)
        self._sequences = compile_function("values", self._value_all, mode=mode, device=device)
        self._steps = compile_function("values", self._value_steps, mode=mode, device=device)
        self._last = compile_function("last values", self._value_last, mode=mode, device=device)

    def values(
        self, weights: Weights, rollout: Rollout, memory: Float[Tensor, "B S"] | None = None
    ) -> Values:
        """Value the state that each step acted on, and the state that it reached.

        Args:
            weights: Weights that acted in the rollout.
            rollout: Steps to value.
            memory: Memory of the policy before the first step; ``None`` without memory.
        """
        if rollout.last_obs is not None:
            return self._values_of_images(weights, rollout, rollout.last_obs, memory)
        ends = map_tree(_joined, (rollout.obs, rollout.reached_obs))
        with torch.no_grad():
            if memory is None:
                return self._rows(ends, weights)
            begins = _beginnings(rollout).flatten()
            return self._sequences(ends, weights, memory, begins)

    def _value_rows(self, ends: tuple[Observation, Observation], weights: Weights) -> Values:
        return self._value_all(ends, weights, None, None)

    def _value_all(
        self,
        ends: tuple[Observation, Observation],
        weights: Weights,
        memory: Tensor | None,
        begins: Tensor | None,
    ) -> Values:
        agent = self._agent
        return agent.with_weights(weights, agent.value, *ends, memory, begins)

    @torch.no_grad()
    def _values_of_images(
        self, weights: Weights, rollout: Rollout, last: LastObs, memory: Float[Tensor, "B S"] | None
    ) -> Values:
        """Value a rollout of images in pieces, since the whole rollout in float32 is too large.

        The value of what a step reached is that of what the next step acted on, or that of
        ``last``. With memory a piece is whole sequences, and otherwise it is steps.
        """
        steps, num_envs = rollout.reward.shape
        number, begins = steps * num_envs, None if memory is None else _beginnings(rollout)
        float_bytes = sum(4 * group[0].numel() for group in leaves(last.obs))
        most = max(1, _PIECE_BYTES.get(self._device.type, 2**24) // float_bytes)
        values: list[Tensor] = []
        memories: list[Tensor] = []
        if memory is None:
            flat = map_obs(_joined, rollout.obs)
            for rows in _slices(number, most):
                piece = map_tree(lambda group, rows=rows: group[rows], flat)
                values.append(self._steps(piece, None, None, weights)[0].clone())
            value = torch.cat(values)
        else:
            for envs in _slices(num_envs, max(1, most // steps)):
                xs = map_tree(lambda rows, envs=envs: _joined(rows[:, envs]), (rollout.obs, begins))
                one, after = self._steps(xs[0], memory[envs], xs[1], weights)
                values.append(one.view(steps, -1).clone())
                memories.append(after.view(steps, -1, after.shape[1]).clone())
            value = torch.cat(values, 1).flatten()
        after = torch.cat(memories, 1).flatten(0, 1) if memories else None
        of_last: list[Tensor] = []
        for rows in _slices(len(last.sample), most):
            piece = map_tree(lambda group, rows=rows: group[rows], last.obs)
            kept = None if after is None else after[last.sample[rows].clamp(max=number - 1)]
            of_last.append(self._last(piece, kept, weights).clone())
        # One more step than there are, because unused rows of ``last`` have that step's index.
        following = torch.cat([value[num_envs:], value.new_zeros(num_envs + 1)])
        following[last.sample] = torch.cat(of_last)
        return Values(map_obs(_joined, rollout.obs), value, following[:number])

    def _value_steps(
        self, obs: Observation, memory: Tensor | None, begins: Tensor | None, weights: Weights
    ) -> tuple[Tensor, Tensor | None]:
        agent = self._agent
        return agent.with_weights(weights, agent.value_steps, obs, memory, begins)

    def _value_last(self, reached: Observation, memory: Tensor | None, weights: Weights) -> Tensor:
        agent = self._agent
        return agent.with_weights(weights, agent.value_reached, reached, memory)


def _slices(rows: int, most: int) -> list[slice]:
    """Slices of at most ``most`` rows, equal where possible, because others are not compiled."""
    count = -(-rows // most)
    size = -(-rows // count)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _joined(rows: Tensor) -> Tensor:
    return rows.flatten(0, 1)  # [T, B, ...] -> [T * B, ...]


def _beginnings(rollout: Rollout) -> Bool[Tensor, "T B"]:
    """Whether a step is the first of an episode that begins within the rollout.

    The first step of the rollout never counts: an episode that begins there has blank memory
    anyway.
    """
    ended = rollout.terminated | rollout.truncated
    return torch.cat([torch.zeros_like(ended[:1]), ended[:-1]])


def scale_reward(
    rollout: Rollout,
    discounted_return: Float[Tensor, " B"],
    moments: Moments | None,
    config: PPOConfig,
    *,
    healthy: Bool[Tensor, ""],
    ranks: Ranks = SINGLE_RANK,
) -> tuple[Float[Tensor, "T B"], Float[Tensor, " B"], Moments | None]:
    """Rewards divided by the deviation of all discounted returns so far.

    The whole rollout gets one scale, and the returns of the rollout itself count in that scale.

    Args:
        rollout: The rollout whose rewards are scaled.
        discounted_return: Discounted returns of the running episodes before the rollout.
        moments: Moments of all earlier discounted returns; ``None`` leaves rewards as they are.
        config: PPO settings: ``discount`` and ``reward_clip`` are used.
        healthy: Whether the rollout is sound on every rank; if not, the moments stay as they are.
        ranks: All ranks of the run, whose returns count as well.

    Returns:
        The scaled rewards, the discounted returns after the rollout, and the updated moments.
    """
    if moments is None:
        return rollout.reward, discounted_return, None
    ended = rollout.terminated | rollout.truncated
    returns, carried = discounted_returns(
        rollout.reward, ended, discounted_return, discount=config.discount
    )
    moments = moments.merged(*ranks.gather(Moments.of(returns)), where=healthy)
    return moments.scale(rollout.reward, clip=config.reward_clip), carried, moments


def prepare_samples(
    values: Values,
    rollout: Rollout,
    reward: Float[Tensor, "T B"],
    config: PPOConfig,
    ranks: Ranks = SINGLE_RANK,
    *,
    memory: Float[Tensor, "B S"] | None = None,
    choice: Bool[Tensor, " N"] | None = None,
) -> tuple[Samples, Float[Tensor, ""]]:
    """Samples with advantages and value targets, made of a rollout.

    Args:
        values: Values of the rollout's states, from ``Critic.values``.
        rollout: The rollout to learn from.
        reward: Rewards of the rollout, from ``scale_reward``.
        config: PPO settings: ``discount``, ``gae_lambda`` and ``normalize_advantage`` are used.
        ranks: All ranks of the run, over whose samples advantages are normalised.
        memory: Memory of the policy before the first step; ``None`` without memory.
        choice: Whether a step had more than one action to choose from. Steps without a choice teach
            the critic alone. ``None`` means that every step had a choice.

    Returns:
        The samples, and the share of the variance of all ranks' value targets that the critic
        explains.
    """
    advantages = compute_gae(
        reward,
        values.value.view_as(reward),
        values.next_value.view_as(reward),
        rollout.terminated,
        rollout.truncated,
        discount=config.discount,
        lambda_=config.gae_lambda,
    )
    advantage = advantages.advantage.flatten()
    target = advantages.value_target.flatten()
    mine = (
        Moments.of(advantage, where=choice),
        *(Moments.of(each) for each in (target, target - values.value)),
    )
    spread, of_target, of_error = (
        first.merged(*others) for first, *others in zip(*ranks.gather(mine), strict=True)
    )
    weight = None
    if choice is not None:
        share = (spread.number / of_target.number).to(advantage.dtype)
        weight = torch.where(choice, 1.0 / share, 0.0)
    samples = Samples(
        obs=values.obs,
        action=rollout.action.flatten(0, 1),
        log_prob=rollout.log_prob.flatten(),
        action_mask=None if rollout.action_mask is None else rollout.action_mask.flatten(0, 1),
        advantage=normalize_advantage(advantage, spread)
        if config.normalize_advantage
        else advantage,
        value=values.value,
        value_target=target,
        actor_weight=weight,
        memory=memory,
        begins=None if memory is None else _beginnings(rollout).flatten(),
    )
    return samples, explained_variance(of_target, of_error)
