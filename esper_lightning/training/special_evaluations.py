"""Special evaluations, which ``esper evaluate`` adds to the mean return for some environments.

The table below is all that the command line knows of such environments. A module of the table is
imported only when its evaluation is asked for, so runs in other environments never need it.
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
        """Refuse ``--figures`` where no figures can be plotted; otherwise make the folder.

        Args:
            folder: Folder for the figures.

        Raises:
            ValueError: If the plotting library is missing, or the folder cannot be made.
        """
        ...

    def compare_policies(self, model: PPO, device: torch.device, *, figures: Path | None) -> str:
        """Play episodes with a trained policy and with policies to compare it with.

        Args:
            model: Module with trained weights.
            device: Device on which the episodes are played.
            figures: Folder for figures of episodes; ``None`` for no figures.

        Returns:
            Text for the command line to print.
        """
        ...


def special_evaluation(kind: type[EnvSpec]) -> SpecialEvaluation | None:
    """The special evaluation for specs of a class; ``None`` if there is none.

    Classes that derive from the class in the table have the same evaluation.

    Args:
        kind: Class of the spec.
    """
    for each in kind.__mro__:
        module = _MODULES.get(f"{each.__module__}.{each.__qualname__}")
        if module is not None:
            return cast(SpecialEvaluation, importlib.import_module(module))
    return None


def require_special_evaluation(kind: type[EnvSpec], setting: str) -> SpecialEvaluation:
    """The special evaluation for specs of a class, for a setting that needs one.

    Args:
        kind: Class of the spec.
        setting: Name of the setting, for the error.

    Raises:
        ValueError: If the class has none. The error names the classes that have one.
    """
    found = special_evaluation(kind)
    known = ", ".join(path.rpartition(".")[2] for path in _MODULES)
    rule = f"be for an environment with figures: {known}"
    require(found is not None, setting, rule, kind.__name__)
    return cast(SpecialEvaluation, found)
