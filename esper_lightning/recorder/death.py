"""The description of a death in a report: a field whose value cannot be read costs no other."""
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
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from esper_lightning.callbacks.lightning_internals import known_results
from esper_lightning.core.errors import NonFiniteError
from esper_lightning.forensics.memory import measure_memory
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.report import (
    CrashReport,
    ErrorReport,
    MemoryReport,
    NonFiniteReport,
    PeerReport,
)

__all__ = ["Death", "describe", "describe_error", "exit_status", "in_words"]


@dataclass(frozen=True, kw_only=True)
class Death:
    """The death of a run, as far as the process itself knows."""

    cause: str  # one of the values that CrashReport.cause lists
    error: BaseException | None = None
    signal: str | None = None
    peer: tuple[int, str] | None = None

    @property
    def reason(self) -> str:
        """Reason of the death, in one line."""
        if self.error is not None:
            return in_words(self.error)
        if self.peer is not None:
            return f"rank {self.peer[0]}: {self.peer[1]}"
        return self.signal or self.cause


def describe(report: CrashReport, death: Death, trainer: Trainer, ring: PhaseRing) -> CrashReport:
    """The report with all that is known of a death.

    Nothing is computed: a computation could be a collective, or fail. ``failed_fields`` of the
    report names the fields whose value could not be read.

    Args:
        report: Report with the fields that are known without the Trainer.
        death: Death that ends the run.
        trainer: Trainer of the run.
        ring: Phase ring of the run.
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
        "peer": lambda: None if peer is None else PeerReport(rank=peer[0], reason=peer[1]),
        "rank": lambda: trainer.global_rank,
        "world_size": lambda: trainer.world_size,
        "stage": lambda: str(trainer.state.fn.value) if trainer.state.fn else None,
        "global_step": lambda: trainer.global_step,
        "epoch": lambda: trainer.current_epoch,
        "iteration": lambda: ring.iteration,
        "env_steps": lambda: _counter(module, "env_steps"),
        "gradient_steps": lambda: _counter(module, "gradient_steps"),
        "phases": lambda: tuple(ring.open_names),
        "memory": lambda: MemoryReport(**m._asdict()) if (m := measure_memory()) else None,
        "metrics": lambda: _known_metrics(trainer),
        "module_class": lambda: type(module).__name__,
        "versions": lambda: {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": version("lightning"),
        },
    }
    failed: dict[str, str] = {}
    for name, read in fields.items():
        try:
            report = replace(report, **{name: read()})
        except Exception as problem:
            failed[name] = in_words(problem)
    return replace(report, failed_fields=failed)


def _counter(module: object, name: str) -> int | None:
    """A counter of steps, which only some modules have; ``None`` without it."""
    try:
        value = getattr(module, name, None)
    except Exception:
        return None
    return value if isinstance(value, int) else None


def describe_error(error: BaseException) -> ErrorReport:
    """Type, message and traceback of an error, and where a value is not finite, if that was it."""
    non_finite = None
    try:
        lines = "".join(traceback.format_exception(error, limit=-30)).splitlines()
    except Exception as problem:
        lines = [f"(the traceback cannot be shown: {type(problem).__name__})"]
    if isinstance(error, NonFiniteError):
        non_finite = NonFiniteReport(
            phase=error.phase,
            tensors=tuple(error.tensors),
            environments=tuple(error.environments),
        )
    return ErrorReport(
        type=type(error).__name__,
        message=_message(error),
        traceback=tuple(lines),
        non_finite=non_finite,
    )


def exit_status(error: BaseException | None) -> int | None:
    """Exit status of the process if the error is not caught; ``None`` without an error."""
    if error is None:
        return None
    if isinstance(error, SystemExit):
        code = error.code
        return code if isinstance(code, int) else int(code is not None)
    return 1


def in_words(error: BaseException) -> str:
    """Type and message of an error; never raises, even if the error's ``__str__`` does."""
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
