"""A run as a comparison needs it: settings, returns by environment steps, and how the run ended.

This file reads run directories and names damaged files. It computes no statistics.
"""

import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import yaml
from typing_extensions import override

from esper_lightning.core.errors import require
from esper_lightning.forensics.files import strict_json
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import (
    RowReader,
    parse_json,
    read_file,
    refuse_unbounded,
    whole_number,
)
from esper_lightning.forensics.remains import examine, first_failure

__all__ = [
    "SCORES",
    "Point",
    "Run",
    "Score",
    "find_runs",
    "identity",
    "parse_yaml",
    "read_metrics",
    "read_run",
    "read_yaml",
]

Score = Literal["evaluation", "rollout"]
SCORES: dict[Score, str] = {
    "evaluation": "eval/episode_return_mean",
    "rollout": "rollout/episode_return_mean",
}
"""Kinds of scores of a run, and the name of each in the files of the run."""

_COUNTERS = ("iteration", "env_steps", "gradient_steps", "time_s")  # columns that only count up
_LONGEST_REASON = 100
_MOST_YAML_BYTES = 1 << 18  # PyYAML takes some seconds for a file of this size
_MOST_KEYS = 1_000  # in one dictionary of settings
_DEEPEST_FOLDER = 20

# Settings that are not compared: where a run writes, what it prints, and its seed.
_NOT_COMPARED = re.compile(
    r"(seed|seed_everything|ckpt_path|config|data)$"
    r"|(.*\.)?(dirpath|save_dir|default_root_dir|run_dir)$"
    r"|trainer\.(logger|profiler|enable_|log_every_n_steps|detect_anomaly|num_sanity_val_steps)"
)


class Point(NamedTuple):
    """A return, which may be NaN or infinite, and the env steps at which it was measured."""

    env_steps: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run in one run directory.

    Attributes:
        directory: Path of the directory, as the user named it or found below that path.
        seed: ``model.seed`` of the run's config.
        settings: All other settings of the config that are compared, flat, by names like
            ``ppo.learning_rate``.
        points: Returns by either score, in order of environment steps; of several returns at the
            same environment steps, the one that was written last.
        env_steps: Environment steps at the end of the history.
        time_s: Training time so far.
        ended: ``finished`` at the budget, ``stopped`` before the budget, ``died``, ``running``, or
            ``unknown``.
        how: The same in words, with the cause of a death.
        remarks: Sentences that a reader of the metrics must know: rows that are repeated, out of
            order or missing.
    """

    directory: Path
    seed: int
    settings: Mapping[str, Any]
    points: Mapping[Score, list[Point]]
    env_steps: int
    time_s: float
    ended: Literal["finished", "stopped", "died", "running", "unknown"]
    how: str
    remarks: list[str]

    @property
    def budget(self) -> int | None:
        """Environment steps that the run was to take; ``None`` where the Trainer decides."""
        return self.settings.get("total_env_steps")

    def measured(self, score: Score) -> int:
        """Environment steps up to which the return of the run is known; 0 if it never was.

        A return that is not finite at the end is not known.
        """
        finite = (p.env_steps for p in reversed(self.points[score]) if math.isfinite(p.value))
        return next(finite, 0)

    def at(self, env_steps: int, score: Score) -> float | None:
        """The latest return at ``env_steps``; ``None`` where the run did not get so far.

        The return is one measurement and not a mean over several measurements, because each is
        already a mean over many episodes of one policy.
        """
        if self.measured(score) < env_steps:
            return None
        before = [p.value for p in self.points[score] if p.env_steps <= env_steps]
        return before[-1] if before and math.isfinite(before[-1]) else None


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run directories among ``paths`` and below them, each once, sorted below each path.

    Raises:
        ValueError: If there is no run at or below a path; the error names the path.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        runs = sorted(_below(path), key=_naturally)
        rule = "be a run directory, or have some below it (config.yaml, rank0)"
        require(bool(runs), "RUN", rule, str(path))
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read_run(directory: Path) -> Run:
    """Read the run in a directory.

    Raises:
        ValueError: If a file is missing or damaged; the error names the file.
    """
    layout = RunLayout(directory)
    settings = _settings(layout.config)
    seed = settings.get("seed")
    owner = f"{layout.config}: model.seed"
    require(isinstance(seed, int) and not isinstance(seed, bool), owner, "be an integer", seed)
    rank = layout.rank(0)
    history = _History(RowReader(rank.history, strict=True), SCORES["rollout"])
    evaluations = _History(
        RowReader(rank.evaluations, strict=True, last_is_short=True), SCORES["evaluation"]
    )
    env_steps, last = history.env_steps, history.last
    per_iteration = env_steps / (whole_number(last.get("iteration")) or 1)
    budget = settings.get("total_env_steps")
    is_budget = budget is None or whole_number(budget) is not None
    require(is_budget, f"{layout.config}: model.total_env_steps", "be an integer or null", budget)
    is_short = budget is not None and budget - env_steps >= per_iteration
    ended, how = _end(directory, is_short=is_short)
    return Run(
        directory=directory,
        seed=cast(int, seed),
        settings={k: v for k, v in settings.items() if not _NOT_COMPARED.match(k)},
        points={"evaluation": evaluations.points, "rollout": history.points},
        env_steps=env_steps,
        time_s=max(0.0, _finite(last.get("time_s"))),
        ended=ended,
        how=how,
        remarks=[*history.remarks, *evaluations.remarks],
    )


class _History:
    """Returns and last row of a file of rows; no row stays in memory after it is read.

    Attributes:
        points: Returns in order of environment steps, whatever the order of the rows.
        last: Row with the most environment steps.
        env_steps: Environment steps of the last row.
        remarks: Sentences on rows that are repeated, out of order or missing.
    """

    def __init__(self, rows: RowReader, score: str) -> None:
        returns: dict[int, float] = {}
        self.last: Mapping[str, Any] = {}
        self.env_steps = 0
        for row in rows:
            env_steps = whole_number(row.get("env_steps")) or 0
            if env_steps >= self.env_steps:
                self.last, self.env_steps = row, env_steps
            value = _number(row.get(score))
            if env_steps and value is not None:
                returns[env_steps] = value
        self.points = [Point(env_steps, returns[env_steps]) for env_steps in sorted(returns)]
        self.remarks = rows.remarks


def _number(value: object) -> float | None:
    """A number as the history spells it; ``None`` for a null, where no episode had ended."""
    if isinstance(value, str):
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _finite(value: object) -> float:
    number = _number(value)
    return number if number is not None and math.isfinite(number) else 0.0


def _below(path: Path) -> list[Path]:
    """Run directories in a folder and in the folders below, each of which is searched once."""
    found: list[Path] = []
    seen: set[Path] = set()
    folders = [(path, 0)]
    while folders:
        folder, depth = folders.pop()
        if (folder / "rank0").is_dir() or (folder / "config.yaml").is_file():
            found.append(folder)
        elif folder.is_dir() and folder.resolve() not in seen and depth < _DEEPEST_FOLDER:
            seen.add(folder.resolve())
            folders += [(inner, depth + 1) for inner in folder.iterdir() if inner.is_dir()]
    return found


def _naturally(path: Path) -> list[Any]:
    """A sort key by which ``seed10`` comes after ``seed9``."""
    pieces = re.split(r"(\d+)", str(path))
    return [int(piece) if piece.isdecimal() else piece for piece in pieces]


def _settings(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    model = cast(dict[str, Any], content).get("model") if isinstance(content, dict) else None
    require(isinstance(model, dict), str(path), "hold the settings of a run under 'model'", model)
    settings = cast(dict[str, Any], content)
    others = {key: value for key, value in settings.items() if key != "model"}
    return dict(_flat(cast(dict[str, Any], model))) | dict(_flat(others))


class _Loader(yaml.SafeLoader):
    """A YAML loader with a bound on merge keys, of which a few lines can mean billions of keys."""

    @override
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:
            raise ValueError(f"it has more than {_MOST_KEYS:,} keys in one place")


def read_yaml(path: Path) -> Any:
    """Settings of a YAML file as plain data, with text for values that JSON does not know.

    Raises:
        ValueError: If the file cannot be read, or has entries without end.
    """
    try:
        content = parse_yaml(read_file(path))
        return parse_json(strict_json(content).encode())
    except Exception as error:  # values may be of any kind
        reason = " ".join((str(error) or type(error).__name__).split())
    raise ValueError(f"{path} must be a readable YAML file: {reason}.")


def parse_yaml(content: bytes) -> Any:
    """The value of a YAML text, within limits that every reader can rely on.

    Raises:
        ValueError: If ``content`` is no YAML, is too long, or has entries without end.
    """
    if len(content) > _MOST_YAML_BYTES:
        raise ValueError(f"it is longer than {_MOST_YAML_BYTES:,} bytes")
    try:
        value: Any = yaml.load(content, _Loader)
        refuse_unbounded(value)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except Exception as error:  # the parser raises whatever damaged text makes of it
        raise ValueError(str(error) or type(error).__name__) from error
    return value


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Settings by their names on the command line: ``env.num_envs``, without ``init_args``."""
    for key, value in settings.items():
        name = prefix if key == "init_args" else f"{prefix}{key}."
        if isinstance(value, dict):
            yield from _flat(cast(dict[str, Any], value), name)
        elif isinstance(value, list) and any(isinstance(x, dict) for x in cast(list[Any], value)):
            entries = {str(i): entry for i, entry in enumerate(cast(list[Any], value))}
            yield from _flat(entries, name)
        else:
            plain = cast(object, value)
            yield name[:-1], _class_name(str(plain)) if key == "class_path" else plain


def _class_name(path: str) -> str:
    """Package and class of a path, because a package may export a class from several modules."""
    package, _, name = path.rpartition(".")
    return f"{package.partition('.')[0]}.{name}" if package else name


def _end(directory: Path, *, is_short: bool) -> tuple[Any, str]:
    try:
        ranks = examine(directory)
    except ValueError:
        return "died", "left nothing but its config"
    first = first_failure(ranks)
    if first is not None:
        happened = "" if first.report is None else first.report.what_happened
        what = happened or "its process vanished without a report"
        where = "" if len(ranks) == 1 else f" (rank {first.rank})"
        short = textwrap.shorten(what[:1000].rstrip("."), _LONGEST_REASON, placeholder="...")
        return "died", f"died{where}: {short}"
    if ranks[0].state == "running":
        return "running", "still running, or died on another machine"
    if not is_short:
        return "finished", "finished"
    if ranks[0].state == "finished":
        return "stopped", "stopped before its budget"
    return "unknown", "ended before its budget, nobody knows how"


def identity(value: Any) -> str:
    """A text that is equal for equal settings, whatever their type."""
    return json.dumps(value, sort_keys=True, default=str)


def read_metrics(path: Path) -> dict[str, list[Point]]:
    """Every metric of a file of rows, each in order of environment steps.

    Args:
        path: A history, or the evaluations of a run; a missing file has no metrics.

    Returns:
        Values by name of the metric, those that are not finite among them. Of several rows at the
        same environment steps, the one that was written last counts.

    Raises:
        ValueError: If the file cannot be read.
    """
    metrics: dict[str, dict[int, float]] = defaultdict(dict)
    for row in RowReader(path):
        env_steps = whole_number(row.get("env_steps")) or 0
        for name, value in row.items():
            number = _number(value)
            if env_steps and name not in _COUNTERS and number is not None:
                metrics[name][env_steps] = number
    return {
        name: [Point(env_steps, values[env_steps]) for env_steps in sorted(values)]
        for name, values in metrics.items()
    }
