"""The page of one run: how it ended, its curves, where its time went, and what it was run with."""
# Settings and records of all versions are read as they are.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import base64
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from esper_lightning.cli.crash_text import describe, seconds_by_phase
from esper_lightning.cli.pages.chart import Line, line_chart, thinned
from esper_lightning.cli.pages.elements import Markup, element, page, table
from esper_lightning.comparison.runs import SCORES, Point, Run, read_metrics, read_run, read_yaml
from esper_lightning.comparison.section import number
from esper_lightning.forensics.files import strict_json
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import parse_json, read_file
from esper_lightning.forensics.remains import Remains, examine, first_failure
from esper_lightning.forensics.trace import OperatorSum, summarize

__all__ = ["PAGE", "REFRESH_S", "environment_name", "run_page"]

PAGE = "report.html"
"""Name of the page in its run directory."""
REFRESH_S = 10
"""Seconds after which the page of a running run is loaded again."""
_MOST_VIDEO_BYTES = 16 << 20  # of all videos that the page holds; others are named
_MOST_PHASES, _MOST_OPERATORS = 10, 15
_GROUPS = {
    "rollout": "Rollouts",
    "eval": "Evaluations",
    "loss": "Losses",
    "policy": "Policy",
    "optim": "Optimizer",
    "env": "Environment",
}
_SHORT = {"episode_return_mean": "return", "episode_length_mean": "length"}


def run_page(directory: Path) -> str:
    """The page of a run, as one HTML file that needs no network.

    Args:
        directory: Run directory of a run that has ended, died or is running.

    Raises:
        ValueError: If there is no run, or the history or config cannot be read.
    """
    run, layout = read_run(directory), RunLayout(directory)
    try:
        ranks = examine(directory)
    except ValueError:  # the run left nothing but its config
        ranks = []
    first = first_failure(ranks)
    metrics = read_metrics(layout.rank(0).history)
    evaluations = read_metrics(layout.rank(0).evaluations)
    title = f"{environment_name(run)}, seed {run.seed}"
    sections = [
        element("p", element("span", run.how, class_=f"chip {run.ended}")),
        element("p", str(directory.absolute()), class_="quiet"),
        _facts(run, metrics),
        *(element("p", remark, class_="quiet") for remark in run.remarks),
        *_death(directory, ranks, first),
        *_returns(metrics, evaluations),
        *_other_metrics({**metrics, **evaluations}),
        *_stages(first or (ranks[0] if ranks else None)),
        *_profile(first or (ranks[0] if ranks else None)),
        *_videos(directory),
        *_config(layout.config),
        *_process(layout.rank(0).process),
    ]
    return page(title, *sections, refresh_s=REFRESH_S if run.ended == "running" else None)


def environment_name(run: Run) -> str:
    """The environment of a run in a word: the task of a simulator, or the name of the class."""
    own = str(run.settings.get("env.class_path", "Run")).rpartition(".")[2]
    task = run.settings.get("env.id") or run.settings.get("env.name")
    return f"{own} {task}" if isinstance(task, str) else own


def _facts(run: Run, metrics: Mapping[str, list[Point]]) -> Markup:
    facts: dict[str, str] = {}
    for score, points in run.points.items():
        finite = [point for point in points if math.isfinite(point.value)]
        if finite:
            facts[f"latest return of {score}s"] = number(finite[-1].value)
            facts[f"best return of {score}s"] = number(max(point.value for point in finite))
    budget = "" if run.budget is None else f" of {run.budget:,}"
    facts[f"environment steps{budget}"] = f"{run.env_steps:,}"
    facts["training time"] = _duration(run.time_s)
    if run.time_s > 0:
        facts["environment steps a second"] = f"{run.env_steps / run.time_s:,.0f}"
    rates = [p.value for p in metrics.get("env_steps_per_s", ()) if math.isfinite(p.value)]
    if rates:
        facts["steps a second, median iteration"] = f"{sorted(rates)[len(rates) // 2]:,.0f}"
    cells = [element("div", element("b", v), element("span", k)) for k, v in facts.items()]
    return element("div", *cells, class_="facts")


def _death(directory: Path, ranks: list[Remains], first: Remains | None) -> list[Markup]:
    """What ``esper crash`` prints, for a run that died."""
    if first is None:
        return []
    if first.trace_path is not None:
        try:
            first.trace = summarize(first.trace_path)
        except (FileNotFoundError, ValueError) as error:
            first.unreadable[first.trace_path.name] = str(error)
    text = "\n".join(describe(directory, ranks, first)[2:])  # without the directory
    return [element("h2", "How the run died"), element("pre", text)]


def _returns(
    metrics: Mapping[str, list[Point]], evaluations: Mapping[str, list[Point]]
) -> list[Markup]:
    lines = [
        _line(points, name=name, colour=k)
        for k, (name, points) in enumerate(
            (
                ("deterministic evaluations", evaluations.get(SCORES["evaluation"], [])),
                ("rollouts", metrics.get(SCORES["rollout"], [])),
            )
        )
        if points
    ]
    if not lines:
        return []
    charts = [line_chart("Mean return of episodes", lines)]
    if "env_steps_per_s" in metrics:
        speed = _line(metrics["env_steps_per_s"], colour=2)
        charts.append(line_chart("Environment steps a second", [speed]))
    return [element("h2", "Learning"), element("div", *charts, class_="charts large")]


def _other_metrics(metrics: Mapping[str, list[Point]]) -> list[Markup]:
    groups: dict[str, list[Markup]] = {}
    for name, points in metrics.items():
        if name in (*SCORES.values(), "env_steps_per_s"):
            continue
        group, _, rest = name.rpartition("/")
        short = _SHORT.get(rest, rest.replace("_", " "))
        figure = line_chart(short, [_line(points)])
        groups.setdefault(_GROUPS.get(group, group or "Others"), []).append(figure)
    return [
        markup
        for group, charts in groups.items()
        for markup in (element("h2", group), element("div", *charts, class_="charts"))
    ]


def _line(points: list[Point], *, name: str = "", colour: int = 0) -> Line:
    x, y = [point.env_steps for point in points], [point.value for point in points]
    return thinned(x, y, name=name, colour=colour)


def _stages(remains: Remains | None) -> list[Markup]:
    phases = None if remains is None else remains.phases
    seconds = seconds_by_phase(phases)
    if phases is None or not seconds:
        return []
    iterations = {span.iteration for span in phases.closed}
    whole, most = sum(seconds.values()) or 1.0, max(seconds.values()) or 1.0
    cells: list[Markup] = []
    for name, s in list(seconds.items())[:_MOST_PHASES]:
        bar = element("i", style=f"width: {100 * max(0.0, s) / most:.1f}%")
        cells += [element("span", name), bar, element("span", f"{s:.3f} s, {s / whole:.1%}")]
    where = f"Self time in iterations {min(iterations)} to {max(iterations)}."
    heading = element("h2", "Where time went")
    return [heading, element("p", where, class_="quiet"), element("div", *cells, class_="bars")]


def _profile(remains: Remains | None) -> list[Markup]:
    if remains is None or remains.trace_path is None:
        return []
    heading = element("h2", "Operators of the latest profiled window")
    path = element("p", str(remains.trace_path), class_="quiet")
    try:
        found = remains.trace or summarize(remains.trace_path)
    except (FileNotFoundError, ValueError) as error:
        return [heading, path, element("p", f"It cannot be read: {error}")]
    rows = [*_operators(found.device_operators, "device"), *_operators(found.operators, "host")]
    head = ["operator", "where", "self ms", "total ms", "calls"]
    return [heading, path, table(head, rows)]


def _operators(operators: Iterable[OperatorSum], where: str) -> list[list[str]]:
    return [
        [o.name, where, f"{o.self_us / 1e3:,.3f}", f"{o.total_us / 1e3:,.3f}", f"{o.calls:,}"]
        for o in list(operators)[:_MOST_OPERATORS]
    ]


def _videos(directory: Path) -> list[Markup]:
    """Videos of the run, within the page as long as they are small."""
    shown: list[Markup] = []
    room = _MOST_VIDEO_BYTES
    for path in sorted((directory / "videos").glob("*.mp4"), reverse=True):
        name = path.relative_to(directory).as_posix()
        try:
            content = read_file(path, most_bytes=room)
        except (FileNotFoundError, ValueError):
            shown.append(element("p", f"Not shown here: {name}", class_="quiet"))
            continue
        room -= len(content)
        data = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
        video = element("video", src=data, controls="", loop="", muted="", playsinline="")
        shown += [element("p", name, class_="quiet"), video]
    return [element("h2", "Videos"), *shown] if shown else []


def _config(path: Path) -> list[Markup]:
    rows = [[name, value] for name, value in flat_settings(read_yaml(path))]
    summary = element("summary", "All settings")
    details = element("details", summary, table(["setting", "value"], rows))
    return [element("h2", "Settings"), details]


def _process(path: Path) -> list[Markup]:
    """What is known of the process of the first rank, as it was written at its start."""
    try:
        record = parse_json(read_file(path))
    except (FileNotFoundError, ValueError):
        return []
    if not isinstance(record, dict):
        return []
    rows = [[name, value] for name, value in flat_settings(record)]
    summary = element("summary", "Process, versions and machine of rank 0")
    return [element("details", summary, table(["", ""], rows))]


def flat_settings(settings: object, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Settings by their dotted names, with their values as text."""
    if isinstance(settings, dict) and settings:
        for key, value in settings.items():
            name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
            yield from flat_settings(value, name)
    elif isinstance(settings, list) and any(isinstance(entry, dict) for entry in settings):
        for k, entry in enumerate(settings):
            yield from flat_settings(entry, f"{prefix}.{k}")
    else:
        is_text = isinstance(settings, str)
        yield prefix, settings if is_text else strict_json(settings).strip()


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
