"""Actor and critic, composed of encoders and heads. Axes: ``M`` sample, ``H`` feature."""

from typing import Literal

import torch
from torch import Tensor, nn

from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.spaces import ActionSpace
from esper_lightning.core.types import Observation
from esper_lightning.policies.base import Evaluation, Policy, SampledAction
from esper_lightning.policies.encoders import Encoder
from esper_lightning.policies.heads import ActionHead, action_head
from esper_lightning.policies.layers import orthogonal_linear

__all__ = ["ActorCritic", "build_actor_critic"]


class ActorCritic(Policy):
    """A policy without memory: two encoders, and a head behind each.

    Args:
        actor: Encoder whose features the action head sees.
        critic: Encoder whose features the value head sees; may be the same module.
        action_head: Module from features to a distribution over actions.
        value_head: Module from features to values ``[M, 1]``.
    """

    def __init__(
        self,
        actor: nn.Module,
        critic: nn.Module,
        action_head: ActionHead,
        value_head: nn.Module,
    ) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic
        self.action_head, self.value_head = action_head, value_head

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "... N"]:
        """Random numbers for ``act``: ``[*shape, N]``, on the device of the generator."""
        return self.action_head.noise(shape, generator)

    def act(
        self, obs: Observation, mask: Bool[Tensor, "M K"] | None, noise: Float[Tensor, "M N"]
    ) -> SampledAction:
        """Sample an action for each row; ``noise`` is the only source of randomness."""
        distribution = self.action_head(self.actor(obs), mask)
        action = distribution.sample(noise)
        return SampledAction(action, distribution.log_prob(action))

    def act_deterministically(
        self, obs: Observation, mask: Bool[Tensor, "M K"] | None
    ) -> Shaped[Tensor, "M *A"]:
        """The most probable action of each row."""
        return self.action_head(self.actor(obs), mask).mode()

    def evaluate(
        self, obs: Observation, action: Shaped[Tensor, "M *A"], mask: Bool[Tensor, "M K"] | None
    ) -> Evaluation:
        """Log-probability of given actions, entropy and value of each row, with gradients."""
        features = self.actor(obs)
        seen_by_critic = features if self.critic is self.actor else self.critic(obs)
        distribution = self.action_head(features, mask)
        return Evaluation(
            log_prob=distribution.log_prob(action),
            entropy=distribution.entropy(),
            value=self.value_head(seen_by_critic)[:, 0].float(),
        )

    def value(self, obs: Observation) -> Float[Tensor, " M"]:
        """Value of each row."""
        return self.value_head(self.critic(obs))[:, 0].float()

    def to_env(self, action: Shaped[Tensor, "M *A"]) -> Shaped[Tensor, "M ..."]:
        """Sampled actions in the environment's units and range."""
        return self.action_head.to_env(action)


def build_actor_critic(
    actor: Encoder,
    critic: Encoder,
    space: ActionSpace,
    *,
    owner: str,
    action_bounds: Literal["clip", "tanh"],
    initial_std: float,
    generator: torch.Generator,
) -> ActorCritic:
    """An actor-critic of given encoders, with the heads that fit an action space.

    Args:
        actor: Encoder of the actor.
        critic: Encoder of the critic; may be the same module.
        space: Action space of the environment.
        owner: Name of the spec, for errors.
        action_bounds: Way to keep a Gaussian within a bounded space: ``clip`` or ``tanh``.
        initial_std: Standard deviation of a Gaussian at the start, in units where the bounds are -1
            and 1.
        generator: Source of the initial weights.

    Raises:
        ValueError: If no head fits the space.
    """
    head = action_head(
        actor.features,
        space,
        owner=owner,
        bounds=action_bounds,
        initial_std=initial_std,
        generator=generator,
    )
    value_head = orthogonal_linear(critic.features, 1, gain=1.0, generator=generator)
    return ActorCritic(actor, critic, head, value_head)
