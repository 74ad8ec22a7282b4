"""Networks that are grown while they train: the environment, its settings and its baselines."""

from esper_lightning.envs.morphogenesis.env import MorphogenesisEnv, StepReport
from esper_lightning.envs.morphogenesis.settings import Morphogenesis

__all__ = ["Morphogenesis", "MorphogenesisEnv", "StepReport"]
