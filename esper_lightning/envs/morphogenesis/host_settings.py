"""What hosts and their environment read of the settings.

Settings build the environment, which therefore does not import them.
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
    """Settings of the environment; ``Morphogenesis`` says what each one means."""

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
        """Images in an update."""
        ...

    @property
    def validation_size(self) -> int:
        """Images that accuracy is measured on."""
        ...

    @property
    def blueprints(self) -> tuple[str, ...]:
        """Names of what can be grown."""
        ...

    @property
    def ramp_epochs(self) -> tuple[int, ...]:
        """The choices of how long blending takes."""
        ...

    @property
    def ramp_shape(self) -> RampShape:
        """How alpha rises."""
        ...

    @property
    def min_training_epochs(self) -> int:
        """Epochs in isolation before a seed may be blended."""
        ...

    @property
    def fade_epochs(self) -> int:
        """Epochs that an attached seed takes to go."""
        ...

    @property
    def cooldown_epochs(self) -> int:
        """Epochs for which a slot stays empty after that."""
        ...

    def architecture(self) -> Architecture:
        """The host."""
        ...

    def sgd(self) -> SGD:
        """How hosts are trained."""
        ...

    def reward_weights(self) -> RewardWeights:
        """What counts how much."""
        ...

    def spaces(self) -> EnvSpaces:
        """What the environment shows and takes."""
        ...

    def splits(self, device: torch.device) -> Splits:
        """The data."""
        ...
