"""Chrome traces of any size, read in bounded memory; torn ones as far as they go."""

import gzip
import json
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

__all__ = ["OperatorSum", "TraceSummary", "sum_nested", "summarize"]

_CHUNK = 1 << 20
_HOST = ("cpu_op", "user_annotation", "python_function", "cpu_instant_event", "cuda_runtime")


class OperatorSum(NamedTuple):
    """All events of one name; in microseconds. Self time leaves out what is nested."""

    name: str
    self_us: float
    total_us: float
    calls: int


class LastOperator(NamedTuple):
    """One of the last things that ran, in microseconds of the trace's clock."""

    name: str
    start_us: float
    duration_us: float


class TraceSummary(NamedTuple):
    """What a trace says; lists are longest self time first, ``last`` is oldest first."""

    complete: bool
    events: int
    duration_s: float
    operators: list[OperatorSum]
    device_operators: list[OperatorSum]
    spans: list[OperatorSum]
    last: list[LastOperator]


def summarize(path: Path, *, top: int = 15, last: int = 15) -> TraceSummary:
    """Where the time of a trace went, and what ran at its end.

    Args:
        path: A ``.pt.trace.json`` or ``.pt.trace.json.gz``.
        top: Rows of each list.
        last: Number of last operators.

    Raises:
        OSError: If the file cannot be opened. Damage within is not an error: ``complete`` tells.
    """
    names: dict[str, int] = {}
    threads: dict[tuple[Any, Any], tuple[array[float], array[float], array[int]]] = {}
    device: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    is_span: set[int] = set()
    complete, events = True, 0
    first, end = float("inf"), float("-inf")
    for event in _events(path):
        if event is None:
            complete = False
            break
        events += 1
        start, duration, name = event.get("ts"), event.get("dur"), event.get("name")
        kind = event.get("cat")
        timed = isinstance(start, int | float) and isinstance(duration, int | float)
        if event.get("ph") != "X" or not timed or kind == "Trace":
            continue
        start, duration = cast(float, start), cast(float, duration)
        first, end = min(first, start), max(end, start + duration)
        if kind not in _HOST:
            _add(device[str(name)], duration, duration)
            continue
        identity = names.setdefault(str(name), len(names))
        if kind == "user_annotation":
            is_span.add(identity)
        key = (event.get("pid"), event.get("tid"))
        if key not in threads:
            threads[key] = (array("d"), array("d"), array("l"))
        starts, durations, identities = threads[key]
        starts.append(start)
        durations.append(duration)
        identities.append(identity)
    table = list(names)
    sums: list[list[float]] = [[0.0, 0.0, 0] for _ in table]
    latest: list[LastOperator] = []
    for columns in threads.values():
        latest += _sum_thread(columns, table, sums, is_span, last)
    by_name = [OperatorSum(name, *_typed(entry)) for name, entry in zip(table, sums, strict=True)]
    return TraceSummary(
        complete,
        events,
        max(0.0, end - first) / 1e6 if events and end > first else 0.0,
        _ranked([row for i, row in enumerate(by_name) if i not in is_span], top),
        _ranked([OperatorSum(name, *_typed(entry)) for name, entry in device.items()], top),
        _ranked([row for i, row in enumerate(by_name) if i in is_span], top),
        sorted(latest, key=lambda operator: operator.start_us)[-last:],
    )


def _sum_thread(
    columns: "tuple[array[float], array[float], array[int]]",
    table: list[str],
    sums: list[list[float]],
    is_span: set[int],
    last: int,
) -> list[LastOperator]:
    """Add one thread's events to ``sums``; returns its last operators."""
    starts, durations, identities = columns
    order = sum_nested(starts, durations, identities, sums)
    latest: list[LastOperator] = []
    for i in reversed(order):
        if identities[i] not in is_span:
            latest.append(LastOperator(table[identities[i]], starts[i], durations[i]))
        if len(latest) == last:
            break
    return latest


def sum_nested(
    starts: Sequence[float],
    durations: Sequence[float],
    identities: Sequence[int],
    sums: list[list[float]],
) -> list[int]:
    """Add the events of one thread to their names' self time, total time and calls.

    As ``key_averages`` does, an event that holds nothing but one of its own name counts once.

    Args:
        starts: Of each event.
        durations: In the same unit.
        identities: Which entry of ``sums`` an event belongs to.
        sums: Self time, total time and calls by name, added to in place.

    Returns:
        The order of the events in time, outer ones first.
    """
    order = sorted(range(len(starts)), key=lambda i: (starts[i], -durations[i]))
    open_events: list[list[float]] = []  # end, identity, children, duration of one like itself

    def close() -> None:
        _, identity, children, like_itself = open_events.pop()
        if children == 1 and like_itself >= 0:
            sums[int(identity)][1] -= like_itself
            sums[int(identity)][2] -= 1

    for i in order:
        start, duration, identity = starts[i], durations[i], identities[i]
        while open_events and open_events[-1][0] <= start:
            close()
        if open_events:
            parent = open_events[-1]
            sums[int(parent[1])][0] -= duration
            parent[2] += 1
            parent[3] = duration if parent[1] == identity else -1
        _add(sums[identity], duration, duration)
        open_events.append([start + duration, identity, 0, -1])
    while open_events:
        close()
    return order


def _events(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects in ``traceEvents`` one after another; ``None`` at the end of a torn file."""
    decoder = json.JSONDecoder()
    text, at, ended = "", 0, False
    chunks = _chunks(path)
    while '"traceEvents"' not in text:
        chunk = next(chunks, None)
        if chunk is None:
            yield None
            return
        text += chunk
    at = text.index("[", text.index('"traceEvents"')) + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at < len(text) and text[at] == "]":
            for _ in chunks:  # to see a torn end
                pass
            return
        try:
            event, at = decoder.raw_decode(text, at)
        except ValueError:
            chunk = None if ended else next(chunks, None)
            if chunk is None:
                yield None
                return
            text, at = text[at:] + chunk, 0
            continue
        if isinstance(event, dict):
            yield cast(dict[str, Any], event)


def _chunks(path: Path) -> Iterator[str]:
    """Text of a plain or packed file, as far as it can be read."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        while True:
            try:
                content = file.read(_CHUNK)
            except (EOFError, OSError, zlib.error):  # torn
                return
            if not content:
                return
            yield content.decode("latin-1")  # names are ASCII; a cut character must not stop us


def _add(entry: list[float], self_us: float, total_us: float) -> None:
    entry[0] += self_us
    entry[1] += total_us
    entry[2] += 1


def _typed(entry: list[float]) -> tuple[float, float, int]:
    return entry[0], entry[1], int(entry[2])


def _ranked(rows: list[OperatorSum], top: int) -> list[OperatorSum]:
    return sorted(rows, key=lambda row: -row.self_us)[:top]
