"""Policy, observation statistics and extensions as one module; methods as functions of weights.

Axes: ``T`` step, ``B`` environment, ``M`` sample, ``P`` weight. It knows nothing of Lightning.
"""

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from esper_lightning.core.flat_adam import FlatParameters
from esper_lightning.core.running_stats import ObsNormalizer
from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.types import Observation, Samples, map_obs
from esper_lightning.policies.base import Evaluation, Policy, SampledAction
from esper_lightning.ppo.extension import Extensions

__all__ = ["Acted", "Agent", "Values", "Weights", "prepare_obs"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Weights(NamedTuple):
    """Everything that an agent computes with besides its inputs."""

    parameters: Float[Tensor, " P"]
    buffers: dict[str, Tensor]


class Acted(NamedTuple):
    """Result of ``Agent.act``."""

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


class Agent(nn.Module):
    """A policy, the statistics by which its observations are normalised, and extensions of PPO.

    ``act``, ``value`` and ``evaluate`` compute with the weights that the module holds.
    ``with_weights`` calls one of them with other weights, which makes it a pure function that can
    be compiled, and differentiated by the weights.

    Args:
        policy: Actor and critic, trained in place by the owner of ``parameters``.
        normalizer: Statistics of observations; ``None`` for none.
        extensions: Extensions of PPO, trained together with the policy; ``None`` for none.
    """

    def __init__(
        self,
        policy: Policy,
        normalizer: ObsNormalizer | None,
        extensions: Extensions | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.normalizer = policy, normalizer
        self.extensions = Extensions() if extensions is None else extensions
        self._flat: FlatParameters | None = None
        self._weights: Weights | None = None

    def bind(self, optimizer: torch.optim.Adam) -> FlatParameters:
        """Store all weights in one vector, together with the optimizer's state.

        Raises:
            ValueError: If parameters are not float32 on one device.
        """
        self._flat = FlatParameters(self, optimizer)
        frozen = {n: p for n, p in self.named_parameters() if not p.requires_grad}
        buffers = {**dict(self.named_buffers()), **frozen}
        self._weights = Weights(self._flat.state.weight, buffers)
        return self._flat

    @property
    def weights(self) -> Weights:
        """The weights that the module holds."""
        assert self._weights is not None
        return self._weights

    def with_weights(
        self, weights: Weights, method: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Call a method of this agent as if the module held ``weights``.

        Args:
            weights: Weights to compute with.
            method: Bound method of this agent, such as ``agent.act``.
            *args: Arguments of the method.
            **kwargs: Further arguments of the method.
        """
        assert self._flat is not None
        if weights.parameters is self._flat.state.weight:  # which the module holds anyway
            return method(*args, **kwargs)
        named = {**self._flat.placed(weights.parameters), **weights.buffers}
        # With tie_weights, torch does not restore weights of a module that is in two places.
        result = functional_call(self, named, (method, *args), kwargs, tie_weights=False)
        return cast(_R, result)

    @override
    def forward(self, method: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Call a method: ``functional_call`` replaces weights while ``forward`` runs."""
        return method(*args, **kwargs)

    def act(
        self,
        obs: Observation,
        mask: Bool[Tensor, "M K"] | None,
        noise: Float[Tensor, "M N"],
        memory: Float[Tensor, "M S"] | None,
    ) -> Acted:
        """Sample actions for observations as the environment gives them.

        Args:
            obs: Observations ``[M, *O]``.
            mask: Choices that are allowed.
            noise: Random numbers from ``Policy.noise``.
            memory: Memory before the observations.
        """
        seen, memory = self.policy.step_memory(prepare_obs(obs, self.normalizer), memory)
        sampled = self.policy.act(seen, mask, noise)
        return Acted(sampled, self.policy.to_env(sampled.action), memory)

    def value(
        self,
        obs: Observation,
        reached: Observation,
        memory: Float[Tensor, "B S"] | None,
        begins: Bool[Tensor, " N"] | None,
    ) -> Values:
        """Value both ends of every step, from observations as the environment gives them.

        With memory the rows are steps of whole sequences: see ``Samples``.

        Args:
            obs: Observations ``[N, *O]`` that were acted on.
            reached: Observations ``[N, *O]`` that the actions led to.
            memory: Memory before the first step of each sequence.
            begins: Whether a row is the first step of an episode.
        """
        obs, reached = prepare_obs(obs, self.normalizer), prepare_obs(reached, self.normalizer)
        seen, after = self.policy.unroll_memory(obs, memory, begins)
        reached, _ = self.policy.step_memory(reached, after)
        return Values(obs, self.policy.value(seen), self.policy.value(reached))

    def evaluate(self, batch: Samples) -> Evaluation:
        """Log-probability, entropy and value of actions that were taken earlier."""
        seen, _ = self.policy.unroll_memory(batch.obs, batch.memory, batch.begins)
        return self.policy.evaluate(seen, batch.action, batch.action_mask)

    def evaluate_minibatch(
        self, batch: Samples
    ) -> tuple[Evaluation, dict[str, Float[Tensor, " M"]]]:
        """What ``evaluate`` says, and the terms of extensions by their names.

        Raises:
            ValueError: If two extensions give a term the same name.
        """
        return self.evaluate(batch), self.extensions.losses(batch, self.evaluate)

    def named(self, flat: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """A vector over all weights by the policy's own names of its parameters."""
        assert self._flat is not None
        views = self._flat.named(flat)
        return {name.removeprefix("policy."): view for name, view in views.items()}
