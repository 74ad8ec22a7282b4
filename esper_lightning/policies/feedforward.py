"""Policies without memory.

Axes: ``M`` sample, ``*O`` observation, ``H`` feature, ``A`` action component.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from esper_lightning.core.errors import check_fields, require
from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.spaces import Box, EnvSpaces, ObsSpace
from esper_lightning.core.types import Observation
from esper_lightning.policies.base import Evaluation, Policy, PolicySpec, SampledAction
from esper_lightning.policies.heads import action_head
from esper_lightning.policies.layers import Activation, mlp, orthogonal_linear

__all__ = ["MLP", "FeedForwardPolicy", "check_layers", "check_widest", "flat_obs", "obs_size"]

_WIDEST = 65_536


@dataclass(frozen=True, kw_only=True)
class MLP(PolicySpec):
    """A multi-layer perceptron for actor and critic.

    Attributes:
        hidden_sizes: Width of each hidden layer.
        activation: Nonlinearity after each hidden layer.
        trunk: Whether actor and critic have hidden layers of their own or share them.
        actor_obs: Groups of a grouped observation that the actor sees, in this order; ``None`` for
            all.
        critic_obs: Groups that the critic sees; ``None`` for all.
        action_bounds: Whether a Gaussian is cut at the bounds of the action space or squashed into
            them.
        initial_std: Standard deviation of a Gaussian at the start, in units where the bounds are -1
            and 1.
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
        check_layers("MLP", self.hidden_sizes, self.initial_std)
        for name in ("actor_obs", "critic_obs"):
            groups = getattr(self, name)
            require(
                groups != (), f"MLP.{name}", "name at least one group, or be None for all", groups
            )
        alike = self.trunk == "separate" or self.actor_obs == self.critic_obs
        require(alike, "MLP.critic_obs", "equal MLP.actor_obs for a shared trunk", self.critic_obs)

    def build(self, spaces: EnvSpaces, generator: torch.Generator) -> Policy:
        """Allocate and initialise on the CPU, drawing from ``generator`` only.

        Raises:
            ValueError: If the action space has no head, or an observation group does not exist.
        """
        for field in ("actor_obs", "critic_obs"):
            for group in getattr(self, field) or ():
                known = () if isinstance(spaces.obs, Box) else tuple(spaces.obs)
                rule = f"name groups of the observation ({', '.join(known) or 'it has none'})"
                require(group in known, f"MLP.{field}", rule, group)
        return FeedForwardPolicy(self, spaces, generator)


class FeedForwardPolicy(Policy):
    """What ``MLP`` builds."""

    def __init__(
        self, spec: MLP, spaces: EnvSpaces, generator: torch.Generator, *, owner: str = "MLP"
    ) -> None:
        super().__init__()
        # The order of the space, not of each observation: dicts that are equal may be ordered
        # differently.
        every = None if isinstance(spaces.obs, Box) else tuple(spaces.obs)
        self._actor_obs, self._critic_obs = spec.actor_obs or every, spec.critic_obs or every
        width = spec.hidden_sizes[-1]

        def trunk(groups: tuple[str, ...] | None) -> nn.Sequential:
            inputs = obs_size(spaces.obs, groups)
            return mlp(inputs, spec.hidden_sizes, activation=spec.activation, generator=generator)

        self.actor = trunk(self._actor_obs)
        self.critic = trunk(self._critic_obs) if spec.trunk == "separate" else self.actor
        self.action_head = action_head(
            width,
            spaces.action,
            owner=owner,
            bounds=spec.action_bounds,
            initial_std=spec.initial_std,
            generator=generator,
        )
        self.value_head = orthogonal_linear(width, 1, gain=1.0, generator=generator)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "... N"]:
        """Random numbers for ``act``: ``[*shape, N]``, on the device of the generator."""
        return self.action_head.noise(shape, generator)

    def act(
        self,
        obs: Observation,
        mask: Bool[Tensor, "M K"] | None,
        noise: Float[Tensor, "M N"],
    ) -> SampledAction:
        """Sample an action for each row; everything random about it is in ``noise``."""
        distribution = self.action_head(self.actor(flat_obs(obs, self._actor_obs)), mask)
        action = distribution.sample(noise)
        return SampledAction(action, distribution.log_prob(action))

    def act_deterministically(
        self, obs: Observation, mask: Bool[Tensor, "M K"] | None
    ) -> Shaped[Tensor, "M *A"]:
        """The most probable action of each row."""
        return self.action_head(self.actor(flat_obs(obs, self._actor_obs)), mask).mode()

    def evaluate(
        self, obs: Observation, action: Shaped[Tensor, "M *A"], mask: Bool[Tensor, "M K"] | None
    ) -> Evaluation:
        """Log-probability of given actions, entropy and value, with gradients."""
        features = self.actor(flat_obs(obs, self._actor_obs))
        seen_by_critic = (
            features if self.critic is self.actor else self.critic(flat_obs(obs, self._critic_obs))
        )
        distribution = self.action_head(features, mask)
        return Evaluation(
            log_prob=distribution.log_prob(action),
            entropy=distribution.entropy(),
            value=self.value_head(seen_by_critic)[:, 0].float(),
        )

    def value(self, obs: Observation) -> Float[Tensor, " M"]:
        """Value of each row."""
        return self.value_head(self.critic(flat_obs(obs, self._critic_obs)))[:, 0].float()

    def to_env(self, action: Shaped[Tensor, "M *A"]) -> Shaped[Tensor, "M ..."]:
        """Sampled actions in the environment's units and range."""
        return self.action_head.to_env(action)


def check_layers(owner: str, hidden_sizes: tuple[int, ...], std: float) -> None:
    """Check the ranges of what every spec says of hidden layers and Gaussians.

    Raises:
        ValueError: In the name of ``owner``.
    """
    ok = len(hidden_sizes) > 0 and min(hidden_sizes) >= 1
    require(ok, f"{owner}.hidden_sizes", "be one or more widths of at least 1", hidden_sizes)
    check_widest(f"{owner}.hidden_sizes", *hidden_sizes)
    require(0.0 < std < 100.0, f"{owner}.initial_std", "lie in (0, 100)", std)


def check_widest(field: str, *widths: int) -> None:
    """Refuse a layer that no machine initialises in a human time.

    Raises:
        ValueError: In the name of ``field``.
    """
    widest = max(widths, default=0)
    require(widest <= _WIDEST, field, f"be at most {_WIDEST}", widest)


def obs_size(space: ObsSpace, groups: tuple[str, ...] | None) -> int:
    """Length of ``flat_obs``."""
    if isinstance(space, Box):
        return space.size
    assert groups is not None
    return sum(space[name].size for name in groups)


def flat_obs(
    obs: Observation, groups: tuple[str, ...] | None, *, axes: int = 1
) -> Float[Tensor, "... O"]:
    """[M, *O] -> [M, O]; groups one after another.

    Args:
        obs: What is seen.
        groups: Of a grouped observation, in this order.
        axes: How many come before the observation's own.
    """
    if isinstance(obs, Tensor):
        return obs.unsqueeze(axes).flatten(axes)  # also [M] -> [M, 1]
    assert groups is not None
    return torch.cat([obs[name].unsqueeze(axes).flatten(axes) for name in groups], -1)
