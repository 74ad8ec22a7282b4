"""Policy, observation statistics and extensions as one module; methods as functions of weights.

Axes: ``T`` step, ``B`` environment, ``M`` sample, ``P`` weight. This file knows nothing of
Lightning.
"""

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from esper_lightning.core.flat_adam import FlatParameters
from esper_lightning.core.last_obs import holds_images
from esper_lightning.core.running_stats import ObsNormalizer
from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.tensor_trees import map_obs
from esper_lightning.core.types import Observation, Samples
from esper_lightning.policies.base import Evaluation, Policy, SampledAction
from esper_lightning.ppo.extension import Extensions

__all__ = ["Acted", "Agent", "Values", "Weights", "prepare_obs"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Weights(NamedTuple):
    """Parameters and buffers of an agent: everything it computes with besides its inputs."""

    parameters: Float[Tensor, " P"]
    buffers: dict[str, Tensor]


class Acted(NamedTuple):
    """The result of ``Agent.act``: actions, and the memory of the policy."""

    sampled: SampledAction
    action: Shaped[Tensor, "M ..."]  # in the form that the environment takes
    memory: Float[Tensor, "M S"] | None  # memory after the observation


class Values(NamedTuple):
    """The critic's values of the ``N = T * B`` steps of a rollout."""

    obs: Observation  # [N, *O] normalised; images as the environment gave them
    value: Float[Tensor, " N"]  # of the state that the step acted on
    next_value: Float[Tensor, " N"]  # of the state that the step reached


def prepare_obs(obs: Observation, normalizer: ObsNormalizer | None) -> Observation:
    """Observations as the policy sees them: in float32, and normalised.

    Args:
        obs: Observations as the environment gave them.
        normalizer: Statistics of observations; ``None`` for no normalisation.
    """
    obs = map_obs(Tensor.float, obs)
    return obs if normalizer is None else normalizer(obs)


class Agent(nn.Module):
    """A policy, the statistics that normalise its observations, and the extensions of PPO.

    ``act``, ``value`` and ``evaluate`` compute with the weights that the module holds.
    ``with_weights`` calls one of them with other weights, which makes it a pure function that can
    be compiled, and differentiated by the weights.

    Args:
        policy: Actor and critic, whose weights are trained in place.
        normalizer: Statistics of observations; ``None`` for no normalisation.
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
        """Store all trained weights in one vector, together with the optimizer's state.

        Args:
            optimizer: Adam over the trained weights of the policy and of the extensions.

        Returns:
            The vector and Adam's state of it.

        Raises:
            ValueError: If the parameters are not float32 on one device.
        """
        self._flat = FlatParameters(self, optimizer)
        self.refresh()
        return self._flat

    def refresh(self) -> None:
        """Look for buffers and frozen weights that others have replaced."""
        assert self._flat is not None
        frozen = {n: p for n, p in self.named_parameters() if not p.requires_grad}
        buffers = {**dict(self.named_buffers()), **frozen}
        self._weights = Weights(self._flat.state.weight, buffers)

    @property
    def weights(self) -> Weights:
        """All weights and buffers that the module holds; known after ``bind``."""
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
        if weights.parameters is self._flat.state.weight:  # the module holds these anyway
            return method(*args, **kwargs)
        named = {**self._flat.placed(weights.parameters), **weights.buffers}
        # With tie_weights, torch does not restore weights of a module that is in two places.
        result = functional_call(self, named, (method, *args), kwargs, tie_weights=False)
        return cast(_R, result)

    @override
    def forward(self, method: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Call a method within ``forward``, where ``functional_call`` replaces the weights.

        Args:
            method: Bound method of this agent.
            *args: Arguments of the method.
            **kwargs: Further arguments of the method.
        """
        return method(*args, **kwargs)

    def act(
        self,
        obs: Observation,
        mask: Bool[Tensor, "M K"] | None,
        noise: Float[Tensor, "M N"],
        memory: Float[Tensor, "M S"] | None,
    ) -> Acted:
        """Sample actions for observations that come straight from the environment.

        Args:
            obs: Observations ``[M, *O]``, not normalised.
            mask: Choices that are allowed; ``None`` where the environment has no masks.
            noise: Random numbers from ``Policy.noise``.
            memory: Memory before the observations; ``None`` without memory.

        Returns:
            The sampled actions, the same actions in the environment's form, and the memory after
            the observations.
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
        """Value both ends of every step, from observations straight from the environment.

        With memory the rows are steps of whole sequences, in the order that ``Samples`` explains.

        Args:
            obs: Observations ``[N, *O]`` on which the policy acted, not normalised.
            reached: Observations ``[N, *O]`` to which the actions led, not normalised.
            memory: Memory before the first step of each sequence; ``None`` without memory.
            begins: Whether a row is the first step of an episode; ``None`` without memory.
        """
        obs, reached = prepare_obs(obs, self.normalizer), prepare_obs(reached, self.normalizer)
        seen, after = self.policy.unroll_memory(obs, memory, begins)
        reached, _ = self.policy.step_memory(reached, after)
        return Values(obs, self.policy.value(seen), self.policy.value(reached))

    def value_steps(
        self,
        obs: Observation,
        memory: Float[Tensor, "B S"] | None,
        begins: Bool[Tensor, " N"] | None,
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N S"] | None]:
        """Value the states that steps acted on.

        Args:
            obs: Observations ``[N, *O]`` on which the policy acted, not normalised.
            memory: Memory before the first step of each sequence; ``None`` without memory.
            begins: Whether a row is the first step of an episode; ``None`` without memory.

        Returns:
            The values, and the memory after each step.
        """
        obs = prepare_obs(obs, self.normalizer)
        seen, after = self.policy.unroll_memory(obs, memory, begins)
        return self.policy.value(seen), after

    def value_reached(
        self, reached: Observation, memory: Float[Tensor, "N S"] | None
    ) -> Float[Tensor, " N"]:
        """Value the states that steps reached.

        Args:
            reached: Observations ``[N, *O]`` to which the actions led, not normalised.
            memory: Memory after each of the steps; ``None`` without memory.
        """
        seen, _ = self.policy.step_memory(prepare_obs(reached, self.normalizer), memory)
        return self.policy.value(seen)

    def evaluate(self, batch: Samples) -> Evaluation:
        """Log-probability, entropy and value of samples under the module's weights.

        Args:
            batch: Samples with observations as the policy sees them.
        """
        seen, _ = self.policy.unroll_memory(batch.obs, batch.memory, batch.begins)
        return self.policy.evaluate(seen, batch.action, batch.action_mask)

    def evaluate_minibatch(
        self, batch: Samples
    ) -> tuple[Evaluation, dict[str, Float[Tensor, " M"]]]:
        """Evaluate a minibatch, and compute the terms that extensions add to its loss.

        Images become float32 here, so that at most one minibatch of them is in float32.

        Args:
            batch: Samples; their images are as the environment gave them.

        Returns:
            The evaluation, and the terms of extensions by their names.

        Raises:
            ValueError: If a term has a wrong shape, or two extensions give a term the same name.
        """
        if holds_images(batch.obs):
            batch = batch._replace(obs=prepare_obs(batch.obs, self.normalizer))
        evaluation = self.evaluate(batch)

        def evaluate(samples: Samples) -> Evaluation:
            return evaluation if samples is batch else self.evaluate(samples)

        return evaluation, self.extensions.losses(batch, evaluate)

    def named(self, flat: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """Views of a vector over all trained weights, by the names of their parameters.

        Parameters of the policy have the names that they have in the policy.

        Args:
            flat: One number for each weight, a gradient for example.
        """
        assert self._flat is not None
        views = self._flat.named(flat)
        return {name.removeprefix("policy."): view for name, view in views.items()}
