"""The progress of a run, passed to what a simulator consists of."""

from typing import Any

from esper_lightning.envs.base import RunProgress

__all__ = ["pass_progress"]

_INNER = ("env", "unwrapped", "scenario")


def pass_progress(simulator: Any, progress: RunProgress) -> None:
    """Call ``begin_iteration`` of a simulator, or of the outermost part within that has it.

    The environments of a vector environment (``envs``) are called one by one. Where no part has the
    method, nothing happens.

    Args:
        simulator: Simulator, single environment, or wrapper of either.
        progress: Progress of the run.
    """
    method = getattr(simulator, "begin_iteration", None)
    if callable(method):
        method(progress)
        return
    several = getattr(simulator, "envs", None)
    if isinstance(several, list | tuple):
        for each in several:  # pyright: ignore[reportUnknownVariableType]
            pass_progress(each, progress)
        return
    for name in _INNER:
        inner = getattr(simulator, name, None)
        if inner is not None and inner is not simulator:
            pass_progress(inner, progress)
            return
