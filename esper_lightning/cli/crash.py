"""``esper crash RUN_DIR``: how a run died, from what it left. Standard library only."""
# Reports are read as they are, from whatever version wrote them.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import argparse
import dataclasses
import json
import os
import socket
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.forensics.phases import Phases, read_phases
from esper_lightning.forensics.report import SCHEMA, read_report
from esper_lightning.forensics.trace import TraceSummary, summarize

__all__ = ["Remains", "examine", "run"]

_ROWS, _NAME = 5, 60
_NOTICED_S = 2.0
_COLUMNS = (
    "iteration",
    "env_steps",
    "rollout/episode_return_mean",
    "loss/policy",
    "loss/value",
    "loss",
    "optim/grad_norm",
)


@dataclasses.dataclass(kw_only=True)
class Remains:
    """What one rank left."""

    rank: int
    state: str  # finished, running, failed, vanished, unknown
    report: dict[str, Any] | None
    history: list[dict[str, Any]]
    damaged_rows: int
    phases: Phases | None
    trace_path: Path | None
    trace: TraceSummary | None = None

    @property
    def time_s(self) -> float:
        """When it failed; infinite if it did not."""
        return float((self.report or {}).get("time_s") or float("inf"))

    @property
    def failed(self) -> bool:
        """Whether it died; a hang after which the run went on is no death."""
        hung = self.report is not None and self.report.get("cause") == "hang"
        alive = hung and self.state in ("finished", "running")
        return (self.report is not None and not alive) or self.state == "vanished"

    @property
    def is_first_cause(self) -> bool:
        """Whether it failed for a reason of its own."""
        return self.state == "vanished" or (
            self.report is not None and self.report.get("cause") != "peer"
        )


def run(arguments: list[str]) -> None:
    """Print the report; exit status 2 where there is no run."""
    parser = argparse.ArgumentParser(prog="esper crash", description="How a run died.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    options = parser.parse_args(arguments)
    try:
        ranks = examine(options.run_dir)
    except ValueError as error:
        print(f"esper: error: {error}", file=sys.stderr)
        sys.exit(2)
    first = first_failure(ranks)
    if first is not None and first.trace_path is not None:
        try:
            first.trace = summarize(first.trace_path)
        except OSError as error:
            print(f"esper: {first.trace_path}: {error}", file=sys.stderr)
    if options.json:
        print(json.dumps(_as_json(ranks, first), default=str, indent=2))
    else:
        print("\n".join(_text(options.run_dir, ranks, first)))


def examine(directory: Path) -> list[Remains]:
    """What each rank left.

    Raises:
        ValueError: If the directory is not that of a run.
    """
    folders = sorted(
        (path for path in directory.glob("rank*") if path.name[4:].isdigit()),
        key=lambda path: int(path.name[4:]),
    )
    if not folders:
        raise ValueError(f"RUN_DIR must hold rank folders (rank0, ...), got {str(directory)!r}.")
    layout = RunLayout(directory)
    # Of the latest run; one with more ranks may have been here before.
    processes = [read_report(RankLayout(folder).process) or {} for folder in folders]
    latest = max(processes, key=lambda process: process.get("started_s") or 0.0)
    world_size = latest.get("world_size") or sys.maxsize
    folders = [path for path in folders if int(path.name[4:]) < world_size]
    return [_remains(int(path.name[4:]), layout.rank(int(path.name[4:]))) for path in folders]


def first_failure(ranks: list[Remains]) -> Remains | None:
    """The rank that failed first, for a reason of its own if any did."""
    failed = [rank for rank in ranks if rank.failed]
    own = [rank for rank in failed if rank.is_first_cause]
    return min(own or failed, key=_failed_at, default=None)


def _failed_at(remains: Remains) -> float:
    """A process that vanished is noticed later than it did, and by its peers at the same moment."""
    cause = (remains.report or {}).get("cause")
    vanished = remains.state == "vanished" or cause == "vanished"
    if remains.report is None and remains.phases is not None and remains.phases.open:
        return remains.phases.open[-1].begin_ns / 1e9
    return remains.time_s - (_NOTICED_S if vanished else 0.0)


def _remains(rank: int, files: RankLayout) -> Remains:
    process, report = read_report(files.process) or {}, read_report(files.crash)
    state = str(process.get("state", "unknown"))
    if state == "running" and process.get("host") == socket.gethostname():
        try:
            os.kill(int(process["pid"]), 0)
        except (OSError, KeyError, ValueError):
            state = "vanished"
    try:
        phases = read_phases(files.phases)
    except (OSError, ValueError):
        phases = None
    rows, damaged = _read_history(files.history)
    return Remains(
        rank=rank,
        state=state,
        report=report,
        history=rows,
        damaged_rows=damaged,
        phases=phases,
        trace_path=_newest_trace(files, report, process.get("started_s") or 0.0),
    )


def _read_history(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows, and how many lines cannot be read."""
    try:
        return read_json_lines(path), 0
    except ValueError:
        rows: list[dict[str, Any]] = []
        lines = path.read_bytes().splitlines()
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)  # pyright: ignore[reportUnknownArgumentType]
        return rows, len(lines) - len(rows)


def _newest_trace(
    files: RankLayout, report: dict[str, Any] | None, started_s: float
) -> Path | None:
    """That which the report names, or else the newest of the latest run."""
    named = ((report or {}).get("evidence") or {}).get("trace", {}).get("path")
    if named and (path := files.directory / str(named)).exists():
        return path
    traces = list(files.trace.glob("*.pt.trace.json*")) if files.trace.is_dir() else []
    traces = [path for path in traces if path.stat().st_mtime >= started_s]
    return max(traces, key=lambda path: path.stat().st_mtime, default=None)


def _as_json(ranks: list[Remains], first: Remains | None) -> dict[str, Any]:
    def plain(remains: Remains) -> dict[str, Any]:
        return {
            "rank": remains.rank,
            "state": remains.state,
            "report": remains.report,
            "last_rows": remains.history[-_ROWS:],
            "rows": len(remains.history),
            "damaged_rows": remains.damaged_rows,
            "open_phases": [span.name for span in remains.phases.open] if remains.phases else [],
            "seconds_by_phase": _seconds_by_phase(remains.phases),
            "trace": remains.trace and remains.trace._asdict(),
            "trace_path": remains.trace_path,
        }

    died = None if first is None else first.rank
    return {"schema": SCHEMA, "first_failure": died, "ranks": [plain(rank) for rank in ranks]}


def _text(directory: Path, ranks: list[Remains], first: Remains | None) -> list[str]:
    lines = [f"Run directory: {directory}", ""]
    if len(ranks) > 1:
        lines += [*_side_by_side(ranks), ""]
    if first is None:
        states = sorted({rank.state for rank in ranks})
        lines.append(f"No death on record: {', '.join(states)}.")
        lines += [
            f"Rank {rank.rank} hung in iteration {rank.report.get('iteration')}, and went on."
            for rank in ranks
            if rank.report is not None
        ]
        return [*lines, *_last_rows(ranks[0])]
    sections = (_death, _where_time_went, _last_rows, _evidence, _operators)
    for section in sections:
        lines += [*section(first), ""]
    return lines[:-1]


def _side_by_side(ranks: list[Remains]) -> list[str]:
    lines = [f"{'rank':>4}  {'state':<9}{'cause':<11}{'time':<17}{'rows':>6}  what"]
    known = {rank.rank for rank in ranks}
    world = max((int((r.report or {}).get("world_size") or 1) for r in ranks), default=1)
    start = min(rank.time_s for rank in ranks)
    for rank in ranks:
        report = rank.report or {}
        when = f"+{rank.time_s - start:.2f} s" if report else "-"
        what = _cut(_what(report), 50)
        cause = str(report.get("cause", "-"))
        lines.append(
            f"{rank.rank:>4}  {rank.state:<9}{cause:<11}{when:<17}{len(rank.history):>6}  {what}"
        )
    lines += [f"{rank:>4}  left nothing" for rank in range(world) if rank not in known]
    return lines


def _what(report: dict[str, Any]) -> str:
    error, peer = report.get("error") or {}, report.get("peer") or {}
    if report.get("cause") == "peer":
        return f"rank {peer.get('rank')}: {peer.get('reason')}"
    if error.get("type"):
        return f"{error['type']}: {error.get('message', '')}".rstrip(": ")
    return str(error.get("message") or report.get("signal") or report.get("cause") or "")


def _death(first: Remains) -> list[str]:
    report = first.report
    if report is None:
        phases = " > ".join(span.name for span in first.phases.open) if first.phases else "unknown"
        iteration = first.phases.iteration if first.phases else "unknown"
        return [
            f"Rank {first.rank} failed first: its process vanished without a report.",
            f"Iteration {iteration}, in: {phases}",
        ]
    lines = [f"Rank {first.rank} failed first: {_what(report)}"]
    if report.get("schema") != SCHEMA:
        lines.append(f"(Written with schema {report.get('schema')}; this reads {SCHEMA}.)")
    signal = f", signal {report['signal']}" if report.get("signal") else ""
    status = report.get("exit_status")
    when = report.get("time_s")
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if when else "unknown"
    shown = "" if status is None else f", exit status {status}"
    lines.append(f"{at}, {report.get('cause')}{signal}{shown}, pid {report.get('pid')}")
    found = (report.get("error") or {}).get("non_finite") or {}
    if found:
        where = f", environments {found['environments']}" if found.get("environments") else ""
        names = ", ".join(map(str, found.get("tensors") or []))
        lines.append(f"Not finite, in {found.get('phase')}: {names}{where}"[:100])
    phases = report.get("phases") or []
    lines.append(f"Iteration {report.get('iteration')}, in:")
    lines += [f"    {name}" for name in phases] or ["    no phase was open"]
    metrics = report.get("metrics") or {}
    if metrics:
        text = ", ".join(f"{name} {_number(value)}" for name, value in list(metrics.items())[:8])
        lines.append(f"Last metrics: {text}")
    traceback = (report.get("error") or {}).get("traceback") or []
    return lines + [f"    {line}"[:100] for line in traceback[-8:]]


def _seconds_by_phase(phases: Phases | None) -> dict[str, float]:
    """Self time of the latest closed spans."""
    seconds: dict[str, float] = defaultdict(float)
    nested: dict[int, float] = defaultdict(float)  # by depth
    for span in phases.closed if phases else []:
        duration = (span.end_ns - span.begin_ns) / 1e9
        seconds[span.name] += duration - nested.pop(span.depth + 1, 0.0)
        nested[span.depth] += duration
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _where_time_went(first: Remains) -> list[str]:
    seconds = _seconds_by_phase(first.phases)
    if not seconds or first.phases is None:
        return ["No phases on record."]
    iterations = {span.iteration for span in first.phases.closed}
    lines = [f"Where time went, iterations {min(iterations)} to {max(iterations)} (self time):"]
    whole = sum(seconds.values()) or 1.0
    shown = list(seconds.items())[:8]
    return lines + [f"{s:>10.3f} s {s / whole:>6.1%}  {_cut(name, _NAME)}" for name, s in shown]


def _last_rows(first: Remains) -> list[str]:
    if not first.history:
        return ["No iteration was finished."]
    columns = [name for name in _COLUMNS if any(name in row for row in first.history[-_ROWS:])]
    heads = [name.rpartition("/")[2].replace("episode_", "")[:14] for name in columns]
    lines = [f"Last of {len(first.history)} rows:", "".join(f"{head:>15}" for head in heads)]
    lines += [
        "".join(f"{_number(row.get(name)):>15}" for name in columns)
        for row in first.history[-_ROWS:]
    ]
    if first.damaged_rows:
        lines.append(f"{first.damaged_rows} lines are damaged and left out.")
    return lines


def _evidence(first: Remains) -> list[str]:
    evidence = (first.report or {}).get("evidence") or {}
    lines = ["Evidence:"]
    for name, entry in evidence.items():
        detail = entry.get("detail") or ""
        path = entry.get("path") or ""
        lines.append(f"    {name:<12}{entry.get('state', '?'):<9}{path}")
        if detail:
            lines.append(f"    {'':<21}{detail}"[:100])
    return lines if evidence else ["Evidence: nothing but history and phases."]


def _operators(first: Remains) -> list[str]:
    trace = first.trace
    if trace is None:
        return ["No trace."]
    whole = "" if trace.complete else ", torn: read as far as it goes"
    lines = [
        f"Trace: {first.trace_path}",
        f"    {trace.events:,} events over {trace.duration_s:.3f} s{whole}",
        f"{'self ms':>12}{'total ms':>12}{'calls':>9}  most time",
    ]
    for row in (*trace.device_operators[:5], *trace.operators[:10]):
        times = f"{row.self_us / 1e3:>12.3f}{row.total_us / 1e3:>12.3f}{row.calls:>9}"
        lines.append(f"{times}  {_cut(row.name, _NAME)}")
    lines.append("Last operators:")
    return lines + [f"{op.duration_us:>12.1f} us  {_cut(op.name, _NAME)}" for op in trace.last]


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
