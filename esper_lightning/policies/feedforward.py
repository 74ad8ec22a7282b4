"""Policies for vectors, without memory."""

from dataclasses import dataclass
from typing import Literal

import torch

from esper_lightning.core.errors import check_fields, require
from esper_lightning.core.spaces import Box, EnvSpaces
from esper_lightning.policies.actor_critic import build_actor_critic
from esper_lightning.policies.base import Policy, PolicySpec
from esper_lightning.policies.encoders import FlatEncoder
from esper_lightning.policies.layers import Activation, check_layers, check_std

__all__ = ["MLP"]


@dataclass(frozen=True, kw_only=True)
class MLP(PolicySpec):
    """Multi-layer perceptrons for actor and critic, without memory.

    Observations of any shape are flattened to vectors.

    Attributes:
        hidden_sizes: Width of each hidden layer.
        activation: Nonlinearity after each hidden layer.
        trunk: Whether actor and critic have hidden layers of their own (``separate``) or share them
            (``shared``).
        actor_obs: Names of the observation groups that the actor sees, in this order. ``None``
            means all groups, or the whole observation where there are no groups.
        critic_obs: Names of the observation groups that the critic sees, in this order. ``None``
            means all groups. With a shared trunk they must be those of the actor.
        action_bounds: Way to keep continuous actions within a bounded action space: ``clip`` cuts
            sampled actions at the bounds, ``tanh`` squashes the distribution into the bounds.
        initial_std: Standard deviation of continuous actions at the start, in units where the
            bounds are -1 and 1.
    """

    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: Activation = "tanh"
    trunk: Literal["separate", "shared"] = "separate"
    actor_obs: tuple[str, ...] | None = None
    critic_obs: tuple[str, ...] | None = None
    action_bounds: Literal["clip", "tanh"] = "clip"
    initial_std: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_layers("MLP", self.hidden_sizes)
        check_std("MLP", self.initial_std)
        for name in ("actor_obs", "critic_obs"):
            groups = getattr(self, name)
            require(
                groups != (), f"MLP.{name}", "name at least one group, or be None for all", groups
            )
        alike = self.trunk == "separate" or self.actor_obs == self.critic_obs
        require(alike, "MLP.critic_obs", "equal MLP.actor_obs for a shared trunk", self.critic_obs)

    def build(self, spaces: EnvSpaces, generator: torch.Generator) -> Policy:
        """Build the policy on the CPU; ``generator`` is the only source of randomness.

        Raises:
            ValueError: If no head fits the action space, or an observation group does not exist.
        """
        for field in ("actor_obs", "critic_obs"):
            for group in getattr(self, field) or ():
                known = () if isinstance(spaces.obs, Box) else tuple(spaces.obs)
                rule = f"name groups of the observation ({', '.join(known) or 'it has none'})"
                require(group in known, f"MLP.{field}", rule, group)
        actor = self._trunk(spaces, self.actor_obs, generator)
        separate = self.trunk == "separate"
        return build_actor_critic(
            actor,
            self._trunk(spaces, self.critic_obs, generator) if separate else actor,
            spaces.action,
            owner="MLP",
            action_bounds=self.action_bounds,
            initial_std=self.initial_std,
            generator=generator,
        )

    def _trunk(
        self, spaces: EnvSpaces, groups: tuple[str, ...] | None, generator: torch.Generator
    ) -> FlatEncoder:
        return FlatEncoder(
            spaces.obs, groups, self.hidden_sizes, activation=self.activation, generator=generator
        )
