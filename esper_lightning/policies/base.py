"""The interface of a policy: what acting and the update need of an actor-critic.

Axes: ``T`` step, ``M`` sample, ``*O`` observation, ``S`` number in a memory.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper_lightning.core.errors import Words, require, require_members
from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.tensor_trees import leaves
from esper_lightning.core.types import Observation

__all__ = ["Evaluation", "Policy", "PolicySpec", "SampledAction", "build_policy"]


class SampledAction(NamedTuple):
    """Actions as the distribution sampled them, with their log-probabilities."""

    action: Shaped[Tensor, "M *A"]
    log_prob: Float[Tensor, " M"]


class Evaluation(NamedTuple):
    """Log-probability, entropy and value of earlier actions under the current weights."""

    log_prob: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]
    value: Float[Tensor, " M"]


class Policy(nn.Module, ABC):
    """An actor and a critic.

    The policy gets normalised observations. Its results must be float32, also under autocast. Where
    training is compiled, only parameters and buffers may change, because other attributes are read
    once.

    A policy with memory sets ``memory_size`` and overrides ``step_memory`` and ``unroll_memory``.
    The first result of these two is what all other methods get in place of the observation. Without
    memory that result is the observation itself, and the memory is ``None``.
    """

    memory_size: int = 0
    """``S``, the number of values that the policy carries from step to step; 0 without memory."""

    def initial_memory(self, obs: Observation) -> Float[Tensor, "M S"] | None:
        """Memory at the beginning of episodes: zeros, or ``None`` for a policy without memory.

        Args:
            obs: First observations ``[M, *O]`` of the episodes.
        """
        if self.memory_size == 0:
            return None
        first = leaves(obs)[0]
        return torch.zeros(len(first), self.memory_size, device=first.device)

    def step_memory(
        self, obs: Observation, memory: Float[Tensor, "M S"] | None
    ) -> tuple[Observation, Float[Tensor, "M S"] | None]:
        """Update the memory with one observation of each row, for acting.

        Args:
            obs: Observations ``[M, *O]``.
            memory: Memory before the observations.

        Returns:
            The input of the other methods, and the memory after the observations.
        """
        return obs, memory

    def unroll_memory(
        self,
        obs: Observation,
        memory: Float[Tensor, "M S"] | None,
        begins: Bool[Tensor, " N"] | None,
    ) -> tuple[Observation, Float[Tensor, "N S"] | None]:
        """Update the memory with ``T`` observations of each of ``M`` sequences, for the update.

        The results must be those of ``T`` calls of ``step_memory``.

        Args:
            obs: Observations ``[N, *O]``, where ``N = T * M``: the first step of all sequences,
                then the second step of all, and so on.
            memory: Memory before the first step of each sequence.
            begins: Whether a row is the first step of an episode, which begins with blank memory.

        Returns:
            The input of the other methods for each row, and the memory after each row.
        """
        del begins
        return obs, memory

    def reset_memory(
        self, memory: Float[Tensor, "M S"] | None, ended: Bool[Tensor, " M"]
    ) -> Float[Tensor, "M S"] | None:
        """The memory with zeros, the memory of a new episode, wherever an episode ended."""
        return None if memory is None else memory.masked_fill(ended[:, None], 0.0)

    @abstractmethod
    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "... N"]:
        """Random numbers for ``act``: ``[*shape, N]``, on the device of the generator."""

    @abstractmethod
    def act(
        self,
        obs: Observation,
        mask: Bool[Tensor, "M K"] | None,
        noise: Float[Tensor, "M N"],
    ) -> SampledAction:
        """Sample an action for each row; ``noise`` is the only source of randomness.

        Args:
            obs: Observations ``[M, *O]``, or the first result of ``step_memory``.
            mask: Choices that are allowed; ``None`` where the environment has no masks.
            noise: Random numbers from the method ``noise``.
        """

    @abstractmethod
    def act_deterministically(
        self, obs: Observation, mask: Bool[Tensor, "M K"] | None
    ) -> Shaped[Tensor, "M *A"]:
        """The most probable action of each row.

        Args:
            obs: Observations ``[M, *O]``, or the first result of ``step_memory``.
            mask: Choices that are allowed; ``None`` where the environment has no masks.
        """

    @abstractmethod
    def evaluate(
        self, obs: Observation, action: Shaped[Tensor, "M *A"], mask: Bool[Tensor, "M K"] | None
    ) -> Evaluation:
        """Log-probability of given actions, entropy and value of each row, with gradients.

        Args:
            obs: Observations ``[M, *O]``, or the first result of ``unroll_memory``.
            action: Actions as ``act`` sampled them.
            mask: Choices that were allowed; ``None`` where the environment has no masks.
        """

    @abstractmethod
    def value(self, obs: Observation) -> Float[Tensor, " M"]:
        """Value of each row."""

    @abstractmethod
    def to_env(self, action: Shaped[Tensor, "M *A"]) -> Shaped[Tensor, "M ..."]:
        """Sampled actions in the environment's units and range."""


class PolicySpec(ABC):
    """The settings of a policy: data without tensors.

    Any class with a method ``build`` is a spec, whether it derives from this class or not.
    """

    @abstractmethod
    def build(self, spaces: EnvSpaces, generator: torch.Generator) -> Policy:
        """Build the policy on the CPU.

        Args:
            spaces: Spaces of observations, as the policy sees them, and of actions.
            generator: Source of the initial weights, and the only one.

        Raises:
            ValueError: If the policy does not fit these spaces.
        """

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        if cls is not PolicySpec:
            return NotImplemented
        return callable(getattr(other, "build", None)) or NotImplemented


_MEMBERS = (
    "memory_size",
    "initial_memory",
    "step_memory",
    "unroll_memory",
    "reset_memory",
    "noise",
    "act",
    "act_deterministically",
    "evaluate",
    "value",
    "to_env",
)


def build_policy(spec: PolicySpec, spaces: EnvSpaces, generator: torch.Generator) -> Policy:
    """Build the policy of a spec, and refuse an object that is no policy.

    Args:
        spec: Spec of the policy.
        spaces: Spaces of observations, as the policy sees them, and of actions.
        generator: Source of the initial weights.

    Raises:
        ValueError: If the spec built something else than a policy, or does not fit the spaces.
    """
    policy = spec.build(spaces, generator)
    field, rule = f"{type(spec).__name__}.build()", "return a Policy"
    is_module = isinstance(policy, nn.Module)
    require(is_module, field, f"{rule}, which is an nn.Module", Words(type(policy).__name__))
    require_members(field, policy, _MEMBERS, rule)
    return policy
