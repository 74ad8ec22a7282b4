"""The text that ``esper crash`` prints. Standard library only."""

import itertools
import shlex
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from esper_lightning.forensics.deaths import failing_iteration
from esper_lightning.forensics.fingerprint import Fingerprint
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.phases import Phases
from esper_lightning.forensics.processes import ProcessIdentity, is_alive
from esper_lightning.forensics.rank_record import SCHEMA
from esper_lightning.forensics.remains import (
    Remains,
    Window,
    culprit_of_hang,
    examine,
    rank_folders,
)
from esper_lightning.forensics.replay import ReplayRecord, can_start_again, judge
from esper_lightning.forensics.report import CgroupCounters, CrashReport, Evidence, NonFiniteReport

__all__ = ["describe", "seconds_by_phase"]

_WIDTH, _COLUMN, _NAME = 100, 15, 60
_MOST_RANKS = 16  # ranks that left nothing and are listed by number
_MOST_WINDOWS = 4
_LATER_S = 5.0  # seconds by which the time of a file may be later than the death
# Columns of the last rows that are printed first; other columns of the history follow.
_COLUMNS = (
    "iteration",
    "env_steps",
    "rollout/episode_return_mean",
    "loss/policy",
    "loss/value",
    "loss",
    "optim/grad_norm",
)


def describe(directory: Path, ranks: list[Remains], first: Remains | None) -> list[str]:
    """The lines that ``esper crash`` prints.

    Args:
        directory: Run directory.
        ranks: Remains of each rank.
        first: Remains of the rank that failed first; ``None`` if no rank failed.
    """
    lines = [f"Run directory: {directory}", ""]
    if len(ranks) > 1 or (ranks[0].world_size or 1) > 1:
        lines += [*_side_by_side(ranks), ""]
    known = {rank.rank for rank in ranks}
    others = ", ".join(f"rank{k}" for k in rank_folders(directory) if k not in known)
    if others:
        lines += [f"Of an earlier run, and not shown: {_cut(others, _NAME)}", ""]
    lines += [
        f"Rank {rank.rank}: {name} is there and cannot be read: {_cut(reason, _NAME)}"
        for rank in ranks
        for name, reason in rank.unreadable.items()
    ]
    if first is None:
        states = sorted({rank.state for rank in ranks})
        lines.append(f"No death on record: {', '.join(states)}.")
        lines += [
            f"Rank {rank.rank} hung in iteration {rank.report.iteration}, and continued."
            for rank in ranks
            if rank.report is not None
        ]
        culprit = culprit_of_hang(ranks)
        if culprit is not None:
            lines.append(f"The others waited for rank {culprit.rank}.")
        return [*lines, *_last_rows(ranks[0]), *_again(directory, ranks, None)]
    lines += [*_death(first, ranks), ""]
    sections = (_where_time_went, _last_rows, _evidence, _operators)
    for section in sections:
        lines += [*section(first), ""]
    return lines[:-1] + _again(directory, ranks, first)


def _again(directory: Path, ranks: list[Remains], first: Remains | None) -> list[str]:
    """The line to type for a replay; for a replay, the verdict."""
    record = ReplayRecord.read(directory)
    if record is not None:
        try:
            verdict = judge(directory, examine(*record.directories))
        except ValueError as error:
            return ["", f"A replay of {record.run_dir}. {error}"]
        return ["", f"A replay of {record.run_dir}:", *verdict.lines]
    if first is None:
        return []
    places = dict.fromkeys([directory, *(rank.directory for rank in ranks)])
    how = " ".join(["esper replay", *map(shlex.quote, map(str, places))])
    if _is_elsewhere(first, ranks):
        how += " DIR_OF_THE_OTHER_HOST"
    if not any(can_start_again(RunLayout(place).config) for place in places):
        how = "in Python, replay(trainer, model, RUN_DIR)"
    return ["", f"To play it again, up to iteration {failing_iteration(first)}:", f"    {how}"]


def _is_elsewhere(first: Remains, ranks: list[Remains]) -> bool:
    """Whether a rank that left nothing here failed before the ranks that did."""
    return not first.is_first_cause and len(ranks) < (first.world_size or 0)


def describe_start(owner: dict[str, Any]) -> str:
    """A sentence about a run that has recorded nothing, by the owner of its directory."""
    process = f"Process {owner.get('pid')} on {owner.get('host')}"
    how = {
        True: "is starting, and has recorded nothing yet",
        False: "vanished while it was starting, before it could record anything",
        None: "has recorded nothing; whether it lives cannot be seen from here",
    }
    return f"{process} {how[is_alive(ProcessIdentity.from_dict(owner))]}."


def _side_by_side(ranks: list[Remains]) -> list[str]:
    lines = [f"{'rank':>4}  {'state':<9}{'cause':<11}{'time':<17}{'rows':>6}  what"]
    known = {rank.rank for rank in ranks}
    world = max(rank.world_size or 1 for rank in ranks)
    start = min(rank.time_s for rank in ranks)
    for rank in ranks:
        report = rank.report or CrashReport()
        when = "-" if rank.report is None else f"+{rank.time_s - start:.2f} s"
        what, cause = _cut(report.what_happened, 50), report.cause or "-"
        lines.append(f"{rank.rank:>4}  {rank.state:<9}{cause:<11}{when:<17}{rank.rows:>6}  {what}")
    absent = world - len(known)
    named = (rank for rank in range(world) if rank not in known)
    lines += [f"{rank:>4}  left nothing" for rank in itertools.islice(named, _MOST_RANKS)]
    if absent > _MOST_RANKS:
        lines.append(f"      {absent - _MOST_RANKS} more left nothing")
    return lines


def _death(first: Remains, ranks: list[Remains]) -> list[str]:
    report = first.report
    if report is None:
        without = "its process vanished without a report"
        if first.state != "vanished":
            without = "how is not known, for there is no report that can be read"
        phases = " > ".join(span.name for span in first.phases.open) if first.phases else "unknown"
        iteration = first.phases.iteration if first.phases else "unknown"
        return [
            f"Rank {first.rank} failed first: {without}.",
            f"Iteration {iteration}, in: {phases}",
        ]
    lines = [f"Rank {first.rank} failed first: {report.what_happened}"]
    if not first.is_first_cause:  # and no other rank that left something is the first cause
        why = (
            "its folder is on another host"
            if _is_elsewhere(first, ranks)
            else "no rank reports why"
        )
        lines = [f"Rank {first.rank} lost a peer; {why}.", _cut(report.what_happened, _WIDTH)]
    if report.schema != SCHEMA:
        lines.append(f"(Written with schema {report.schema}; this reads {SCHEMA}.)")
    when, status, signal = report.time_s, report.exit_status, report.signal
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if when else "at a time unknown"
    how = [at, report.cause or "for a cause unknown"]
    how += [f"signal {signal}"] if signal else []
    how += [] if status is None else [f"exit status {status}"]
    lines.append(f"{', '.join(how)}, pid {report.pid or 'unknown'}")
    lines += [*_memory(report), *_conditions(first)]
    if report.error is not None and report.error.non_finite is not None:
        lines.append(_where_not_finite(report.error.non_finite))
    phases, iteration, metrics = report.phases, report.iteration, report.metrics
    lines.append(f"Iteration {'unknown' if iteration is None else iteration}, in:")
    lines += [f"    {name}" for name in phases] or ["    no phase was open"]
    if metrics:
        text = ", ".join(f"{name} {_number(value)}" for name, value in list(metrics.items())[:8])
        lines.append(f"Last metrics: {text}")
    traceback = () if report.error is None else report.error.traceback
    return lines + [f"    {line}"[:100] for line in traceback[-8:]]


def _conditions(first: Remains) -> list[str]:
    """The commit of the program, and what differs from the run before."""
    found, differences = first.fingerprint or Fingerprint(), first.differences
    changes = {None: "", "": ""}.get(found.changes, ", with changes that are not committed")
    lines = [f"Commit {found.commit[:10]}{changes}"] if found.commit else []
    if differences:
        lines += ["Other than in the run before:", *(f"    {_cut(d, _NAME)}" for d in differences)]
    return lines


def _memory(report: CrashReport) -> list[str]:
    """A line about the memory of the process and the kernel's counters of its control group."""
    memory, cgroup = report.memory, report.cgroup or CgroupCounters()
    counts: dict[str, int | None] = {}
    if memory is not None:
        counts |= {"rss": memory.rss_bytes, "peak": memory.peak_bytes}
        counts |= {"limit": memory.limit_bytes, "available": memory.available_bytes}
    numbers = [
        f"{name} {count / 1e9:.2f} GB"
        for name, count in counts.items()
        if count is not None and 0 <= count < 1 << 60
    ]
    after = cgroup.after
    numbers += [f"{name} {count} -> {after.get(name)}" for name, count in cgroup.before.items()]
    return [_cut(f"Memory: {', '.join(numbers)}", _WIDTH)] if numbers else []


def _where_not_finite(found: NonFiniteReport) -> str:
    where = f", environments {list(found.environments)}" if found.environments else ""
    return f"Not finite, in {found.phase}: {', '.join(found.tensors)}{where}"[:100]


def seconds_by_phase(phases: Phases | None) -> dict[str, float]:
    """Seconds of self time in each phase, over the latest closed spans; the longest first."""
    seconds: dict[str, float] = defaultdict(float)
    nested: dict[int, float] = defaultdict(float)  # seconds in spans of each depth
    for span in phases.closed if phases else []:
        duration = (span.end_ns - span.begin_ns) / 1e9
        seconds[span.name] += duration - nested.pop(span.depth + 1, 0.0)
        nested[span.depth] += duration
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _where_time_went(first: Remains) -> list[str]:
    seconds = seconds_by_phase(first.phases)
    if not seconds or first.phases is None:
        return ["No phases on record."]
    iterations = {span.iteration for span in first.phases.closed}
    lines = [f"Where time went, iterations {min(iterations)} to {max(iterations)} (self time):"]
    whole = sum(seconds.values()) or 1.0
    shown = list(seconds.items())[:8]
    return lines + [f"{s:>10.3f} s {s / whole:>6.1%}  {_cut(name, _NAME)}" for name, s in shown]


def _last_rows(first: Remains) -> list[str]:
    if not first.history:
        state = (first.report or CrashReport()).evidence.get("history", Evidence()).state
        unknown = "history.jsonl" in first.unreadable or first.damaged_rows > 0
        unknown |= state == "failed"  # the disk took no row
        return ["No row of the history can be read." if unknown else "No iteration was finished."]
    columns = _columns(first.history)
    fitting = columns[: _WIDTH // _COLUMN]
    lines = [f"Last of {first.rows} rows:", "".join(f"{h:>{_COLUMN}}" for h in _heads(fitting))]
    lines += [
        "".join(f"{_number(row.get(name)):>{_COLUMN}}" for name in fitting) for row in first.history
    ]
    if len(columns) > len(fitting):
        lines.append(f"Not shown: {_cut(', '.join(columns[len(fitting) :]), _NAME)}")
    if first.damaged_rows:
        lines.append(f"{first.damaged_rows} lines are damaged and skipped.")
    return lines + first.remarks


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the columns that hold numbers, those of ``_COLUMNS`` first."""
    numbers = (name for row in rows for name, value in row.items() if _is_number(value))
    names = dict.fromkeys(numbers)
    return [*(name for name in _COLUMNS if name in names), *(n for n in names if n not in _COLUMNS)]


def _heads(columns: list[str]) -> list[str]:
    """Heads of columns: the last word of each name, or all of it where two would be equal."""
    short = [name.rpartition("/")[2].replace("episode_", "") for name in columns]
    heads = [s if short.count(s) == 1 else c for s, c in zip(short, columns, strict=True)]
    return [head if len(head) < _COLUMN else f"..{head[3 - _COLUMN :]}" for head in heads]


def _evidence(first: Remains) -> list[str]:
    evidence = (first.report or CrashReport()).evidence
    lines = ["Evidence:"]
    for name, entry in evidence.items():
        lines.append(f"    {name:<12}{entry.state or '?':<9}{entry.path or ''}")
        if entry.detail:
            lines.append(f"    {'':<21}{entry.detail}"[:100])
    return lines if evidence else ["Evidence: nothing but history and phases."]


def _operators(first: Remains) -> list[str]:
    trace, path = first.trace, first.trace_path
    if trace is None or path is None:
        return ["No trace."]
    window, others = first.windows[-1], first.windows[-2::-1]
    which = "The window that was open at the death"
    if not window.was_open:
        which = f"The latest closed window; it ended {_before(first, window)}"
    whole = "" if trace.complete else ", torn or damaged: read as far as it goes"
    if trace.left_out_bytes:
        whole = f", without {trace.left_out_bytes / 1e6:,.0f} MB in the middle, which were not read"
    lines = [
        f"Trace: {path}",
        f"    {which}",
        f"    {trace.events:,} events over {trace.duration_s:.3f} s{whole}",
        f"{'self ms':>12}{'total ms':>12}{'calls':>9}  most time",
    ]
    for row in (*trace.device_operators[:5], *trace.operators[:10]):
        times = f"{row.self_us / 1e3:>12.3f}{row.total_us / 1e3:>12.3f}{row.calls:>9}"
        lines.append(f"{times}  {_cut(row.name, _NAME)}")
    lines.append("Last operators:" if window.was_open else "Last operators of that window:")
    lines += [f"{op.duration_us:>12.1f} us  {_cut(op.name, _NAME)}" for op in trace.last]
    lines += ["Other windows:"] if others else []
    lines += [f"    {_before(first, other):>30}  {other.path}" for other in others[:_MOST_WINDOWS]]
    return lines


def _before(first: Remains, window: Window) -> str:
    before_s = first.failed_at_s - window.ended_s
    if not -_LATER_S < before_s < float("inf"):  # perhaps because the files were copied
        return "at a time unknown"
    return f"{max(0.0, before_s):.1f} s before the death"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else _cut(str(value), _COLUMN - 1)


def _cut(text: str, width: int) -> str:
    text = " ".join(text[: 1 << 16].split())
    return text if len(text) <= width else text[: width - 3] + "..."
