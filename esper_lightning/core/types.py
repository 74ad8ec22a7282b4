"""The records that travel through an iteration: step results, rollouts, advantages, loss terms.

Axes: ``T`` rollout step, ``B`` environment, ``M`` sample of a minibatch, ``*O`` observation, ``*A``
action. Nothing here computes; every field is a tensor on the device of the run.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

from torch import Tensor

from esper_lightning.core.shapes import Bool, Float, Int, Shaped

__all__ = ["Advantages", "LossTerms", "Observation", "Rollout", "Samples", "StepResult", "map_obs"]

Observation = Tensor | dict[str, Tensor]
"""One tensor, or named groups of tensors from which actor and critic pick what they see."""


class StepResult(NamedTuple):
    """What one step of ``B`` environments returns.

    Every field on the environments' device, at every step.

    An environment whose episode ended has already been reset: ``obs`` starts its next episode,
    ``reached_obs`` is what the last action led to.
    """

    obs: Observation  # [B, *O] to act on next
    reward: Float[Tensor, " B"]
    terminated: Bool[Tensor, " B"]  # the task ended: no value beyond
    truncated: Bool[
        Tensor, " B"
    ]  # we stopped watching: value beyond; never together with terminated
    reached_obs: Observation  # [B, *O], equal to obs where no episode ended
    action_mask: Bool[Tensor, "B K"] | None  # of obs; True = allowed; never all False
    episode_return: Float[Tensor, " B"]  # NaN where no episode ended
    episode_length: Int[Tensor, " B"]  # 0 where no episode ended


class Rollout(NamedTuple):
    """``T`` steps of ``B`` environments, written in place."""

    obs: Observation  # [T, B, *O] what the policy acted on
    reached_obs: Observation  # [T, B, *O] what the action led to
    action: Shaped[
        Tensor, "T B *A"
    ]  # what the distribution sampled, not what the environment was given
    log_prob: Float[Tensor, "T B"]
    action_mask: Bool[Tensor, "T B K"] | None
    reward: Float[Tensor, "T B"]
    terminated: Bool[Tensor, "T B"]
    truncated: Bool[Tensor, "T B"]
    episode_return: Float[Tensor, "T B"]  # NaN where no episode ended
    episode_length: Int[Tensor, "T B"]


class Advantages(NamedTuple):
    """The result of generalised advantage estimation."""

    advantage: Float[Tensor, "T B"]
    value_target: Float[Tensor, "T B"]


class Samples(NamedTuple):
    """What the update learns from: a rollout's steps, and what is left of their order.

    ``M`` is ``T * B`` or a minibatch of it. With memory the rows are ``T`` steps of ``b`` whole
    sequences, one step of all after another.
    """

    obs: Observation  # [M, *O], normalised
    action: Shaped[Tensor, "M *A"]
    log_prob: Float[Tensor, " M"]
    action_mask: Bool[Tensor, "M K"] | None
    advantage: Float[Tensor, " M"]
    value: Float[Tensor, " M"]  # when acting
    value_target: Float[Tensor, " M"]
    # Of a step in the actor's loss: 0 where there was no choice, with a mean of 1 over the rollouts
    # of all ranks. ``None`` for 1.
    actor_weight: Float[Tensor, " M"] | None = None
    # Of a policy with memory:
    memory: Float[Tensor, "b S"] | None = None  # before the first step
    begins: Bool[Tensor, " M"] | None = None  # the first step of an episode

    @property
    def parts(self) -> int:
        """Into how many pieces it can be cut: steps, or whole sequences."""
        return len(self.log_prob if self.memory is None else self.memory)


class LossTerms(NamedTuple):
    """Per-sample terms of the PPO objective, all to be minimised; reduced once, by the caller."""

    policy: Float[Tensor, " M"]
    value: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]  # the entropy itself: the caller subtracts it


def map_obs(function: Callable[..., Tensor], obs: Observation, *others: Observation) -> Observation:
    """Apply ``function`` to an observation, or to every group with the same group of ``others``."""
    if isinstance(obs, Tensor):
        return function(obs, *others)
    groups = cast(tuple[dict[str, Tensor], ...], others)
    return {
        name: function(value, *(other[name] for other in groups)) for name, value in obs.items()
    }
