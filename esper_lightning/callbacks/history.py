"""The history of a run: one JSON line for each finished iteration.

The line is on disk before the next iteration begins.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from esper_lightning.callbacks.directory_choice import WritesRun
from esper_lightning.callbacks.loop_internals import finished_batches, metrics_of_step
from esper_lightning.callbacks.run_directory import (
    close_run_directory,
    open_run_directory,
    run_directory,
)
from esper_lightning.core.errors import check_arguments
from esper_lightning.forensics.asides import rename_aside, write_aside
from esper_lightning.forensics.files import (
    Backlog,
    JsonLines,
    Row,
    encode_rows,
    read_json_lines,
    write_atomically,
)
from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.forensics.reading import whole_number

__all__ = ["History", "counts_iterations", "finished_iterations"]

_log = logging.getLogger(__name__)


def finished_iterations(trainer: Trainer, module: LightningModule) -> int:
    """Number of finished iterations: the module's own count if it has one, else training batches.

    Batches are counted over all epochs, whether or not an optimizer has made a step.
    """
    return cast(Any, module).iteration if counts_iterations(module) else finished_batches(trainer)


def counts_iterations(module: LightningModule) -> bool:
    """Whether ``module.iteration`` is the number of finished iterations, as that of PPO is.

    Such a module has ``counts_iterations = True``: the attribute may mean anything else in another.
    """
    return getattr(module, "counts_iterations", False) is True


class History(WritesRun):
    """Append to ``rank<k>/history.jsonl`` in the run directory, and ``evaluations.jsonl`` beside.

    Works with any LightningModule. A row is what ``training_step`` returned under ``"row"``, if
    that is a mapping of plain values; otherwise the row holds every metric that the module logged.
    Its number is ``finished_iterations``. The row is written before other callbacks are called. A
    disk that takes no rows does not end training: there is a warning, and the rows are written once
    the disk takes them. When a run is resumed, the rows of iterations that the run will repeat are
    moved to ``history.jsonl.<n>``, so that the history never holds an iteration twice; the latest
    ten such files are retained.

    Args:
        dirpath: Run directory; ``None`` for that of the Trainer (``callbacks.run_directory``).

    Attributes:
        only_of_step: Whether a row without ``"row"`` holds only what its own step has logged, and
            no values of earlier epochs and of validations. So it is in replays.
    """

    @check_arguments
    def __init__(self, dirpath: str | Path | None = None) -> None:
        super().__init__(dirpath)
        self._files: list[_Rows] = []
        self._layout: RankLayout | None = None
        self._is_displaced, self.only_of_step = False, False

    @property
    def path(self) -> Path | None:
        """The history of this rank; ``None`` before a fit, and under ``fast_dev_run``."""
        return None if self._layout is None else self._layout.history

    @property
    def waiting(self) -> int:
        """Number of history rows that the disk has not taken yet."""
        return self._files[0].waiting if self._files else 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Claim the run directory, and write rows before callbacks that may fail are called."""
        open_run_directory(trainer, self)
        others = [each for each in trainer.callbacks if each is not self]
        behind = (i for i, each in enumerate(others) if not isinstance(each, WritesRun))
        place = next(behind, len(others))
        if self in trainer.callbacks[place + 1 :]:
            # The list is new: Lightning is iterating over the old list.
            trainer.callbacks = [*others[:place], self, *others[place:]]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the files of an earlier fit."""
        self._close()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the files; rows beyond the checkpoint are moved to files of another name.

        A run whose start is refused, the last thing in ``on_train_start``, has moved nothing.
        """
        directory = None if self._files else run_directory(trainer)
        if directory is None:
            return
        self._layout, self._is_displaced = RunLayout(directory).rank(trainer.global_rank), False
        done = finished_iterations(trainer, pl_module)
        for path in (self._layout.history, self._layout.evaluations):
            self._files.append(_Rows(path, done))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Append the row of the finished iteration to the history."""
        if self._files:
            row = _given_row(outputs)
            if row is None:
                row = _numbers(
                    metrics_of_step(trainer) if self.only_of_step else trainer.callback_metrics
                )
            done = {"iteration": finished_iterations(trainer, pl_module)}
            self._files[0].append(done | {**row} | done)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Append the metrics of an evaluation during training."""
        if self._files and not trainer.sanity_checking:
            counters = {
                name: getattr(pl_module, name)
                for name in ("env_steps",)
                if hasattr(pl_module, name)
            }
            numbers = _numbers(trainer.callback_metrics)
            evaluated = {k: v for k, v in numbers.items() if k.startswith(("eval/", "val"))}
            done = finished_iterations(trainer, pl_module)
            self._files[1].append({"iteration": done, **counters, **evaluated})

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn once if the history was moved or deleted under the run."""
        if self._files and not self._is_displaced and self._files[0].was_displaced():
            self._is_displaced = True
            text = (
                "%s was moved or deleted during the run: its rows follow the moved file, or are "
                "lost, and checkpoints go where the run directory was."
            )
            _log.warning(text, self.path)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the files, and release the run directory."""
        self._close()
        close_run_directory(trainer, self)

    def _close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


class _Rows:
    """A file of rows; rows that the disk does not take now are written later.

    Args:
        path: Path of the file.
        done: Number of finished iterations. Rows of later iterations, which a resumed run will
            repeat, are moved to a file of another name.
    """

    def __init__(self, path: Path, done: int) -> None:
        self._path, self._done = path, done
        self._file: JsonLines | None = None
        self._identity: os.stat_result | None = None  # of the file when it was opened
        self._backlog = Backlog[Mapping[str, Any]](str(path), self._take, prepare=self._open)
        self._backlog.offer()

    @property
    def waiting(self) -> int:
        """Number of rows that the disk has not taken yet."""
        return len(self._backlog)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row, or store it until the disk takes it."""
        self._backlog.put(row)

    def was_displaced(self) -> bool:
        """Whether the open file is no longer at its path."""
        if self._identity is None:
            return False
        try:
            return not os.path.samestat(self._identity, self._path.stat())
        except FileNotFoundError:
            return True
        except OSError:  # a file system that is out of reach for a while
            return False

    def close(self) -> None:
        """Write the waiting rows that can be written, and report how many are lost."""
        self._backlog.close()
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        if self._file is None:
            _move_rows_after(self._path, self._done)
            self._file = JsonLines(self._path)
            self._identity = self._path.stat()

    def _take(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.append(row)


def _given_row(outputs: Any) -> Mapping[str, Any] | None:
    """The row that the module provides; ``None`` without a row that JSON can hold."""
    row = cast(Mapping[Any, Any], outputs).get("row") if isinstance(outputs, Mapping) else None
    if not isinstance(row, Mapping) or not row:
        return None
    pairs = cast(Mapping[Any, Any], row).items()
    plain = all(
        isinstance(k, str) and (v is None or isinstance(v, bool | int | float | str))
        for k, v in pairs
    )
    return cast(Mapping[str, Any], row) if plain else None


def _numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """All scalar metrics, in one copy from each device: one wait, not one for each metric."""
    metrics = {k: v for k, v in values.items() if v.numel() == 1}
    numbers: dict[str, float] = dict.fromkeys(metrics, 0.0)
    for device in {value.device for value in metrics.values()}:
        there = {name: v.detach() for name, v in metrics.items() if v.device == device}
        copied = torch.cat([value.reshape(1) for value in there.values()]).tolist()
        numbers |= zip(there, map(float, copied), strict=True)
    return numbers


def _move_rows_after(path: Path, iteration: int) -> None:
    """Move the rows after ``iteration`` to a file of another name; earlier rows stay.

    Rows without a number, which only damage can make, are moved with them.
    """
    if not path.exists():
        return
    try:
        rows = read_json_lines(path)
    except ValueError as error:
        _log.warning("The whole file is renamed: %s", error)
        rename_aside(path)
        return
    earlier, moved, unnumbered = list[Row](), list[Row](), 0
    for row in rows:
        number = whole_number(row.get("iteration"))
        unnumbered += number is None
        stays = number is not None and number <= iteration
        (earlier if stays else moved).append(row)
    if moved:
        aside = write_aside(path, encode_rows(moved))
        if unnumbered:
            text = "%s: %d rows have no number of an iteration, and are moved to %s."
            _log.warning(text, path, unnumbered, aside.name)
    content = encode_rows(earlier)
    if content != path.read_bytes():
        write_atomically(path, content)
