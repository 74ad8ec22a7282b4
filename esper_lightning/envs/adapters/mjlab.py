"""Tasks of mjlab, for ``Custom(make="esper_lightning.envs.adapters.mjlab:make", ...)``."""

from importlib import import_module
from typing import Any

__all__ = ["make"]


def make(*, num_envs: int, device: str, seed: int, task: str) -> Any:
    """Make a registered task of mjlab.

    Args:
        num_envs: Number of environments.
        device: Device of the simulation.
        seed: Seed of the resets.
        task: Name of the task, such as ``Mjlab-Cartpole-Balance``.

    Raises:
        ImportError: If mjlab is not installed.
        KeyError: If mjlab knows no such task.
    """
    envs: Any = import_module("mjlab.envs")
    registry: Any = import_module("mjlab.tasks.registry")
    settings = registry.load_env_cfg(task)
    settings.scene.num_envs, settings.seed = num_envs, seed
    return envs.ManagerBasedRlEnv(settings, device=device)
