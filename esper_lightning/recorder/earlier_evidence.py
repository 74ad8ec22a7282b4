"""Evidence of earlier runs in a rank's folder, which must not pass for evidence of this run."""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from esper_lightning.callbacks.lightning_internals import experiment_of
from esper_lightning.callbacks.tensorboard_internals import event_file
from esper_lightning.forensics.asides import KEPT_ASIDE, keep_latest, rename_aside
from esper_lightning.forensics.fingerprint import Fingerprint
from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.reading import read_file
from esper_lightning.forensics.room import trim_report

__all__ = ["EarlierEvidence"]

_MARK = ".of_an_earlier_run"
_KEPT_EVENT_FILES = 20  # each resumed run adds an event file of TensorBoard


class EarlierEvidence:
    """Evidence and event files of earlier runs in the same directory.

    Args:
        layout: Run directory.
        files: Folder of this rank, which exists.
        trains: Whether the run is a fit. Another stage that ends well leaves the evidence as it was
            before, and removes nothing.
        resumes: Whether the run continues the run before, whose death is the death of an attempt of
            this run, then.
    """

    def __init__(
        self, layout: RunLayout, files: RankLayout, *, trains: bool, resumes: bool = False
    ) -> None:
        self._layout, self._files, self._trains = layout, files, trains
        self._resumes = resumes
        self._process = ProcessRecord.read(files.process)
        self._renamed: dict[str, str] = {}  # new names of files

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Fingerprint of the run before in the directory; ``None`` where it is not known."""
        return None if self._process is None else self._process.fingerprint

    def rename(self) -> None:
        """Rename the evidence: ``crash.json`` becomes ``crash.json.<n>``, and so on.

        Raises:
            OSError: If the disk refuses a new name.
        """
        files = self._files
        for report in (files.crash, files.process):
            trim_report(report)  # its unused room may be all the room on the disk
        paths = [files.crash, files.stacks, files.bad_minibatch, files.memory, files.profile]
        paths.append(files.collectives)
        if not self._trains:
            paths.append(files.phases)
        for path in paths:
            self._note(path, rename_aside(path))
        self._note(files.evidence, _rename_folder(files.evidence))
        is_first = files.directory == self._layout.rank(0).directory
        if self._trains and is_first and not self._resumes:
            rename_aside(self._layout.crash_bundle)

    def keep_latest_events(self, trainer: Trainer) -> list[str]:
        """Remove the oldest event files of the runs in this directory.

        Only files whose names are stored with a run are removed: others may not be a run's.

        Args:
            trainer: Trainer of the run, whose loggers may have begun a file.

        Returns:
            Names of the remaining files, to be stored with this run.
        """
        names = () if self._process is None else self._process.event_files
        earlier = [self._layout.directory / name for name in names if _is_event_file(name)]
        if self._trains:
            keep_latest(earlier, _KEPT_EVENT_FILES)
        files = [*earlier, *_event_files(trainer, self._layout.directory)]
        return list(dict.fromkeys(path.name for path in files if path.exists()))

    def restore(self, process: ProcessRecord) -> None:
        """Restore the evidence after a stage that ended well and was no fit.

        Args:
            process: Record of this run's process, whose event files are stored with the
                restored record.

        Raises:
            OSError: If the disk takes no more.
        """
        for name, renamed in self._renamed.items():
            path, aside = self._files.directory / name, self._files.directory / renamed
            if path == self._files.phases or not path.exists():
                aside.rename(path)
                if path.is_dir():
                    (path / _MARK).unlink(missing_ok=True)
        if self._process is not None:
            events = process.event_files or self._process.event_files
            replace(self._process, event_files=events).write(self._files.process)

    def _note(self, path: Path, aside: Path | None) -> None:
        if aside is not None:
            self._renamed[path.name] = aside.name


def _rename_folder(path: Path) -> Path | None:
    """Rename a folder to ``<name>.<n>``, and remove all but the latest folders so renamed.

    A folder so renamed holds a mark with its name: a folder without the mark, or with that of
    another folder, is somebody else's.
    """
    if not path.is_dir():
        return None
    numbers = [each.suffix[1:] for each in path.parent.glob(f"{path.name}.*")]
    taken = sorted(int(number) for number in numbers if number.isdecimal())
    aside = path.with_name(f"{path.name}.{max(taken, default=0) + 1}")
    path.rename(aside)
    with contextlib.suppress(OSError):
        (aside / _MARK).write_text(aside.name)
    asides = (path.with_name(f"{path.name}.{number}") for number in taken)
    for folder in [each for each in asides if _is_marked(each)][: 1 - KEPT_ASIDE]:
        shutil.rmtree(folder, ignore_errors=True)
    return aside


def _is_marked(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return read_file(folder / _MARK) == folder.name.encode()
    return False


def _is_event_file(name: str) -> bool:
    return name.startswith("events.out.tfevents.") and "/" not in name


def _event_files(trainer: Trainer, directory: Path) -> list[Path]:
    """Files in a directory that the TensorBoard loggers of a run have begun."""
    files: list[Path] = []
    for logger in trainer.loggers:
        experiment = experiment_of(logger)
        if isinstance(logger, TensorBoardLogger) and experiment is not None:
            with contextlib.suppress(AttributeError):  # an earlier fit has closed it
                path = Path(event_file(experiment)).absolute()
                files += [path] if path.parent == directory else []
    return files
