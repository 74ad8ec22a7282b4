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
from esper_lightning.core.types import Observation, Samples, map_obs
from esper_lightning.policies.base import (
    Evaluation,
    Policy,
    SampledAction,
    blank_memory,
    recall,
    see,
)

__all__ = ["Acted", "Agent", "Values", "Weights", "prepare_obs"]


class Weights(NamedTuple):
    """What an agent computes with, as arguments."""

    parameters: Float[Tensor, " P"]
    buffers: dict[str, Tensor]


class Acted(NamedTuple):
    """What an agent makes of an observation when it acts."""

    sampled: SampledAction
    action: Shaped[Tensor, "M ..."]  # as the environment takes it
    memory: Float[Tensor, "M S"] | None  # after the observation


class Values(NamedTuple):
    """What the critic says of a rollout, ``N = T * B``."""

    obs: Observation  # [N, *O] normalised
    value: Float[Tensor, " N"]  # of the state acted on
    next_value: Float[Tensor, " N"]  # of the state reached


def prepare_obs(obs: Observation, normalizer: ObsNormalizer | None) -> Observation:
    """Observations as the policy sees them."""
    obs = map_obs(Tensor.float, obs)
    return obs if normalizer is None else normalizer(obs)


class _Both(nn.Module):
    """So that one ``functional_call`` reaches every method of both."""

    def __init__(self, policy: Policy, normalizer: ObsNormalizer | None) -> None:
        super().__init__()
        self.policy, self.normalizer = policy, normalizer

    def forward(self, method: str, *args: Any) -> Any:
        """Call a method."""
        return getattr(self, method)(*args)

    def act(self, obs: Observation, mask: Any, noise: Tensor, memory: Tensor | None) -> Acted:
        """See ``Agent``."""
        seen, memory = see(self.policy, prepare_obs(obs, self.normalizer), memory)
        sampled = self.policy.act(seen, mask, noise)
        return Acted(sampled, self.policy.to_env(sampled.action), memory)

    def value(
        self, obs: Observation, reached: Observation, memory: Tensor | None, begins: Tensor | None
    ) -> Values:
        """See ``Agent``."""
        obs, reached = prepare_obs(obs, self.normalizer), prepare_obs(reached, self.normalizer)
        seen = recall(self.policy, obs, memory, begins)
        if memory is not None:  # that of each step, from which the next observation is seen
            assert isinstance(seen, Tensor)
            reached, _ = see(self.policy, reached, seen)
        return Values(obs, self.policy.value(seen), self.policy.value(reached))

    def evaluate(self, batch: Samples) -> Evaluation:
        """See ``Agent``."""
        seen = recall(self.policy, batch.obs, batch.memory, batch.begins)
        return self.policy.evaluate(seen, batch.action, batch.action_mask)


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

    def act(
        self,
        weights: Weights,
        obs: Observation,
        mask: Bool[Tensor, "M K"] | None,
        noise: Float[Tensor, "M N"],
        memory: Float[Tensor, "M S"] | None,
    ) -> Acted:
        """Sample actions. Observations come as they are, with the memory before them."""
        return self._call(weights, "act", obs, mask, noise, memory)

    def value(
        self,
        weights: Weights,
        obs: Observation,
        reached: Observation,
        memory: Float[Tensor, "B S"] | None,
        begins: Bool[Tensor, " N"] | None,
    ) -> Values:
        """Value both ends of every step; of observations ``[N, *O]`` as they are.

        With memory the rows are steps of whole sequences: see ``Samples``.
        """
        return self._call(weights, "value", obs, reached, memory, begins)

    def evaluate(self, weights: Weights, batch: Samples) -> Evaluation:
        """Actions taken earlier, seen by these weights."""
        return self._call(weights, "evaluate", batch)

    def blank_memory(self, obs: Observation) -> Float[Tensor, "M S"] | None:
        """At the beginning of episodes; ``None`` for a policy without memory."""
        return blank_memory(self._both.policy, obs)

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
