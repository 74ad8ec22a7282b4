"""The history of a run.

One JSON line for each finished iteration, on disk before the next begins.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from esper_lightning.callbacks.run_directory import run_directory
from esper_lightning.forensics.files import (
    JsonLines,
    encode_rows,
    read_json_lines,
    write_atomically,
)
from esper_lightning.forensics.layout import RankLayout, RunLayout

__all__ = ["History"]


class History(Callback):
    """Append ``rank<k>/history.jsonl`` in the run directory, and ``evaluations.jsonl`` beside it.

    Works with any LightningModule. A row is what ``training_step`` returned under ``"row"``;
    without one it is the step's number and every metric that the module logged. When a run is
    resumed, rows of iterations that it will repeat are set aside as ``history.jsonl.<n>``, so that
    the history never holds an iteration twice.

    Args:
        dirpath: Run directory; ``None`` for where the Trainer's first logger writes.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        self._dirpath = dirpath
        self._files: list[JsonLines] = []
        self._layout: RankLayout | None = None

    @property
    def path(self) -> Path | None:
        """The history of this rank; ``None`` before a fit, and under ``fast_dev_run``."""
        return None if self._layout is None else self._layout.history

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the files; whatever lies beyond the checkpoint is set aside."""
        self._close()
        directory = None if trainer.fast_dev_run else self._dirpath or run_directory(trainer)
        if directory is None:
            return
        self._layout = RunLayout(Path(directory)).rank(trainer.global_rank)
        done = getattr(pl_module, "iteration", trainer.global_step)
        for path in (self._layout.history, self._layout.evaluations):
            _set_aside_after(path, done)
            self._files.append(JsonLines(path))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Append the row of the iteration."""
        if self._files:
            given = (
                cast(Mapping[str, Any], outputs).get("row")
                if isinstance(outputs, Mapping)
                else None
            )
            self._files[0].append(given or {"iteration": trainer.global_step, **_numbers(trainer)})

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append what was evaluated while training."""
        if self._files and not trainer.sanity_checking:
            counters = {
                name: getattr(pl_module, name)
                for name in ("env_steps",)
                if hasattr(pl_module, name)
            }
            evaluated = {
                k: v for k, v in _numbers(trainer).items() if k.startswith(("eval/", "val"))
            }
            done = getattr(pl_module, "iteration", trainer.global_step)
            self._files[1].append({"iteration": done, **counters, **evaluated})

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the files."""
        self._close()

    def _close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


def _numbers(trainer: Trainer) -> dict[str, float]:
    """All metrics in one copy from each device: it is waited for once, not for each of them."""
    metrics = {k: v for k, v in trainer.callback_metrics.items() if v.numel() == 1}
    numbers: dict[str, float] = dict.fromkeys(metrics, 0.0)
    for device in {value.device for value in metrics.values()}:
        there = {name: v.detach() for name, v in metrics.items() if v.device == device}
        copied = torch.cat([value.reshape(1) for value in there.values()]).tolist()
        numbers |= zip(there, map(float, copied), strict=True)
    return numbers


def _set_aside_after(path: Path, iteration: int) -> None:
    """Keep the rows up to ``iteration``.

    If that is not all, keep the whole file under another name.
    """
    if not path.exists():
        return
    rows = read_json_lines(path)
    kept = [row for row in rows if row["iteration"] <= iteration]
    content = encode_rows(kept)
    if content == path.read_bytes():
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    aside.write_bytes(path.read_bytes())
    write_atomically(path, content)
