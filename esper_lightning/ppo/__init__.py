"""The algorithm PPO: one file for each phase of an iteration. Lightning is never imported here."""

from esper_lightning.ppo.entropy_decay import EntropyDecay
from esper_lightning.ppo.extension import Extension, ExtensionSpec, Prepared
from esper_lightning.ppo.random_distillation import RND

__all__ = ["RND", "EntropyDecay", "Extension", "ExtensionSpec", "Prepared"]
