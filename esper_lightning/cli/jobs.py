"""Runs of ``esper fit`` in processes of their own, which are skipped or resumed when asked again.

``scripts/ab.py`` and ``esper sweep`` start their runs here. This file imports no torch.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from esper_lightning.cli import ENDS_WITH
from esper_lightning.core.errors import require_local
from esper_lightning.forensics.files import write_atomically
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.reading import printable, read_file

__all__ = [
    "Ended",
    "Job",
    "command_of",
    "config_text",
    "ends_with_this_process",
    "fit_job",
    "start_esper",
]

_ESPER = [sys.executable, "-m", "esper_lightning.cli.main"]
_RECORD = "ab.txt"  # in a run directory: the settings with which the run was started
_LOG = "fit.log"
_SHOWN_LINES = 15
_LONGEST_END = 1 << 16  # bytes at the end of a log from which the shown lines are read
_LOOK_S = 0.2  # between two looks at a run that may be ended


class Ended(NamedTuple):
    """How a run ended.

    Attributes:
        status: Exit status of ``esper fit``; 0 as well for a run that had finished before.
        was_stopped: Whether the run was ended from here.
        says: The last lines of its output.
    """

    status: int
    was_stopped: bool
    says: list[str]


class Job(NamedTuple):
    """One run: its directory, its words after ``esper``, and what it is started with."""

    run: Path
    words: list[str]
    started_with: str

    @property
    def is_finished(self) -> bool:
        """Whether the run ended by itself."""
        process = ProcessRecord.read(RunLayout(self.run).rank(0).process)
        return process is not None and process.state == "finished"

    @property
    def has_begun(self) -> bool:
        """Whether the run started training: its settings were accepted and written."""
        return RunLayout(self.run).config.is_file()

    def refuse_other_settings(self) -> None:
        """Refuse a run directory with a run of other settings.

        Raises:
            ValueError: If the run began with other settings; the error names the file.
        """
        record = self.run / _RECORD
        if not self.has_begun or not record.exists():
            return
        try:
            same = read_file(record) == self.started_with.encode()
        except ValueError:
            same = False
        if not same:
            raise ValueError(f"{record} must be of the same settings. Choose another --output.")

    def execute(self, *, threads: int, stops: Callable[[], bool] | None = None) -> Ended:
        """Run the command to its end; its output is appended to ``fit.log`` in its directory.

        Args:
            threads: Threads of the run, unless ``OMP_NUM_THREADS`` is set.
            stops: Function that says, asked a few times a second, whether to end the run by
                SIGTERM, which leaves a checkpoint to resume from.
        """
        write_atomically(self.run / _RECORD, self.started_with.encode())
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **ends_with_this_process()}
        log = self.run / _LOG
        was_stopped = False
        with log.open("ab") as file:  # the output of earlier attempts stays
            process = subprocess.Popen(
                [*_ESPER, *self.words], stdout=file, stderr=file, env=environment
            )
            try:
                while stops is not None and process.poll() is None:
                    if stops():
                        was_stopped = True
                        process.terminate()
                        break
                    try:
                        process.wait(_LOOK_S)
                    except subprocess.TimeoutExpired:
                        continue
            finally:
                status = process.wait()
        return Ended(status, was_stopped, _end_of(log))


def config_text(config: str) -> str:
    """The text of a config, which each run of ``esper fit`` reads by itself.

    Raises:
        ValueError: If the config is no text file of this machine.
    """
    require_local("--config", config, "a file")
    try:
        return read_file(Path(config)).decode()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"--config must name a file of text ({why}), got {config!r}.") from error


def fit_job(run: Path, configs: Sequence[str], settings: Sequence[str], seed: int) -> Job:
    """The run of ``esper fit`` with some settings and a seed.

    Args:
        run: Directory of the run.
        configs: Paths of config files.
        settings: Words that follow ``--config`` and the paths.
        seed: Seed of the run.

    Raises:
        ValueError: If a config cannot be read.
    """
    named = [word for config in configs for word in ("--config", config)]
    chosen = [*named, *settings, "--model.seed", str(seed)]
    where = ["--run_dir", str(run), "--ckpt_path", "last"]
    where += ["--trainer.enable_progress_bar", "false"]
    contents = [config_text(config) for config in configs]
    started_with = "\n".join([shlex.join(chosen), *contents])
    return Job(run, ["fit", *chosen, *where], started_with)


def start_esper(words: Sequence[str]) -> int:
    """Run a command of ``esper`` whose output is that of this process; returns its exit status."""
    environment = os.environ | ends_with_this_process()
    return subprocess.run([*_ESPER, *words], check=False, env=environment).returncode


def ends_with_this_process() -> dict[str, str]:
    """Variables of a command of ``esper`` that gets SIGTERM when this process ends (Linux)."""
    return {ENDS_WITH: str(os.getpid())}


def command_of(job: Job) -> str:
    """The command of a job, as text for a shell."""
    return shlex.join([*_ESPER, *job.words])


def _end_of(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LONGEST_END))
        lines = file.read(_LONGEST_END).decode(errors="replace").splitlines()
    return [printable(line) for line in lines[-_SHOWN_LINES:]]
