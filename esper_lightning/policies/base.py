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
from esper_lightning.core.types import Observation, map_obs

__all__ = [
    "Evaluation",
    "Policy",
    "PolicySpec",
    "SampledAction",
    "blank_memory",
    "forget",
    "recall",
    "see",
]


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

    A policy with memory sets ``memory_size`` and has ``remember``. Its other methods are given the
    memory after an observation, ``[M, S]``, in place of the observation: what it decides on is what
    it remembers.
    """

    memory_size: int = 0
    """``S``: how many numbers it carries from step to step, zeros when an episode begins."""

    def remember(
        self,
        obs: Observation,
        memory: Float[Tensor, "M S"],
        begins: Bool[Tensor, "T M"] | None,
    ) -> Float[Tensor, "T M S"]:
        """The memory after each of ``T`` observations ``[T, M, *O]``.

        Acting asks for one step, learning for many: both are to give the same.

        Args:
            obs: In order of time.
            memory: Before the first of them.
            begins: Where an observation is the first of an episode, so that nothing from before it
                counts; ``None`` for nowhere.
        """
        raise NotImplementedError

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


# What a policy is to be given in place of an observation. Without memory (``None``) that is the
# observation.


def blank_memory(policy: Policy, obs: Observation) -> Float[Tensor, "M S"] | None:
    """At the beginning of episodes whose first observations are ``obs``."""
    if policy.memory_size == 0:
        return None
    first = leaves(obs)[0]
    return torch.zeros(len(first), policy.memory_size, device=first.device)


def see(
    policy: Policy, obs: Observation, memory: Float[Tensor, "M S"] | None
) -> tuple[Observation, Float[Tensor, "M S"] | None]:
    """One step: what to decide on, and the memory after it."""
    if memory is None:
        return obs, None

    def one_step(value: Tensor) -> Tensor:
        return value[None]

    after = policy.remember(map_obs(one_step, obs), memory, None)[0]
    return after, after


def recall(
    policy: Policy,
    obs: Observation,
    memory: Float[Tensor, "M S"] | None,
    begins: Bool[Tensor, " N"] | None,
) -> Observation:
    """What to decide on at each of ``T`` steps of ``M`` sequences, ``N = T * M`` rows by time."""
    if memory is None:
        return obs
    assert begins is not None

    def by_step(value: Tensor) -> Tensor:
        return value.reshape(-1, len(memory), *value.shape[1:])

    return policy.remember(map_obs(by_step, obs), memory, by_step(begins)).flatten(0, 1)


def forget(
    memory: Float[Tensor, "M S"] | None, ended: Bool[Tensor, " M"]
) -> Float[Tensor, "M S"] | None:
    """Blank where an episode ended."""
    return None if memory is None else memory.masked_fill(ended[:, None], 0.0)
