"""Policy and observation statistics as functions of weights that are handed to them.

Axes: ``T`` step, ``B`` environment, ``M`` sample, ``P`` weight. It knows nothing of Lightning.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from esper_lightning.core.flat_adam import FlatParameters
from esper_lightning.core.running_stats import ObsNormalizer
from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.types import Observation, map_obs
from esper_lightning.policies.base import Evaluation, Policy, SampledAction

__all__ = ["Agent", "Weights", "as_seen"]


class Weights(NamedTuple):
    """What an agent computes with, as arguments."""

    parameters: Float[Tensor, " P"]
    buffers: dict[str, Tensor]


def as_seen(obs: Observation, normalizer: ObsNormalizer | None) -> Observation:
    """Observations as the policy sees them."""
    obs = map_obs(Tensor.float, obs)
    return obs if normalizer is None else normalizer(obs)


class _Both(nn.Module):
    """So that one ``functional_call`` reaches every method of both."""

    def __init__(self, policy: Policy, normalizer: ObsNormalizer | None) -> None:
        super().__init__()
        self.policy, self.normalizer = policy, normalizer

    def forward(self, method: str, *args: Any) -> Any:
        """Call a method of this or of the policy."""
        return getattr(self if method in ("normalize", "sample") else self.policy, method)(*args)

    def sample(self, obs: Observation, *args: Any) -> tuple[SampledAction, Tensor]:
        """Actions as sampled, and as the environment takes them."""
        sampled = self.policy.act(self.normalize(obs), *args)
        return sampled, self.policy.to_env(sampled.action)

    def normalize(self, obs: Observation) -> Observation:
        """Observations as the policy sees them."""
        return as_seen(obs, self.normalizer)


class Agent:
    """An actor, a critic, and what they see of an observation.

    Args:
        policy: Trained in place by whoever holds ``parameters``.
        normalizer: Statistics of observations; ``None`` for none.
    """

    def __init__(self, policy: Policy, normalizer: ObsNormalizer | None) -> None:
        self._both = _Both(policy, normalizer)
        self._parameters: FlatParameters | None = None
        self._weights: Weights | None = None

    def bind(self, optimizer: torch.optim.Adam) -> FlatParameters:
        """Put all weights into one vector, together with the optimizer's state.

        Raises:
            ValueError: If parameters are not float32 on one device.
        """
        self._parameters = FlatParameters(self._both, optimizer)
        frozen = {n: p for n, p in self._both.named_parameters() if not p.requires_grad}
        buffers = {**dict(self._both.named_buffers()), **frozen}
        self._weights = Weights(self._parameters.state.weight, buffers)
        return self._parameters

    @property
    def weights(self) -> Weights:
        """Those in force."""
        assert self._weights is not None
        return self._weights

    def normalize(self, weights: Weights, obs: Observation) -> Observation:
        """Observations as the policy sees them."""
        return self._call(weights, "normalize", obs)

    def act(
        self,
        weights: Weights,
        obs: Observation,
        mask: Bool[Tensor, "M K"] | None,
        noise: Float[Tensor, "M N"],
    ) -> tuple[SampledAction, Shaped[Tensor, "M ..."]]:
        """Sample actions; also as the environment takes them. Observations come as they are."""
        return self._call(weights, "sample", obs, mask, noise)

    def value(self, weights: Weights, obs: Observation) -> Float[Tensor, " M"]:
        """Value of normalised observations."""
        return self._call(weights, "value", obs)

    def evaluate(
        self,
        weights: Weights,
        obs: Observation,
        action: Shaped[Tensor, "M *A"],
        mask: Bool[Tensor, "M K"] | None,
    ) -> Evaluation:
        """Actions taken earlier, seen by these weights; of normalised observations."""
        return self._call(weights, "evaluate", obs, action, mask)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "... N"]:
        """Random numbers for ``act``."""
        return self._both.policy.noise(shape, generator)

    def named(self, flat: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """A vector over all weights by the policy's own names of its parameters."""
        assert self._parameters is not None
        views = self._parameters.named(flat)
        return {name.removeprefix("policy."): view for name, view in views.items()}

    def _call(self, weights: Weights, method: str, *args: Any) -> Any:
        assert self._parameters is not None
        if weights.parameters is self._parameters.state.weight:  # which the modules hold anyway
            return self._both(method, *args)
        named = {**self._parameters.placed(weights.parameters), **weights.buffers}
        # With tie_weights, torch forgets to put back weights of a module that is in two places.
        return functional_call(self._both, named, (method, *args), tie_weights=False)
