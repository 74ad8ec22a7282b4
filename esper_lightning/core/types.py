"""The records that an iteration passes on: step results, rollouts, advantages, loss terms.

Axes: ``T`` rollout step, ``B`` environment, ``M`` sample of a minibatch, ``*O`` observation, ``*A``
action. This file computes nothing; every field is a tensor on the device of the run, or a tree of
tensors.
"""

from typing import Any, NamedTuple

from torch import Tensor

from esper_lightning.core.shapes import Bool, Float, Int, Shaped

__all__ = [
    "Advantages",
    "LastObs",
    "LossTerms",
    "Observation",
    "Rollout",
    "Samples",
    "StepResult",
]

Observation = Tensor | dict[str, Tensor]
"""One tensor, or named groups of tensors from which actor and critic pick what they see."""


class StepResult(NamedTuple):
    """The result of one step of ``B`` environments.

    Every field is on the environments' device, at every step.

    An environment whose episode ended has already been reset: ``obs`` starts the next episode, and
    ``reached_obs`` is the observation that the last action led to.
    """

    obs: Observation  # [B, *O] to act on next
    reward: Float[Tensor, " B"]
    terminated: Bool[Tensor, " B"]  # the task ended: no value beyond
    truncated: Bool[
        Tensor, " B"
    ]  # the episode was cut: value beyond; never together with terminated
    reached_obs: Observation  # [B, *O], equal to obs where no episode ended
    action_mask: Bool[Tensor, "B K"] | None  # of obs; True = allowed; never all False
    episode_return: Float[Tensor, " B"]  # NaN where no episode ended
    episode_length: Int[Tensor, " B"]  # 0 where no episode ended


class LastObs(NamedTuple):
    """Observations reached by the last step of an episode, or by the last step of a rollout.

    The observation that any other step reached is the one on which the next step acted.
    """

    obs: Observation  # [E, *O]
    sample: Int[Tensor, " E"]  # t * B + b of the step; T * B where the row is not used


class Rollout(NamedTuple):
    """``T`` steps of ``B`` environments, written in place.

    Where observations are images, ``reached_obs`` is empty, and ``last_obs`` holds what ``obs``
    does not hold: a second copy of each image would double the memory.
    """

    obs: Observation  # [T, B, *O] on which the policy acted
    reached_obs: Observation  # [T, B, *O] to which the action led; {} where there is last_obs
    action: Shaped[
        Tensor, "T B *A"
    ]  # as the distribution sampled it, which the environment may have got in another form
    log_prob: Float[Tensor, "T B"]
    action_mask: Bool[Tensor, "T B K"] | None
    reward: Float[Tensor, "T B"]
    terminated: Bool[Tensor, "T B"]
    truncated: Bool[Tensor, "T B"]
    episode_return: Float[Tensor, "T B"]  # NaN where no episode ended
    episode_length: Int[Tensor, "T B"]
    last_obs: LastObs | None = None


class Advantages(NamedTuple):
    """Results of generalised advantage estimation."""

    advantage: Float[Tensor, "T B"]
    value_target: Float[Tensor, "T B"]


class Samples(NamedTuple):
    """Samples that the update learns from: the steps of a rollout, or of a minibatch of it.

    ``M`` is ``T * B``, or the size of a minibatch. With memory the rows are ``T`` steps of ``b``
    whole sequences: the first step of all sequences, then the second step of all, and so on.
    """

    obs: Observation  # [M, *O], normalised; images as the environment gave them
    action: Shaped[Tensor, "M *A"]
    log_prob: Float[Tensor, " M"]
    action_mask: Bool[Tensor, "M K"] | None
    advantage: Float[Tensor, " M"]
    value: Float[Tensor, " M"]  # of the critic that was current when acting
    value_target: Float[Tensor, " M"]
    # Weight of a step in the actor's loss: 0 where there was no choice, with a mean of 1 over the
    # rollouts of all ranks. ``None`` means 1 for every step.
    actor_weight: Float[Tensor, " M"] | None = None
    # For a policy with memory:
    memory: Float[Tensor, "b S"] | None = None  # before the first step
    begins: Bool[Tensor, " M"] | None = None  # the first step of an episode
    # For extensions of PPO: what each of them keeps of the steps, as trees of tensors [M, ...].
    kept: tuple[Any, ...] | None = None

    @property
    def units(self) -> int:
        """Number of units that are shuffled into minibatches.

        A unit is one step of one environment; for a policy with memory it is the whole sequence of
        steps of one environment, because a sequence cannot be cut.
        """
        return len(self.log_prob if self.memory is None else self.memory)


class LossTerms(NamedTuple):
    """Per-sample terms of the PPO objective, which the caller reduces once and minimises."""

    policy: Float[Tensor, " M"]
    value: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]  # the entropy itself, which the caller subtracts
