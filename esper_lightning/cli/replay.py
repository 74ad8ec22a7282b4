"""``esper replay RUN_DIR``: a dead run again, up to the iteration in which it died."""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml

from esper_lightning.cli.errors import CommandParser, fail, local_path
from esper_lightning.cli.jobs import ends_with_this_process
from esper_lightning.cli.mistakes import settings_come_first
from esper_lightning.cli.replay_loggers import importing_from, replace_loggers
from esper_lightning.comparison.runs import parse_yaml
from esper_lightning.core.paths import expand_home
from esper_lightning.forensics import sidecar
from esper_lightning.forensics.fingerprint import (
    Fingerprint,
    folders_to_restore,
    variables_to_restore,
)
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import printable, read_file
from esper_lightning.forensics.remains import examine, first_failure, rank_folders
from esper_lightning.forensics.replay import Verdict, judge, needs_program
from esper_lightning.recorder.flight_recorder import FlightRecorder
from esper_lightning.recorder.profiling.window_profiler import WindowProfiler
from esper_lightning.recorder.replay_watch import ReplayWatch, record_left
from esper_lightning.replaying import (
    ReplayPlan,
    plan_replay,
    replay_directory,
    require_new_directory,
)
from esper_lightning.training.checkpoint.replay_starts import temporary_folder
from esper_lightning.training.failing_minibatch import examine_minibatch

__all__ = ["STATUSES", "run"]

STATUSES = {"reproduced": 0, "did not happen again": 3, "different": 4, "undecided": 5}
"""Exit status of the command for each verdict."""

_MISTAKE = 2  # exit status of the commands for settings that are refused
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_HEARD_S = 2.0  # after which Ctrl-C has reached every process of a terminal
_REPORT_S = 5.0  # that the second process of a rank may take for the report
_EPILOG = """exit status:
  0  reproduced: the same error, in the same iteration, at the same line
  3  did not happen again: the failing iteration went well
  4  different from some iteration on; the output says what differs between the runs
  5  undecided: the replay was stopped, or its start does not restore the order of the data
  2  RUN_DIR holds no run that died, or the run cannot be started again
"""


def run(arguments: list[str]) -> None:
    """Replay a run and print the verdict, which is also the exit status."""
    parser = CommandParser("esper replay", "A dead run again, up to its death.", _EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "dead_run",
        type=local_path,
        metavar="RUN_DIR",
        nargs="+",
        help="a run directory; several for the copies of one run on several hosts",
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="the failing iteration alone, eagerly: with anomaly detection where the update failed,"
        " and with blocking launches on CUDA",
    )
    parser.add_argument(
        "--minibatch",
        action="store_true",
        help="the minibatch of an update that was not finite, alone: where the first bad value"
        " arises",
    )
    parser.add_argument(
        "--run_dir", type=local_path, help="directory of the replay; by default a new one beside"
    )
    parser.add_argument("--ckpt_path", type=local_path, help="checkpoint to start from")
    parser.add_argument(
        "--from_start",
        action="store_true",
        help="start at the beginning of the run: no state is absent that no checkpoint holds",
    )
    options = parser.parse_args(arguments)
    # The copy with the folder of rank 0 has the config, too.
    directories = sorted(
        options.dead_run, key=lambda each: not RunLayout(each).rank(0).directory.is_dir()
    )
    try:
        with _stops_are_exits() as stops:
            verdict = _replay(options, directories, stops)
    except (ValueError, OSError) as error:
        fail(error)
    sys.stdout.flush()
    sys.exit(STATUSES[verdict.outcome])


def _replay(options: argparse.Namespace, directories: Sequence[Path], stops: "_Stops") -> Verdict:
    """Replay the run in some directories; a deep replay may need another one first."""
    dead_run = directories[0]
    if options.minibatch:
        sys.exit(_examine_minibatch(directories))
    if options.run_dir is not None:
        require_new_directory("--run_dir", options.run_dir)
    _wait_for_report(*directories)
    start = {"ckpt_path": options.ckpt_path, "from_start": options.from_start}
    plan = plan_replay(*directories, deep=options.deep, **start)
    if plan.deep and plan.begins < plan.iteration - 1:
        verdict = _play(plan_replay(*directories, **start), dead_run, None, stops)
        # It may not have come to the state before the fault.
        if verdict.outcome in ("different", "undecided") or stops.stopped_by is not None:
            return verdict
        plan = plan_replay(*directories, deep=True)
    return _play(plan, dead_run, options.run_dir, stops)


class _Stops:
    """Signals that end this command: the process of a replay ends first, and leaves its verdict.

    Attributes:
        stopped_by: Name of the first signal that arrived while the process was running.
    """

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self._since_s = float("inf")
        self._runs = False
        self._process: subprocess.Popen[Any] | None = None

    def run(self, words: Sequence[str], **how: Any) -> int:
        """Run a program to its end, whatever signals arrive; returns its exit status."""
        self._runs = True
        try:
            self._process = process = subprocess.Popen(words, **how)
            if self.stopped_by is not None:
                process.terminate()
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(_HEARD_S / 4)
                if time.monotonic() - self._since_s > _HEARD_S:  # it was for this process alone
                    self._since_s = float("inf")
                    process.terminate()
        finally:
            self._runs, self._process = False, None

    def arrive(self, number: int, _frame: object) -> None:
        """Handle a signal: the process of the replay saves its evidence, and ends."""
        if not self._runs:
            sys.exit(128 + number)
        if self.stopped_by is None:
            self.stopped_by, self._since_s = signal.Signals(number).name, time.monotonic()
        if number != signal.SIGINT and self._process is not None:
            self._process.terminate()


@contextlib.contextmanager
def _stops_are_exits() -> Generator[_Stops]:
    """A context in which signals end the command in order: no process or folder is left behind."""
    stops = _Stops()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stops.arrive)
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _examine_minibatch(directories: Sequence[Path]) -> int:
    """Print where the first value of a minibatch that is not finite arises; returns the status."""
    ranks = [RunLayout(place).rank(rank) for place in directories for rank in rank_folders(place)]
    left = [files for files in ranks if files.bad_minibatch.exists()]
    first = first_failure(examine(*directories))
    found = None if first is None else first.fingerprint
    with settings_come_first(), importing_from(_found_in(found or Fingerprint())):
        finding = examine_minibatch((left or [RunLayout(directories[0]).rank(0)])[0])
    print("\n".join(map(printable, finding.lines)), flush=True)
    return STATUSES["reproduced" if finding.found else "did not happen again"]


def _play(plan: ReplayPlan, dead_run: Path, given: Path | None, stops: _Stops) -> Verdict:
    """Start the run again, wait for its end, and print the verdict."""
    directory = replay_directory(dead_run) if given is None else given.absolute()
    settings = _settings(plan, dead_run, directory)
    found = plan.first.fingerprint or Fingerprint()
    remarks = replace_loggers(settings["trainer"], directory, found_in=_found_in(found))
    lost = [name for name in variables_to_restore(found)[1] if name not in os.environ]
    if lost:
        remarks.append(f"Not restored, because no whole value is on record: {', '.join(lost)}.")
    start = f"the state after iteration {plan.begins}" if plan.start else "the beginning"
    count = max(1, plan.iteration - plan.begins)
    when = f"in iteration {plan.iteration}" if plan.iteration else "before the first iteration"
    print(
        f"Rank {plan.first.rank} of {plan.world_size} died {when}.",
        f"Replay from {start}, {count} iteration{'s' if count > 1 else ''}, in {_shown(directory)}",
        *map(printable, remarks),
        sep="\n",
        flush=True,
    )
    with temporary_folder() as folder:
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(settings, sort_keys=False))
        status = stops.run(
            [sys.executable, "-m", "esper_lightning", "fit", "--config", str(config)],
            env={**_environment(found, deep=plan.deep), **ends_with_this_process()},
            cwd=found.directory if found.directory and Path(found.directory).is_dir() else None,
        )
    is_mistake = status == _MISTAKE and not RunLayout(directory).replay.exists()
    if is_mistake and stops.stopped_by is None:  # the process has said in a line what it is
        sys.exit(status)
    if status:
        with contextlib.suppress(ValueError):  # it holds no run
            _wait_for_report(directory)
            _complete_reports(directory)
    planned = ReplayWatch(**plan.settings_of_watch(dead_run)).record
    record = record_left(directory, planned)
    if record is None and stops.stopped_by is not None:
        print(f"\nUndecided: {stops.stopped_by} ended the replay before it had begun.", flush=True)
        sys.exit(STATUSES["undecided"])
    if record is None:
        raise ValueError(f"The run must start again, got exit status {status} before it had begun.")
    if stops.stopped_by is not None:
        replace(record, stopped_by=stops.stopped_by).write(directory)
    verdict = judge(directory, plan.dead)
    lines = ["", *verdict.lines, *_where_to_look(directory, dead_run, found)]
    print("\n".join(map(printable, lines)), flush=True)
    return verdict


def _settings(plan: ReplayPlan, dead_run: Path, directory: Path) -> dict[str, Any]:
    """The config of the dead run, changed into that of its replay.

    Raises:
        ValueError: If the config is missing or damaged, or is not all that the run had.
    """
    hint = "Call esper_lightning.replaying.replay(trainer, model, run_dir)."
    try:
        config = RunLayout(dead_run).config
        lacks, content = needs_program(config), read_file(config)
        settings: Any = parse_yaml(content)
    except (OSError, ValueError) as error:
        message = f"RUN_DIR must hold the config.yaml of the run, got {str(dead_run)!r}. {hint}"
        raise ValueError(message) from error
    if lacks is not None:
        raise ValueError(
            f"RUN_DIR must hold a run without objects of a program, got {lacks}. {hint}"
        )
    settings = cast(dict[str, Any], settings) if isinstance(settings, dict) else {}
    if not all(isinstance(settings.get(name), dict) for name in ("model", "trainer")):
        raise ValueError(f"{RunLayout(dead_run).config} must hold settings of model and trainer.")
    trainer: dict[str, Any] = settings["trainer"]
    callbacks: Any = trainer.get("callbacks") or []
    listed = cast(list[Any], callbacks if isinstance(callbacks, list) else [callbacks])
    # The dead run may be a replay itself.
    listed = [each for each in listed if ReplayWatch.__name__ not in str(each)]
    listed = [_elsewhere(each, dead_run) for each in listed]
    if not any(FlightRecorder.__name__ in str(each) for each in listed):
        listed.append(_spec(FlightRecorder, {"print_profile": False}))
    listed.append(_spec(ReplayWatch, plan.settings_of_watch(dead_run)))
    trainer["callbacks"] = listed
    trainer["profiler"] = _spec(WindowProfiler, plan.settings_of_profiler())
    devices = trainer.get("devices")
    if not isinstance(devices, list) or len(cast(list[Any], devices)) != plan.world_size:
        devices = plan.world_size
    trainer |= {"devices": devices, "num_nodes": 1}
    if plan.world_size > 1 and trainer.get("strategy") in (None, "auto"):
        trainer["strategy"] = "ddp"
    if plan.deep:
        settings["model"]["compile"] = "off"
    settings["run_dir"] = str(directory)
    settings["ckpt_path"] = None if plan.start is None else str(plan.start.absolute())
    return settings


def _spec(kind: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    path = f"{kind.__module__}.{kind.__qualname__}"
    return {"class_path": path, "init_args": dict(arguments)}


def _elsewhere(callback: Any, dead_run: Path) -> Any:
    """A callback of a config, without a folder that is within the directory of the dead run."""
    if not isinstance(callback, dict):
        return callback
    settings = cast(dict[str, Any], callback)
    arguments = settings.get("init_args")
    if not isinstance(arguments, dict):
        return settings
    given = cast(dict[str, Any], arguments).get("dirpath")
    is_path = isinstance(given, str)  # else the run says what is wrong
    if not is_path or not expand_home(given).resolve().is_relative_to(dead_run.resolve()):
        return settings
    return settings | {"init_args": cast(dict[str, Any], arguments) | {"dirpath": None}}


def _environment(found: Fingerprint, *, deep: bool) -> Mapping[str, str]:
    """The variables of this process, and those of the dead run that are not set here."""
    recorded, _lost = variables_to_restore(found)
    launches = {"CUDA_LAUNCH_BLOCKING": "1"} if deep else {}
    return recorded | os.environ | launches | _python_path(found)


def _python_path(found: Fingerprint) -> dict[str, str]:
    """The variable by which a process finds the modules of the dead run, if it needs one."""
    folders, given = folders_to_restore(found), os.environ.get("PYTHONPATH")
    joined = os.pathsep.join([*([given] if given else []), *folders])
    return {"PYTHONPATH": joined} if folders else {}


def _found_in(found: Fingerprint) -> list[str]:
    """Folders in which the dead run found modules, and this process may not look."""
    return [*([found.directory] if found.directory else []), *folders_to_restore(found)]


def _wait_for_report(*directories: Path) -> None:
    """Wait for the report of a process that vanished, which a second process writes soon after."""
    end = time.monotonic() + _REPORT_S
    while time.monotonic() < end:
        first = first_failure(examine(*directories))
        if first is None or (first.report is not None and first.report.complete):
            return
        time.sleep(0.1)


def _complete_reports(directory: Path) -> None:
    """Write the reports that no other process has written."""
    for rank in rank_folders(directory):
        files = RunLayout(directory).rank(rank)
        with sidecar.locked(files.directory):
            sidecar.complete_report(files)


def _where_to_look(directory: Path, dead_run: Path, found: Fingerprint) -> list[str]:
    """Lines about what the replay has left."""
    again, layout = first_failure(examine(directory)), RunLayout(directory)
    lines = ["", f"esper crash {_shown(directory)}"]
    if again is not None and again.trace_path is not None:
        lines.append(f"Trace of the failing iteration: {_shown(again.trace_path)}")
    if layout.before_fault.exists():
        config, before = RunLayout(dead_run).config, _shown(layout.before_fault)
        lines.append("The failing iteration alone, for a debugger:")
        path = "".join(f"{k}={shlex.quote(v)} " for k, v in _python_path(found).items())
        words = f"--config {config} --ckpt_path {before} --run_dir NEW_DIR"
        lines.append(f"    {path}esper fit {words}")
    return lines


def _shown(path: Path) -> str:
    """A path as it is printed: relative to the current directory, if it is below."""
    with contextlib.suppress(ValueError, OSError):  # the current directory may be gone
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)
