"""Actor-critics: a spec says which, ``build`` makes it."""

from esper_lightning.policies.base import Policy, PolicySpec
from esper_lightning.policies.feedforward import MLP
from esper_lightning.policies.recurrent import Recurrent

__all__ = ["MLP", "Policy", "PolicySpec", "Recurrent"]
