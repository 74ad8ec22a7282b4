"""``esper sweep``: a search for settings by Optuna, whose best is judged by seeds of its own.

A trial trains one choice of settings with every seed of the search, one after the other, and its
value is the interquartile mean of ``esper compare``. The first seed is ended early where its
history is worse than those of most trials before. The best trial and the unchanged config are then
trained with seeds that chose nothing, and compared. A sweep that is started again continues.
"""

import fcntl
import importlib.util
import os
import shlex
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from esper_lightning.cli import shipped
from esper_lightning.cli.compare import compare_runs
from esper_lightning.cli.errors import CommandParser, fail, local_path
from esper_lightning.cli.jobs import Ended, Job, config_text, fit_job, start_esper
from esper_lightning.cli.search import Dimension, parse_dimension
from esper_lightning.comparison.marks import Marks
from esper_lightning.comparison.section import number
from esper_lightning.core.errors import require
from esper_lightning.core.paths import require_output_folder
from esper_lightning.forensics.files import strict_json, write_atomically
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.processes import is_alive
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.reading import read_file

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

__all__ = ["run"]

_NEEDED = ("optuna", "scipy", "matplotlib")
_RANDOM_TRIALS = 8  # before the sampler models what is good
_TRIALS_BEFORE_PRUNING = 4
_HOPELESS = 3  # failed trials at the start, after which the mistake is not in the choice
_SHOWN = 3  # best trials that are printed


def run(arguments: list[str]) -> None:
    """Run ``esper sweep``: search for settings, and compare the best trial with the config.

    The process exits with status 1 if no trial succeeded, and with 2 after a mistake in the
    arguments.

    Args:
        arguments: Arguments of the command line after ``esper sweep``.
    """
    options = _parser().parse_args(shipped.with_paths(arguments))
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        fail(f"esper sweep needs {', '.join(absent)}: pip install 'esper_lightning[sweep]'")
    try:
        space = _read_space(options)
        with _locked(options.output), _sigterm_is_an_exit():
            _refuse_other_sweep(options)
            status = _Sweep(options, space).run()
    except (ValueError, OSError) as error:
        fail(error)
    sys.exit(status)


def _parser() -> CommandParser:
    parser = CommandParser(
        "esper sweep",
        "Search for settings with Optuna, and compare the best with the config by further seeds.",
        epilog="Called again, a sweep continues. Arguments of esper fit for all runs follow --.",
    )
    parser.add_argument("--config", action="append", required=True, help="of esper fit")
    parser.add_argument(
        "--search",
        action="append",
        required=True,
        metavar="NAME=VALUES",
        help="a setting: 'model.ppo.epochs=2..8' (integers), 'model.ppo.clip=0.1..0.3', "
        "'model.ppo.learning_rate=1e-4..1e-2 log', or 'model.ppo.minibatches=[2, 4, 8]'",
    )
    parser.add_argument("--output", type=local_path, required=True, metavar="DIR")
    parser.add_argument("--trials", type=int, default=20, help="in all, earlier ones counted (20)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of each trial (0 1 2)"
    )
    parser.add_argument(
        "--judges",
        type=int,
        nargs="*",
        default=[100, 101, 102, 103, 104],
        metavar="SEED",
        help="seeds that judge the best trial (100 to 104); without any, nothing is judged",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("arguments", nargs="*", help="of esper fit, for all runs, after --")
    return parser


@contextmanager
def _sigterm_is_an_exit() -> Generator[None]:
    """A context in which SIGTERM ends the runs of the process first, as an interrupt does."""

    def leave(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _read_space(options: Namespace) -> list[Dimension]:
    """The settings to search, once all options are known to be good.

    Raises:
        ValueError: If an option is out of range.
    """
    for name in ("trials", "jobs"):
        require(getattr(options, name) > 0, f"--{name}", "be at least 1", getattr(options, name))
    space = [parse_dimension(text) for text in options.search]
    names = [dimension.name for dimension in space]
    require(len({*names}) == len(names), "--search", "name each setting once", ", ".join(names))
    for name in ("seeds", "judges"):
        seeds: list[int] = getattr(options, name)
        require(len({*seeds}) == len(seeds), f"--{name}", "name each seed once", seeds)
    shared = sorted({*options.seeds} & {*options.judges})
    hint = "Seeds that chose the best trial favour it."
    require(not shared, "--judges", "be other seeds than --seeds", shared, hint)
    require_output_folder("--output", options.output)
    for config in options.config:
        config_text(config)
    return space


@contextmanager
def _locked(output: Path) -> Generator[None]:
    """A context in which a directory belongs to this process; the directory is made.

    Raises:
        ValueError: If another sweep is using the directory.
        OSError: If the directory cannot be made.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / "sweep.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = "must be of no sweep that runs"
            raise ValueError(f"--output {rule}, got {str(output)!r}.") from None
        yield


def _refuse_other_sweep(options: Namespace) -> None:
    """Write down what a sweep is asked for, or refuse a directory of another sweep.

    Raises:
        ValueError: If the directory is of another sweep.
        OSError: If a file cannot be read or written.
    """
    asked = {
        "configs": [config_text(config) for config in options.config],
        "arguments": options.arguments,
        "search": sorted(options.search),
        "seeds": options.seeds,
    }
    record, content = options.output / "sweep.json", f"{strict_json(asked)}\n".encode()
    if record.exists() and read_file(record) != content:
        raise ValueError(f"{record} must be of the same sweep. Choose another --output.")
    write_atomically(record, content)


class _Sweep:
    """The trials of a sweep, and the judgement of the best."""

    def __init__(self, options: Namespace, space: Sequence[Dimension]) -> None:
        self._options = options
        self._space = {dimension.name: dimension.distribution() for dimension in space}
        self._study = _open_study(options.output)
        self._mine: set[int] = set()  # numbers of trials that this process works on or has ended
        self._lock = threading.Lock()  # of the study
        self._stops = threading.Event()

    def run(self) -> int:
        """Run all trials, and compare the best trial with the config.

        Returns:
            Exit status of the command: 1 if no trial succeeded.

        Raises:
            ValueError: If the directory of a run holds a run that still trains, or a run with other
                settings.
        """
        self._refuse_living_runs()
        self._in_parallel([self._work_on_trials] * self._options.jobs)
        trials = self._study.get_trials(deepcopy=False)
        states = [trial.state.name for trial in trials]
        done = [trial for trial in trials if trial.state.name == "COMPLETE"]
        done.sort(key=lambda trial: trial.value or 0.0, reverse=True)
        counts = f"{states.count('PRUNED')} ended early, {states.count('FAIL')} failed"
        print(f"{len(done)} of {len(trials)} trials finished, {counts}.", flush=True)
        for trial in done[:_SHOWN]:
            print(f"  {_line(trial, trial.value)}", flush=True)
        if not done:
            return 1
        return self._judge(done[0]) if self._options.judges else 0

    def _refuse_living_runs(self) -> None:
        """Refuse runs of an earlier call that was killed, while its runs were not."""
        for pattern in ("trial*/seed*", "judged/*/seed*"):
            for run in self._options.output.glob(pattern):
                process = ProcessRecord.read(RunLayout(run).rank(0).process)
                alive = process is not None and process.state == "running" and is_alive(process)
                hint = "An earlier call was killed: end its run, or wait."
                require(not alive, str(run), "be a run that has ended", "running", hint)

    def _in_parallel(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """Call functions, some at a time; an error or an interrupt ends the runs of all."""
        with ThreadPoolExecutor(self._options.jobs) as pool:
            try:
                return [future.result() for future in [pool.submit(task) for task in tasks]]
            except BaseException:
                self._stops.set()
                raise

    def _work_on_trials(self) -> None:
        """Train trials, one after the other, until there are enough."""
        while not self._stops.is_set():
            with self._lock:
                trial = self._next_trial()
            if trial is None:
                return
            self._train(trial)

    def _next_trial(self) -> "Trial | None":
        """A trial that an earlier call did not end, or a new one; ``None`` if there are enough."""
        from optuna import Trial  # noqa: PLC0415
        from optuna.samplers import TPESampler  # noqa: PLC0415

        trials = self._study.get_trials(deepcopy=False)
        if len(trials) >= _HOPELESS and {trial.state.name for trial in trials} == {"FAIL"}:
            return None
        for known in trials:
            if known.state.name == "RUNNING" and known.number not in self._mine:
                self._mine.add(known.number)
                return Trial(self._study, known._trial_id)  # pyright: ignore[reportPrivateUsage]
        if len(trials) >= self._options.trials:
            return None
        # A sampler remembers nothing but its random numbers: with a seed for each trial, a sweep
        # that was interrupted chooses as one that was not.
        self._study.sampler = TPESampler(n_startup_trials=_RANDOM_TRIALS, seed=len(trials))
        trial = self._study.ask(self._space)
        self._mine.add(trial.number)
        return trial

    def _train(self, trial: "Trial") -> None:
        """Train a trial with every seed, and tell Optuna its value."""
        folder = self._options.output / f"trial{trial.number}"
        words = _words(trial.params)
        jobs = [self._job(folder, words, seed) for seed in self._options.seeds]
        for job in jobs:
            prunes = partial(self._is_hopeless, trial, Marks(job.run)) if job is jobs[0] else None
            ended = self._execute(job, prunes)
            if prunes is not None:
                prunes()  # reports what the run has passed since the last look
            if self._stops.is_set():
                return
            if ended.was_stopped:
                self._end(trial, None, "ended early")
                return
            if ended.status:
                self._end(trial, None, _failure(ended))
                return
        try:
            comparison = compare_runs([job.run for job in jobs])
        except ValueError as error:  # no episode ended, for example
            self._end(trial, None, f"not judged: {error}")
            return
        self._end(trial, comparison.places[0].rows[0].interquartile_mean.value)

    def _job(self, folder: Path, words: Sequence[str], seed: int) -> Job:
        settings = [*self._options.arguments, *words]
        return fit_job(folder / f"seed{seed}", self._options.config, settings, seed)

    def _execute(self, job: Job, prunes: Callable[[], bool] | None = None) -> Ended:
        """Run a job to its end, unless the sweep or ``prunes`` stops it."""
        if job.is_finished:
            return Ended(0, was_stopped=False, says=[])
        job.refuse_other_settings()
        threads = max(1, (os.cpu_count() or 1) // self._options.jobs)

        def stops() -> bool:
            return self._stops.is_set() or (prunes is not None and prunes())

        return job.execute(threads=threads, stops=stops)

    def _is_hopeless(self, trial: "Trial", marks: Marks) -> bool:
        """Report the marks that a run has passed; returns whether to end the trial."""
        passed = marks.passed()
        with self._lock:
            for percent, value in passed:
                if percent not in self._frozen(trial).intermediate_values:
                    trial.report(value, percent)
            return bool(passed) and trial.should_prune()

    def _frozen(self, trial: "Trial") -> "FrozenTrial":
        return self._study.get_trials(deepcopy=False)[trial.number]

    def _end(self, trial: "Trial", value: float | None, how: str = "") -> None:
        """End a trial, and print how.

        A trial without a value that has passed a mark counts as ended early, even if its run died,
        so that the search learns of it; other trials without a value have failed.
        """
        from optuna.trial import TrialState  # noqa: PLC0415

        with self._lock:
            marks = self._frozen(trial).intermediate_values
            if value is not None:
                self._study.tell(trial, value)
            else:
                self._study.tell(trial, state=TrialState.PRUNED if marks else TrialState.FAIL)
                how = f" at {max(marks)} %: {how}" if marks else f": {how}"
            print(f"{_line(trial, value)}{how}", flush=True)

    def _judge(self, best: "FrozenTrial") -> int:
        """Train the config and the best trial with further seeds, and compare them."""
        print("Compared with the config by seeds that chose nothing:\n", flush=True)
        folder, name = self._options.output / "judged", f"trial{best.number}"
        variants: dict[str, list[str]] = {"base": [], name: _words(best.params)}
        jobs = [
            self._job(folder / variant, words, seed)
            for seed in self._options.judges
            for variant, words in variants.items()
        ]
        ends = self._in_parallel([partial(self._execute, job) for job in jobs])
        for job, ended in zip(jobs, ends, strict=True):
            if ended.status:
                print(f"{job.run}: {_failure(ended)}", flush=True)
        runs = [str(folder / variant) for variant in variants]
        return start_esper(["compare", *runs, "--output", str(self._options.output)])


def _open_study(output: Path) -> "Study":
    """The study of a sweep, in a file.

    Raises:
        ValueError: If the file is not of Optuna.
    """
    import optuna  # noqa: PLC0415 - takes a second
    from optuna.storages import JournalStorage  # noqa: PLC0415
    from optuna.storages.journal import JournalFileBackend  # noqa: PLC0415

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = output / "study.journal"
    try:
        return optuna.create_study(
            study_name="sweep",
            storage=JournalStorage(JournalFileBackend(str(path))),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_TRIALS_BEFORE_PRUNING),
            direction="maximize",
            load_if_exists=True,
        )
    except Exception as error:  # Optuna reads the file without checks
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} must be a study of Optuna: {reason}.") from error


def _failure(ended: Ended) -> str:
    """The end of a run that failed, with the last lines of its output."""
    return "\n    ".join([f"failed with exit status {ended.status}:", *ended.says])


def _words(params: dict[str, Any]) -> list[str]:
    """Settings of a trial as arguments of ``esper fit``."""
    return [f"--{name}={value}" for name, value in params.items()]


def _line(trial: "Trial | FrozenTrial", value: float | None) -> str:
    """Number, value and settings of a trial."""
    return f"trial {trial.number}: {number(value)} with {shlex.join(_words(trial.params))}"
