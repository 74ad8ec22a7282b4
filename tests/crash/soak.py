"""Runs of ``esper fit`` that are killed at random moments and resumed, until they are done.

After each kill every file in the run directory is whole; in the end history, evaluations and
checkpoints are those of a run that nobody disturbed, bit for bit, but for wall-clock times. A run
that stores each state can be resumed after the latest iteration that had finished.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

from esper_lightning.cli import crash
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.owner_record import parse_owner
from esper_lightning.forensics.phases import read_phases
from esper_lightning.training.checkpoint.files import read_checkpoint
from esper_lightning.training.checkpoint.kept import iteration_in, latest_state
from tests import forked

ROOT = Path(__file__).parents[2]
FIT = (
    *("fit", "--config", str(ROOT / "configs" / "cartpole.yaml"), "--trainer.accelerator", "cpu"),
    *("--model.env.num_envs", "4", "--model.env.time_limit", "30", "--model.eval_episodes", "2"),
    *("--model.ppo.rollout_steps", "8", "--model.ppo.minibatches", "2", "--model.ppo.epochs", "1"),
    *("--model.total_env_steps", "1600", "--model.iterations_per_epoch", "10"),
    *("--trainer.enable_progress_bar", "false", "--ckpt_path", "last"),
    *("--seed_everything", "1"),  # the process's own random states are in checkpoints, too
)
RECORDER = {
    "class_path": "esper_lightning.FlightRecorder",
    "init_args": {"keeps_state": True, "print_profile": False},
}
MOMENTS = {  # how a moment is chosen, and how often; imports take long
    "start": 4,
    "any": 4,
    "write": 4,
    "evaluation": 3,
    "checkpoint": 3,
    "report": 4,
    "import": 1,
}
_IN_PHASE = {"evaluation": "validation_step", "checkpoint": "Checkpoint."}
_CLOCK = ("time_s", "env_steps_per_s")
_LIMIT_S = 120.0


@dataclass
class Tally:
    """The outcome of a soak."""

    kills: Counter[str] = field(default_factory=Counter[str])  # by what the run was doing
    moments: Counter[str] = field(default_factory=Counter[str])  # by how they were chosen
    runs: int = 0
    repeated: Counter[int] = field(default_factory=Counter[int])  # rows after the resumed state


class Soak:
    """Kills runs below a folder.

    Args:
        folder: Empty; what a failed check looked at stays there.
        seed: Of the moments at which runs are killed.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self._environment = {**os.environ, **forked.QUIET, "PYTHONPATH": str(ROOT)}
        self.tally = Tally()
        self._keeps_state = False

    def train_undisturbed(self) -> None:
        """Train the run that the others must equal."""
        self._reference = self._folder / "reference"
        process, began, first_row = self._launch(self._reference), time.monotonic(), float("inf")
        history = RunLayout(self._reference).rank(0).history
        while process.poll() is None:
            if first_row == float("inf") and history.exists() and history.stat().st_size:
                first_row = time.monotonic() - began
            time.sleep(0.01)
        assert process.returncode == 0, self._output(self._reference)
        self._start_s, self._whole_s = first_row, time.monotonic() - began

    def one_run(
        self,
        *,
        kills: int | None = None,
        until_s: float = float("inf"),
        keeps_state: bool = False,
    ) -> None:
        """Kill a run and resume it, again and again, and compare what it was in the end.

        Args:
            kills: After so many the run is left to finish; ``None`` to kill until it does.
            until_s: Of ``time.monotonic``: from here on it is left to finish.
            keeps_state: Whether the run stores the state after every iteration.

        Raises:
            AssertionError: Naming the file that is not whole, or the row that differs.
        """
        self.tally.runs += 1
        self._keeps_state = keeps_state
        directory = self._folder / f"run{self.tally.runs}"
        done, killed = False, 0
        while not done:
            is_over = time.monotonic() > until_s or (kills is not None and killed == kills)
            moment = None if is_over else self._moment(killed)
            done = self._attempt(directory, moment)
            killed += not done
            if done or self._random.random() < 0.5:  # otherwise the next attempt meets it
                _wait_for_second_process(directory)
            check_whole(directory)
            self._check_rows(directory)
            if keeps_state and not done:
                self._check_lost(directory)
        _wait_for_second_process(directory)
        self._check_end(directory)

    def _moment(self, number: int) -> str:
        return self._random.choices([*MOMENTS], [*MOMENTS.values()])[0] if number else "import"

    def _attempt(self, directory: Path, moment: str | None) -> bool:
        """Run one process of a run; returns whether it reached the end."""
        if moment == "import":
            return self._attempt_import(directory)
        process = self._launch(directory)
        longest = self._start_s if moment == "start" else self._whole_s
        end = float("inf") if moment is None else self._random.uniform(0.0, longest)
        end += time.monotonic()
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.002)
        if moment == "write":
            while process.poll() is None and not _writes(directory):
                pass
        elif moment in _IN_PHASE:
            while process.poll() is None and not _is_in(directory, process.pid, _IN_PHASE[moment]):
                pass
        doing = self._doing(directory)
        if moment == "report":
            doing = "saving evidence" if self._end_in_its_report(directory, process) else doing
        process.kill()
        status = process.wait(_LIMIT_S)
        ends = (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
        assert status in ends, self._output(directory)
        if status != 0:
            assert moment is not None
            self.tally.kills[doing] += 1
            self.tally.moments[moment] += 1
        return status == 0

    def _end_in_its_report(self, directory: Path, process: forked.Forked) -> bool:
        """Let a process begin to save its evidence, and its second process perhaps be killed.

        Returns:
            Whether the process was recorded by then, and had not ended.
        """
        recorded = RunLayout(directory).rank(0).process.exists() and process.poll() is None
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self._random.uniform(0.0, 0.4))
        if self._random.random() < 0.5:  # as all of a container
            for pid in filter(lambda pid: _watches(pid, directory), _processes()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        return recorded

    def _attempt_import(self, directory: Path) -> bool:
        """A process of its own, killed while it imports, or soon after."""
        command = [sys.executable, "-m", "esper_lightning", *self._arguments(directory)]
        directory.parent.mkdir(exist_ok=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=self._folder, env=self._environment, **quiet)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self._random.uniform(0.0, 3.0))
        doing = self._doing(directory)
        process.kill()
        status = process.wait()
        assert status in (0, -signal.SIGKILL)
        if status != 0:
            self.tally.kills[doing] += 1
            self.tally.moments["import"] += 1
        return status == 0

    def _arguments(self, directory: Path) -> list[str]:
        callbacks = [RECORDER] if self._keeps_state else []
        return [*FIT, "--run_dir", str(directory), "--trainer.callbacks", json.dumps(callbacks)]

    def _launch(self, directory: Path) -> forked.Forked:
        words = ["-m", "esper_lightning", *self._arguments(directory)]
        with (self._folder / "output").open("ab") as output:
            return forked.start(words, output=output, cwd=self._folder, env=self._environment)

    def _output(self, directory: Path) -> str:
        return f"{directory}: {(self._folder / 'output').read_text()[-4000:]}"

    def _doing(self, directory: Path) -> str:
        """The activity of the run, as its files show it."""
        files = RunLayout(directory).rank(0)
        if not directory.exists():
            return "before the run directory"
        if _writes(directory):
            return "writing a file"
        if not files.process.exists():
            return "before the recorder"
        if b'"running"' not in files.process.read_bytes():
            return "at the end, or starting again"
        return "training"

    # What must be so.

    def _check_rows(self, directory: Path) -> None:
        files, right = RunLayout(directory).rank(0), RunLayout(self._reference).rank(0)
        for mine, theirs in (
            (files.history, right.history),
            (files.evaluations, right.evaluations),
        ):
            found, due = _rows(mine), _rows(theirs)
            assert found == due[: len(found)], f"{mine} differs from an undisturbed run's"

    def _check_lost(self, directory: Path) -> None:
        """The next attempt repeats at most the iteration whose state was being stored."""
        run = RunLayout(directory)
        rows = len(_rows(run.rank(0).history))
        kept, last = latest_state(directory), run.last_checkpoint
        found = [] if kept is None else [kept.iteration]
        found += [iteration_in(read_checkpoint(last))] if last.exists() else []
        repeated = rows - max(found, default=0)
        assert repeated <= 1, f"{directory}: {rows} rows, and states of iterations {found}"
        self.tally.repeated[max(0, repeated)] += 1

    def _check_end(self, directory: Path) -> None:
        run, right = RunLayout(directory), RunLayout(self._reference)
        for name in ("history", "evaluations"):
            mine, theirs = getattr(run.rank(0), name), getattr(right.rank(0), name)
            assert _rows(mine) == _rows(theirs), f"{mine} differs from an undisturbed run's"
        for name in ("last_checkpoint", "best_checkpoint"):
            mine, theirs = getattr(run, name), getattr(right, name)
            assert _same(_state(mine), _state(theirs)), f"{mine} differs from an undisturbed run's"


def check_whole(directory: Path) -> None:
    """Every file that a killed run left can be read to its end, but the state that it stored.

    Raises:
        AssertionError: Naming the first that cannot.
    """
    torn = set[Path]()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            try:
                _read(path)
            except Exception as error:
                is_state = path.name in ("state.0.ckpt", "state.1.ckpt")
                if not is_state or path.parent in torn:
                    text = f"{path} ({path.stat().st_size} bytes): {error}"
                    raise AssertionError(text) from error
                torn.add(path.parent)
    if list(directory.glob("rank*")):
        crash.examine(directory)


def _read(path: Path) -> None:
    name = path.name
    if ".json" in name or name.startswith("stacks.txt."):  # may be set aside, with a number
        name = name.rstrip("0123456789").rstrip(".")
    if name.startswith("."):  # being written, or room for what may come
        is_known = name.endswith(".tmp") or name.startswith((".reserved.", ".set_aside"))
        assert is_known, "an unknown hidden file"
    elif name.endswith(".yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), "not a mapping"
    elif name.endswith(".jsonl"):
        read_json_lines(path)
        assert path.read_bytes() or name == path.name, "an empty file set aside"
    elif name.endswith(".json"):
        assert isinstance(json.loads(path.read_bytes()), dict), "not an object"
    elif name == "owner.lock":
        assert not path.stat().st_size or "pid" in parse_owner(path.read_bytes()), "no owner"
    elif ".ckpt" in name:
        read_checkpoint(path)
    elif name.startswith("events.out.tfevents."):
        list(RawEventFileLoader(str(path)).Load())
    else:
        assert name in ("phases.ring", "stacks.txt"), "an unknown file"


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_json_lines(path)
    return [{k: v for k, v in row.items() if k not in _CLOCK} for row in rows]


def _state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that depends on no clock and no folder's name."""
    checkpoint = read_checkpoint(path)
    own = {k: v for k, v in checkpoint["esper_lightning"].items() if k != "train_time_s"}
    names = ("state_dict", "optimizer_states", "global_step", "epoch")
    return {"own": own, **{name: checkpoint[name] for name in names}}


def _same(one: Any, other: Any) -> bool:
    """Whether two trees are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or repr(one) == repr(other) == "nan"


def _writes(directory: Path) -> bool:
    """Whether a temporary file is there, or a file is not in place yet."""
    for folder in (directory, directory / "checkpoints", directory / "rank0"):
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            if any(entry.name.endswith(".tmp") for entry in entries):
                return True
    return False


def _is_in(directory: Path, pid: int, phase: str) -> bool:
    """Whether a process is in a phase."""
    files = RunLayout(directory).rank(0)
    with contextlib.suppress(OSError, ValueError):
        if json.loads(files.process.read_bytes()).get("pid") == pid:
            return any(phase in span.name for span in read_phases(files.phases).open)
    return False


def _wait_for_second_process(directory: Path) -> None:
    """It completes the report of a run that was killed, and leaves."""
    end = time.monotonic() + 20.0
    while time.monotonic() < end and any(_watches(pid, directory) for pid in _processes()):
        time.sleep(0.02)


def _processes() -> list[str]:
    return [entry.name for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _watches(pid: str, directory: Path) -> bool:
    with contextlib.suppress(OSError):
        command = Path("/proc", pid, "cmdline").read_bytes()
        return b"forensics.sidecar" in command and os.fsencode(f"{directory}/") in command
    return False
