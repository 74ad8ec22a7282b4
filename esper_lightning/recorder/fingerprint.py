"""The fingerprint of a run, with what torch and the Trainer know (``forensics.fingerprint``)."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportPrivateUsage=false

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer

from esper_lightning.forensics.fingerprint import (
    Fingerprint,
    fingerprint_of_process,
    with_config,
)
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import read_file
from esper_lightning.recorder.attempt import attempt
from esper_lightning.recorder.replay_watch import ReplayWatch

__all__ = ["FINGERPRINT_KEY", "take_fingerprint"]

FINGERPRINT_KEY = "fingerprint"
"""Key of the fingerprint in a checkpoint."""


def take_fingerprint(trainer: Trainer, layout: RunLayout) -> Fingerprint:
    """The fingerprint of a run that begins; takes some milliseconds.

    Args:
        trainer: Trainer of the run, whose device is in use already.
        layout: Run directory, which has its ``config.yaml`` if it will ever have one.
    """
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    fingerprint = fingerprint_of_process(None if main is None else Path(main))
    threads = {
        "torch threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
    }
    on_cuda = trainer.strategy.root_device.type == "cuda"
    devices = attempt(_cuda, what=None).result if on_cuda else None
    fingerprint = replace(
        fingerprint,
        threads={**fingerprint.threads, **threads},
        hardware={
            **fingerprint.hardware,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            **(devices or {}),
        },
    )
    config = attempt(lambda: _config(trainer, layout), what=None).result
    return fingerprint if config is None else with_config(fingerprint, config)


def _config(trainer: Trainer, layout: RunLayout) -> bytes | None:
    """The config of a run as bytes; ``None`` for a module without hyper-parameters, and a replay.

    A replay has the settings of the run that died, and callbacks of its own.
    """
    callbacks: list[Any] = trainer.callbacks
    if any(isinstance(each, ReplayWatch) for each in callbacks):
        return None
    if trainer.global_rank == 0 and layout.config.is_file():
        return read_file(layout.config)
    settings: Any = getattr(trainer.lightning_module, "hparams", None)
    return json.dumps(_plain(settings), sort_keys=True).encode() if settings else None


def _plain(value: Any) -> Any:
    """The plain data of hyper-parameters; only the type of anything else, which may be large."""
    if isinstance(value, Mapping):
        entries = cast(Mapping[Any, Any], value).items()
        return {str(key): _plain(entry) for key, entry in entries}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in cast(list[Any], value)]
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else type(value).__qualname__


def _cuda() -> dict[str, str]:
    """Names of devices, and versions of driver and libraries, of a process that uses CUDA."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {"gpu": ", ".join(names), "cuda": str(torch.version.cuda)}
    found["driver"] = str(cast(Any, torch._C)._cuda_getDriverVersion())
    found["cudnn"] = str(torch.backends.cudnn.version())
    if torch.distributed.is_nccl_available():
        version: Any = torch.cuda.nccl.version()
        found["nccl"] = ".".join(map(str, version))
    return found
