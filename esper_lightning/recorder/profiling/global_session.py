"""Sessions of a torch profiler that any thread can stop."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from typing import Any

import torch
from lightning.pytorch.profilers import PyTorchProfiler
from torch.profiler import ProfilerAction

from esper_lightning.callbacks.profiler_internals import profiler_settings, records_nvtx

__all__ = ["global_session", "make_global"]


def global_session() -> Any:
    """A configuration under which any thread can stop a recording; ``None`` on an older torch."""
    try:
        return torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # pyright: ignore[reportPrivateUsage]
    except TypeError:
        return None


def make_global(profiler: PyTorchProfiler) -> bool:
    """Let any thread stop the sessions of a profiler, as the watchdog does at a hang in C.

    Args:
        profiler: Profiler of Lightning; a session that it has opened already is replaced.

    Returns:
        Whether the profiler's settings were changed.
    """
    settings = profiler_settings(profiler)
    if records_nvtx(profiler) or settings.get("experimental_config") is not None:
        return False
    config = global_session()
    if config is None:
        return False
    settings["experimental_config"] = config
    profile = profiler.profiler
    if isinstance(profile, torch.profiler.profile):  # the Trainer's first hooks have opened it
        ready, profile.on_trace_ready = profile.on_trace_ready, None
        running = profile.current_action != ProfilerAction.NONE
        if running:
            profile.stop()
        profile.experimental_config, profile.profiler = config, None
        if running:
            profile.start()
        profile.on_trace_ready = ready
    return True
