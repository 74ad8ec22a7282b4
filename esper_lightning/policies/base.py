"""The policy protocol: what acting and the update need of an actor-critic.

Axes: ``T`` step, ``M`` sample, ``*O`` observation, ``S`` number in a memory.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.tensor_trees import leaves
from esper_lightning.core.types import Observation

__all__ = ["Evaluation", "Policy", "PolicySpec", "SampledAction"]


class SampledAction(NamedTuple):
    """An action as the distribution sampled it."""

    action: Shaped[Tensor, "M *A"]
    log_prob: Float[Tensor, " M"]


class Evaluation(NamedTuple):
    """What the current weights say of actions taken earlier."""

    log_prob: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]
    value: Float[Tensor, " M"]


class Policy(nn.Module, ABC):
    """An actor and a critic.

    Observations come normalised; results are float32, also under autocast. Where training is
    compiled, only parameters and buffers may change: other attributes are read once.

    A policy with memory sets ``memory_size`` and overrides ``step_memory`` and ``unroll_memory``.
    What these return as ``seen`` is what its other methods get in place of the observation. Without
    memory that is the observation itself, and the memory is ``None``.
    """

    memory_size: int = 0
    """``S``: how many numbers the policy carries from step to step."""

    def initial_memory(self, obs: Observation) -> Float[Tensor, "M S"] | None:
        """The memory at the beginning of episodes whose first observations are ``obs``: zeros."""
        if self.memory_size == 0:
            return None
        first = leaves(obs)[0]
        return torch.zeros(len(first), self.memory_size, device=first.device)

    def step_memory(
        self, obs: Observation, memory: Float[Tensor, "M S"] | None
    ) -> tuple[Observation, Float[Tensor, "M S"] | None]:
        """Take in one observation of each row, when acting.

        Args:
            obs: Observations ``[M, *O]``.
            memory: Memory before the observations.

        Returns:
            What to decide on, and the memory after the observations.
        """
        return obs, memory

    def unroll_memory(
        self,
        obs: Observation,
        memory: Float[Tensor, "M S"] | None,
        begins: Bool[Tensor, " N"] | None,
    ) -> tuple[Observation, Float[Tensor, "N S"] | None]:
        """Take in ``T`` observations of each of ``M`` sequences, when learning.

        The results must be those of ``T`` calls of ``step_memory``.

        Args:
            obs: Observations ``[N, *O]``, where ``N = T * M``: one step of all sequences after
                another.
            memory: Memory before the first step of each sequence.
            begins: Whether a row is the first step of an episode, for which nothing before counts.

        Returns:
            What to decide on at each row, and the memory after each row.
        """
        del begins
        return obs, memory

    def reset_memory(
        self, memory: Float[Tensor, "M S"] | None, ended: Bool[Tensor, " M"]
    ) -> Float[Tensor, "M S"] | None:
        """The memory with that of a new episode, zeros, wherever an episode ended."""
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
        """Sample an action for each row; everything random about it is in ``noise``."""

    @abstractmethod
    def act_deterministically(
        self, obs: Observation, mask: Bool[Tensor, "M K"] | None
    ) -> Shaped[Tensor, "M *A"]:
        """The most probable action of each row."""

    @abstractmethod
    def evaluate(
        self, obs: Observation, action: Shaped[Tensor, "M *A"], mask: Bool[Tensor, "M K"] | None
    ) -> Evaluation:
        """Log-probability of given actions, entropy and value, with gradients."""

    @abstractmethod
    def value(self, obs: Observation) -> Float[Tensor, " M"]:
        """Value of each row."""

    @abstractmethod
    def to_env(self, action: Shaped[Tensor, "M *A"]) -> Shaped[Tensor, "M ..."]:
        """Sampled actions in the environment's units and range."""


class PolicySpec(ABC):
    """Which policy to build: data without tensors.

    Any class with ``build`` will do, derived from this or not.
    """

    @abstractmethod
    def build(self, spaces: EnvSpaces, generator: torch.Generator) -> Policy:
        """Allocate and initialise on the CPU, drawing from ``generator`` only.

        Raises:
            ValueError: If the policy cannot serve these spaces.
        """

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        if cls is not PolicySpec:
            return NotImplemented
        return callable(getattr(other, "build", None)) or NotImplemented
