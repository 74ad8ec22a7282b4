"""The settings that hosts and their environment read, as a protocol.

The file of the settings imports the environment, which therefore cannot import that file.
"""

from typing import Protocol, runtime_checkable

import torch

from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.envs.morphogenesis.data import Splits
from esper_lightning.envs.morphogenesis.host import Architecture
from esper_lightning.envs.morphogenesis.lifecycle import RampShape
from esper_lightning.envs.morphogenesis.reward import RewardWeights
from esper_lightning.envs.morphogenesis.training import SGD

__all__ = ["HostSettings"]


@runtime_checkable
class HostSettings(Protocol):
    """Settings of the environment, which ``Morphogenesis`` implements and explains."""

    @property
    def num_envs(self) -> int:
        """Hosts on each rank."""
        ...

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each block."""
        ...

    @property
    def epochs(self) -> int:
        """Steps of an episode."""
        ...

    @property
    def train_batches(self) -> int:
        """SGD updates in a step."""
        ...

    @property
    def batch_size(self) -> int:
        """Images in an SGD update."""
        ...

    @property
    def validation_size(self) -> int:
        """Number of images on which accuracy is measured."""
        ...

    @property
    def blueprints(self) -> tuple[str, ...]:
        """Names of the modules that can be grown."""
        ...

    @property
    def ramp_epochs(self) -> tuple[int, ...]:
        """Durations of blending that the agent can choose, in epochs."""
        ...

    @property
    def ramp_shape(self) -> RampShape:
        """Shape of the rise of alpha: linear, cosine or sigmoid."""
        ...

    @property
    def min_training_epochs(self) -> int:
        """Epochs in isolation before a seed may be blended."""
        ...

    @property
    def fade_epochs(self) -> int:
        """Epochs in which a pruned seed that is attached fades out."""
        ...

    @property
    def cooldown_epochs(self) -> int:
        """Epochs for which a slot stays empty after its seed was pruned."""
        ...

    def architecture(self) -> Architecture:
        """The layers of the host."""
        ...

    def sgd(self) -> SGD:
        """The settings of SGD, which trains the hosts."""
        ...

    def reward_weights(self) -> RewardWeights:
        """The weights of the terms of the reward."""
        ...

    def spaces(self) -> EnvSpaces:
        """Observation and action spaces of the environment."""
        ...

    def splits(self, device: torch.device) -> Splits:
        """The data in its splits: training, validation and test."""
        ...
