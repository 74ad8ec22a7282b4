"""Files of loggers that no error and no kill leaves in pieces: events, hyperparameters, tables."""
# Loggers are objects of other libraries.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import os
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

from esper_lightning.forensics.files import Appender, Backlog, replacing

__all__ = ["EventFile", "whole_hyperparams", "whole_table"]


class EventFile:
    """Replacement of TensorBoard's own file, below its writer of records."""

    def __init__(self, path: Path, said: set[str]) -> None:
        self._file, self._lock = Appender(path), threading.Lock()
        self.backlog = Backlog[bytes](str(path), self._file.append, said=said)
        self.closed = False

    def write(self, record: bytes) -> None:
        """Append a record, or store it until the disk takes it."""
        with self._lock:
            self.backlog.put(record)

    def flush(self) -> None:
        """Append the records that wait."""
        with self._lock:
            self.backlog.offer()

    def close(self) -> None:
        """Append the waiting records that the disk takes, and report how many are lost."""
        with self._lock:
            self.backlog.close()
            self._file.close()
            self.closed = True


@contextlib.contextmanager
def whole_hyperparams(owner: Any, folder: str) -> Generator[None]:
    """Let ``owner`` write its ``hparams.yaml`` under another name, and rename the whole file."""
    name = owner.NAME_HPARAMS_FILE
    if "://" in str(folder) or not Path(folder).is_dir():
        yield
        return
    with replacing(Path(folder, name)) as temporary:
        owner.NAME_HPARAMS_FILE = temporary.name
        try:
            yield
        finally:
            del owner.NAME_HPARAMS_FILE


@contextlib.contextmanager
def whole_table(experiment: Any) -> Generator[None]:
    """Let the CSV logger write a longer head into a copy: without room, no row is lost."""
    if "://" in experiment.metrics_file_path:
        yield
        return
    path, keys = Path(experiment.metrics_file_path), list(experiment.metrics_keys)
    size = path.stat().st_size if path.exists() else None
    has_new_head = any(not set(keys).issuperset(row) for row in experiment.metrics)
    try:
        if size is None or not has_new_head:
            yield
            return
        with replacing(path) as temporary:
            temporary.write_bytes(path.read_bytes())
            experiment.metrics_file_path = str(temporary)
            yield
    except BaseException:
        experiment.metrics_keys = keys
        if size is None:
            path.unlink(missing_ok=True)
        elif path.stat().st_size > size:
            os.truncate(path, size)
        raise
    finally:
        experiment.metrics_file_path = str(path)
