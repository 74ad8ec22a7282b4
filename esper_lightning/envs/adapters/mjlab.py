"""Tasks of mjlab, for ``Custom(make="esper_lightning.envs.adapters.mjlab:make", ...)``."""

import copy
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["make"]

_PIXELS = {"height": 240, "width": 320, "max_extra_envs": 0}  # of a picture, with one environment


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
    return _drawn(envs.ManagerBasedRlEnv)(settings, device=device)


def _drawn(kind: Any) -> Any:
    """A class of mjlab's environments whose ``render`` draws every environment.

    mjlab's own draws one, and needs a window or a renderer from the start. Here the renderers, one
    for each environment, are made by the first call.
    """

    class Drawn(kind):
        _renderers: list[Any] | None = None

        def render(self) -> NDArray[np.uint8]:
            """Pictures ``[B, H, W, 3]`` of all environments."""
            if self._renderers is None:
                self._renderers = [_renderer(self, row) for row in range(self.num_envs)]
            for renderer in self._renderers:
                renderer.update(self.sim.data)
            return np.stack([renderer.render() for renderer in self._renderers])

        def close(self) -> None:
            """Close the renderers and the simulation."""
            for renderer in self._renderers or ():
                renderer.close()
            self._renderers = None
            super().close()

    return Drawn


def _renderer(env: Any, row: int) -> Any:
    """A renderer of mjlab that follows one environment."""
    module: Any = import_module("mjlab.viewer.offscreen_renderer")
    view = copy.copy(env.cfg.viewer)
    for name, value in {**_PIXELS, "env_idx": row}.items():
        if hasattr(view, name):  # some are not in older versions
            setattr(view, name, value)
    renderer = module.OffscreenRenderer(model=env.sim.mj_model, cfg=view, scene=env.scene)
    renderer.initialize()
    return renderer
