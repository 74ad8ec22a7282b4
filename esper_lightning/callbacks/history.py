"""The history of a run.

One JSON line for each finished iteration, on disk before the next begins.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from esper_lightning.callbacks.run_directory import agree_on_run_directory, run_directory
from esper_lightning.core.validate import check_arguments
from esper_lightning.forensics.files import (
    JsonLines,
    encode_rows,
    read_json_lines,
    write_atomically,
)
from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.forensics.report import set_aside

__all__ = ["History", "finished_iterations"]

_log = logging.getLogger(__name__)
_KEPT_ROWS = 100_000  # of each file, while the disk takes none


def finished_iterations(trainer: Trainer, module: LightningModule) -> int:
    """The module's own count, where it keeps one; else the Trainer's steps."""
    own = getattr(module, "iteration", None)
    return own if isinstance(own, int) and not isinstance(own, bool) else trainer.global_step


class History(Callback):
    """Append ``rank<k>/history.jsonl`` in the run directory, and ``evaluations.jsonl`` beside it.

    Works with any LightningModule. A row is what ``training_step`` returned under ``"row"``, if
    that is a mapping of plain values; without one it is the step's number and every metric that the
    module logged. A disk that takes no rows ends no training: there is a warning, and they are kept
    and written when it does. When a run is
    resumed, rows of iterations that it will repeat are set aside as ``history.jsonl.<n>``, so that
    the history never holds an iteration twice.

    Args:
        dirpath: Run directory; ``None`` for where the Trainer's first logger writes.
    """

    @check_arguments
    def __init__(self, dirpath: str | Path | None = None) -> None:
        self._dirpath = dirpath
        self._files: list[_Rows] = []
        self._layout: RankLayout | None = None

    @property
    def path(self) -> Path | None:
        """The history of this rank; ``None`` before a fit, and under ``fast_dev_run``."""
        return None if self._layout is None else self._layout.history

    @property
    def waiting(self) -> int:
        """Rows that the disk has not taken."""
        return len(self._files[0].waiting) if self._files else 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where the first rank writes."""
        agree_on_run_directory(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the files; whatever lies beyond the checkpoint is set aside."""
        self._close()
        directory = None if trainer.fast_dev_run else self._dirpath or run_directory(trainer)
        if directory is None:
            return
        self._layout = RunLayout(Path(directory).absolute()).rank(trainer.global_rank)
        done = finished_iterations(trainer, pl_module)
        for path in (self._layout.history, self._layout.evaluations):
            self._files.append(_Rows(path, done))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Append the row of the iteration."""
        if self._files:
            row = _given_row(outputs)
            given = _numbers(trainer) if row is None else row
            self._files[0].append({"iteration": trainer.global_step, **given})

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
            done = finished_iterations(trainer, pl_module)
            self._files[1].append({"iteration": done, **counters, **evaluated})

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the files."""
        self._close()

    def _close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


class _Rows:
    """A file of rows; what the disk does not take now is kept for later.

    Args:
        path: Of the file.
        done: Rows of later iterations, which a resumed run will repeat, are set aside.
    """

    def __init__(self, path: Path, done: int) -> None:
        self._path, self._done = path, done
        self._file: JsonLines | None = None
        self.waiting: deque[Mapping[str, Any]] = deque()
        self._failed = False
        self._write()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        if len(self.waiting) == _KEPT_ROWS:
            _log.error("%s: a row is lost: %d rows wait already.", self._path, _KEPT_ROWS)
        else:
            self.waiting.append(row)
        self._write()

    def close(self) -> None:
        """Write what can be written, and say what is lost."""
        self._write()
        if self.waiting:
            _log.error("%s: %d rows are lost: the disk took none.", self._path, len(self.waiting))
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        try:
            if self._file is None:
                _set_aside_after(self._path, self._done)
                self._file = JsonLines(self._path)
            while self.waiting:
                self._file.append(self.waiting[0])
                self.waiting.popleft()
        except OSError as error:
            if not self._failed:
                text = "%s takes no rows: %s. Training goes on; rows are kept to be written later."
                _log.warning(text, self._path, error)
            self._failed = True
        else:
            if self._failed:
                _log.warning("%s takes rows again: none is lost.", self._path)
            self._failed = False


def _given_row(outputs: Any) -> Mapping[str, Any] | None:
    """What the module itself wants in the history; ``None`` where that is nothing for JSON."""
    row = cast(Mapping[Any, Any], outputs).get("row") if isinstance(outputs, Mapping) else None
    if not isinstance(row, Mapping) or not row:
        return None
    pairs = cast(Mapping[Any, Any], row).items()
    plain = all(
        isinstance(k, str) and (v is None or isinstance(v, bool | int | float | str))
        for k, v in pairs
    )
    return cast(Mapping[str, Any], row) if plain else None


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
    try:
        rows = read_json_lines(path)
    except ValueError as error:
        _log.warning("It is set aside whole: %s", error)
        set_aside(path)
        return
    kept = [row for row in rows if row.get("iteration", 0) <= iteration]
    content = encode_rows(kept)
    if content == path.read_bytes():
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    aside.write_bytes(path.read_bytes())
    write_atomically(path, content)
