"""The policy protocol: what acting and the update need of an actor-critic.

Axes: ``M`` sample, ``*O`` observation.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper_lightning.core.shapes import Bool, Float, Shaped
from esper_lightning.core.spaces import EnvSpaces
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
    """

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
