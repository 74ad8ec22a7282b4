"""Private attributes of Lightning's profilers, and why this package needs them.

Lightning may rename these attributes in any release. The file is beside
``lightning_internals.py``, for the same reason.
"""
# Lightning sets many attributes of its objects where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from lightning.pytorch.profilers import Profiler, PyTorchProfiler
from torch.profiler import ProfilerAction

__all__ = [
    "forget_schedule",
    "profiler_settings",
    "record_no_module_names",
    "records_nvtx",
    "setup_profiler_again",
    "take_open_spans",
    "take_parent_profiler",
    "take_report_file",
]


def setup_profiler_again(profiler: Profiler, directory: Path) -> None:
    """Make a profiler write into another directory than the one that the Trainer gave it.

    ``_stage`` and ``_local_rank`` are the arguments of the Trainer's own call of ``setup``.
    """
    profiler.setup(cast(Any, profiler._stage), profiler._local_rank, str(directory))


def take_report_file(profiler: Profiler) -> TextIO | None:
    """Remove the open file of a profiler's text from the profiler, and return it.

    ``_output_file`` and ``_write_stream``: where the disk is full, ``describe`` raises, and
    ``__del__`` would raise again.
    """
    file: TextIO | None = getattr(profiler, "_output_file", None)
    if file is not None:
        profiler._output_file = profiler._write_stream = None
    return file


def profiler_settings(profiler: PyTorchProfiler) -> dict[str, Any]:
    """Arguments with which a profiler makes its ``torch.profiler.profile``; may be changed.

    ``_profiler_kwargs``: the constructor fills them, and the user's profiler is constructed before
    a recorder sees it.
    """
    return profiler._profiler_kwargs


def records_nvtx(profiler: PyTorchProfiler) -> bool:
    """Whether a profiler emits NVTX ranges instead of recording (``_emit_nvtx``)."""
    return profiler._emit_nvtx


def record_no_module_names(profiler: PyTorchProfiler) -> bool:
    """Make a profiler add no hooks to the modules; returns whether it would have added them.

    ``_record_module_names``: an argument of the constructor, which Lightning sets by default.
    """
    records = profiler._record_module_names
    profiler._record_module_names = False
    return bool(records)


def take_open_spans(profiler: PyTorchProfiler) -> list[AbstractContextManager[Any]]:
    """Remove the open spans from a profiler, and its hooks from the module.

    ``_recording_map`` (of actions) and ``_register`` (of modules): the profiler's own ``teardown``
    would fail on the first span that cannot be closed.

    Returns:
        The open spans, in the order in which they must be closed.
    """
    register: Any = profiler._register
    profiler._register = None
    of_modules = reversed(list(register._records.values())) if register else ()
    spans: list[Any] = [each for each in of_modules if getattr(each, "record", None) is not None]
    spans += reversed(profiler._recording_map.values())
    profiler._recording_map.clear()
    if register is not None:
        register.__exit__(None, None, None)
    return spans


def take_parent_profiler(profiler: PyTorchProfiler) -> AbstractContextManager[Any] | None:
    """Remove CUDA's profiler, within which ``emit_nvtx`` runs, and return it to be closed.

    ``_parent_profiler``: only ``teardown`` would close it otherwise.
    """
    parent: Any = profiler._parent_profiler
    profiler._parent_profiler = None
    return parent


def forget_schedule(
    profiler: PyTorchProfiler, profile: "torch.profiler.profile | None" = None
) -> None:
    """Make a profiler begin its schedule anew when it is used again.

    ``_schedule`` of Lightning, and ``_prev_schedule_action`` of torch's session.

    Args:
        profiler: Profiler that was stopped.
        profile: Session of the profiler, which records nothing more; ``None`` without one.
    """
    if profile is not None:
        profile.current_action = profile._prev_schedule_action = ProfilerAction.NONE
    if profiler._schedule is not None:
        profiler._schedule.reset()
