"""What ``esper evaluate`` adds to the mean return for some environments.

The table below is all that the command line knows of such environments. A module in it is imported
only where it is asked for: a run in another environment never needs it.
"""

import importlib
from pathlib import Path
from typing import Protocol, cast

import torch

from esper_lightning.core.errors import require
from esper_lightning.envs.base import EnvSpec
from esper_lightning.training.module import PPO

__all__ = ["SpecialEvaluation", "require_special_evaluation", "special_evaluation"]

_MODULES = {
    "esper_lightning.envs.morphogenesis.settings.Morphogenesis": "esper_lightning.growth.table",
}
"""Modules that implement ``SpecialEvaluation``, by the class path of an environment's spec."""


class SpecialEvaluation(Protocol):
    """An evaluation of a policy in environments of one kind; a module can be one."""

    def refuse_figures(self, folder: Path) -> None:
        """Refuse ``--figures`` where none can be drawn; make the folder if they can.

        Raises:
            ValueError: If what draws them is missing, or the folder cannot be made.
        """
        ...

    def compare_policies(self, model: PPO, device: torch.device, *, figures: Path | None) -> str:
        """Play episodes of a policy and of others to compare it with.

        Args:
            model: The module with trained weights.
            device: Where to play.
            figures: Folder for figures of episodes; ``None`` for none.

        Returns:
            What is to be printed.
        """
        ...


def special_evaluation(kind: type[EnvSpec]) -> SpecialEvaluation | None:
    """The special evaluation for the specs of a class, or of a class that derives from it."""
    for each in kind.__mro__:
        module = _MODULES.get(f"{each.__module__}.{each.__qualname__}")
        if module is not None:
            return cast(SpecialEvaluation, importlib.import_module(module))
    return None


def require_special_evaluation(kind: type[EnvSpec], setting: str) -> SpecialEvaluation:
    """The special evaluation for the specs of a class, which a setting needs.

    Args:
        kind: Class of the spec.
        setting: Name of the setting, for the error.

    Raises:
        ValueError: If there is none for the class, naming the classes that have one.
    """
    found = special_evaluation(kind)
    known = ", ".join(path.rpartition(".")[2] for path in _MODULES)
    rule = f"be for an environment with figures: {known}"
    require(found is not None, setting, rule, kind.__name__)
    return cast(SpecialEvaluation, found)
