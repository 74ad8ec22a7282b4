"""What a report tells of a death: each field on its own, so that none takes another with it."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
import os
import platform
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from esper_lightning.callbacks.lightning_internals import known_results
from esper_lightning.core.errors import NonFiniteError
from esper_lightning.forensics.memory import measure_memory
from esper_lightning.forensics.phases import PhaseRing

__all__ = ["Death", "describe", "describe_error", "exit_status", "in_words"]

_COUNTERS = ("env_steps", "gradient_steps")


@dataclass(frozen=True, kw_only=True)
class Death:
    """What ends the run, as far as the process itself can tell."""

    cause: str  # one of those in forensics.report
    error: BaseException | None = None
    signal: str | None = None
    peer: tuple[int, str] | None = None

    @property
    def reason(self) -> str:
        """In one line."""
        if self.error is not None:
            return in_words(self.error)
        if self.peer is not None:
            return f"rank {self.peer[0]}: {self.peer[1]}"
        return self.signal or self.cause


def describe(death: Death, trainer: Trainer, ring: PhaseRing) -> dict[str, Any]:
    """The report's fields on the death; one that cannot be told is left out, and listed.

    Nothing is computed: that could be a collective, or fail.
    """
    error, peer, module = death.error, death.peer, trainer.lightning_module
    fields: dict[str, Callable[[], Any]] = {
        "cause": lambda: death.cause,
        "time_s": time.time,
        "pid": os.getpid,
        "host": socket.gethostname,
        "error": lambda: None if error is None else describe_error(error),
        "signal": lambda: death.signal or getattr(error, "signal", None),
        "exit_status": lambda: exit_status(error),
        "peer": lambda: None if peer is None else {"rank": peer[0], "reason": peer[1]},
        "rank": lambda: trainer.global_rank,
        "world_size": lambda: trainer.world_size,
        "stage": lambda: str(trainer.state.fn.value) if trainer.state.fn else None,
        "global_step": lambda: trainer.global_step,
        "epoch": lambda: trainer.current_epoch,
        "iteration": lambda: ring.iteration,
        "phases": lambda: ring.open_names,
        "memory": lambda: memory._asdict() if (memory := measure_memory()) else None,
        "metrics": lambda: _known_metrics(trainer),
        "module": lambda: type(module).__name__,
        "versions": lambda: {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": version("lightning"),
        },
    }
    told: dict[str, Any] = {}
    untold: dict[str, str] = {}
    for name, read in fields.items():
        try:
            told[name] = read()
        except Exception as problem:
            untold[name] = in_words(problem)
    for name in _COUNTERS:
        try:
            value = getattr(module, name, None)
        except Exception:
            continue
        if isinstance(value, int):
            told[name] = value
    return {**told, "untold": untold} if untold else told


def describe_error(error: BaseException) -> dict[str, Any]:
    """Type, message and traceback; of a NaN, where it is."""
    described: dict[str, Any] = {"type": type(error).__name__, "message": _message(error)}
    try:
        lines = "".join(traceback.format_exception(error, limit=-30)).splitlines()
    except Exception as problem:
        lines = [f"(the traceback cannot be shown: {type(problem).__name__})"]
    if isinstance(error, NonFiniteError):
        described["non_finite"] = {
            "phase": error.phase,
            "tensors": error.tensors,
            "environments": error.environments,
        }
    return {**described, "traceback": lines}


def exit_status(error: BaseException | None) -> int | None:
    """Of the process, if nobody catches the error."""
    if error is None:
        return None
    if isinstance(error, SystemExit):
        code = error.code
        return code if isinstance(code, int) else int(code is not None)
    return 1


def in_words(error: BaseException) -> str:
    """Type and message, whatever the user's own class makes of ``str``."""
    return f"{type(error).__name__}: {_message(error)}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as problem:
        return f"(its message cannot be shown: {type(problem).__name__})"


def _known_metrics(trainer: Trainer) -> dict[str, float | str]:
    """Metrics whose value is known on the host already."""
    values = {
        name: float(value)
        for name, value in known_results(trainer).items()
        if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu"
    }  # no synchronisation with a device
    return {k: v if math.isfinite(v) else repr(v) for k, v in values.items()}
