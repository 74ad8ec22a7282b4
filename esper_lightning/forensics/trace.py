"""Chrome traces of any size, read in bounded memory, even if they are torn or damaged."""

import gzip
import heapq
import itertools
import json
import math
import os
import re
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from esper_lightning.forensics.reading import open_file

__all__ = ["LastOperator", "NestedSums", "OperatorSum", "TraceSummary", "sum_nested", "summarize"]

_CHUNK = 1 << 17
_HALF = 48 << 20  # bytes from the start of a trace, and as many from its end: some six seconds
_MOST_UNPACKED = 1 << 30  # bytes that are unpacked at most to reach the end of a packed trace
_LONGEST = 1 << 17  # characters of one event; a longer event counts as damaged
_DISORDER = 1024  # an event of a thread may be out of order by so many events
_MAX_NAMES, _MAX_THREADS = 20_000, 512
_LAST = 15  # operators at the end of a trace that are listed
_EVENT = re.compile(r'\{\s*"(?:ph|name|cat)"\s*:')
_HOST = {"cpu_op": 0, "user_annotation": 0, "cpu_instant_event": 0, "cuda_runtime": 1}
_LEFT_OUT = ("Trace", "python_function")  # marks, and the frames of with_stack: no operators
_OTHERS = "(other names)"


class OperatorSum(NamedTuple):
    """Sums over all events of one name, in microseconds; self time excludes nested events."""

    name: str
    self_us: float
    total_us: float
    calls: int


class LastOperator(NamedTuple):
    """One of the last operators of a trace, in microseconds of the trace's clock."""

    name: str
    start_us: float
    duration_us: float


class TraceSummary(NamedTuple):
    """The summary of a trace; lists are longest self time first, ``last`` is oldest first."""

    complete: bool
    left_out_bytes: int  # length of the middle, which was not read
    events: int
    duration_s: float
    operators: list[OperatorSum]
    device_operators: list[OperatorSum]
    spans: list[OperatorSum]
    last: list[LastOperator]


def summarize(path: Path, *, top: int = 15) -> TraceSummary:
    """The time of a trace by operator, and the operators that ran at its end.

    Of more than 96 MiB of text the beginning and the end are read. Damage within is no error:
    ``complete`` of the summary is false then.

    Args:
        path: Trace file, ``.pt.trace.json`` or ``.pt.trace.json.gz``.
        top: Greatest number of rows of each list.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If ``path`` is no file that can be opened.
    """
    text = _Text(path)
    host, device = _Host(_LAST), defaultdict[str, list[float]](lambda: [0.0, 0.0, 0])
    complete, events = True, 0
    first, end = math.inf, -math.inf
    for event in _events(text.chunks()):
        if event is None:
            complete = False
            continue
        events += 1
        start, duration, kind = event.get("ts"), event.get("dur"), event.get("cat")
        name = event.get("name")
        timed = _is_time(start) and _is_time(duration)
        named = isinstance(name, str) and isinstance(kind, str | None)
        if event.get("ph") != "X" or not timed or not named or kind in _LEFT_OUT:
            continue
        start, duration, name = float(cast(float, start)), float(cast(float, duration)), str(name)
        first, end = min(first, start), max(end, start + duration)
        if kind in _HOST:
            host.add(event, name, start, duration)
        else:
            known = name in device or len(device) < _MAX_NAMES
            _add(device[name if known else _OTHERS], duration)
    operators, spans = host.finish()
    return TraceSummary(
        complete and not text.left_out_bytes,
        text.left_out_bytes,
        events,
        max(0.0, end - first) / 1e6 if end > first else 0.0,
        _ranked(operators, top),
        _ranked([OperatorSum(name, *_typed(entry)) for name, entry in device.items()], top),
        _ranked(spans, top),
        [LastOperator(name, start, duration) for start, _, name, duration in sorted(host.latest)],
    )


class _Host:
    """Sums over events on the CPU, and the operators that began last.

    The file lists calls of the CUDA runtime apart from the operators that made them: operators are
    nested in operators only, and calls in calls only.
    """

    def __init__(self, last: int) -> None:
        self.latest: list[tuple[float, int, str, float]] = []  # a heap: start, number, ...
        self._last = last
        self._number = 0
        self._names: dict[str, int] = {}
        self._sums: list[list[float]] = []
        self._spans: set[int] = set()
        self._waiting: dict[Any, list[tuple[float, float, int]]] = {}  # heaps, by thread
        self._threads: dict[Any, NestedSums] = {}

    def add(self, event: dict[str, Any], name: str, start: float, duration: float) -> None:
        """Count an event on the CPU."""
        if name not in self._names and len(self._names) >= _MAX_NAMES:
            name = _OTHERS
        identity = self._names.setdefault(name, len(self._names))
        if identity == len(self._sums):
            self._sums.append([0.0, 0.0, 0])
        self._number += 1
        if event["cat"] == "user_annotation":
            self._spans.add(identity)
        elif len(self.latest) < self._last:
            heapq.heappush(self.latest, (start, self._number, name, duration))
        elif self.latest and start >= self.latest[0][0]:
            heapq.heapreplace(self.latest, (start, self._number, name, duration))
        key: Any = (*(_number_or_name(event.get(k)) for k in ("pid", "tid")), _HOST[event["cat"]])
        if key not in self._waiting and len(self._waiting) >= _MAX_THREADS:
            key = None
        waiting = self._waiting.setdefault(key, [])
        heapq.heappush(waiting, (start, -duration, identity))
        if len(waiting) > _DISORDER:
            self._take(key, heapq.heappop(waiting))

    def _take(self, key: Any, event: tuple[float, float, int]) -> None:
        if key not in self._threads:
            self._threads[key] = NestedSums(self._sums)
        self._threads[key].add(event[0], -event[1], event[2])

    def finish(self) -> tuple[list[OperatorSum], list[OperatorSum]]:
        """Finish the sums; returns those of the operators, and those of the spans."""
        for key, waiting in self._waiting.items():
            while waiting:
                self._take(key, heapq.heappop(waiting))
        for thread in self._threads.values():
            thread.close()
        rows: tuple[list[OperatorSum], list[OperatorSum]] = ([], [])
        for name, identity in self._names.items():
            row = OperatorSum(name, *_typed(self._sums[identity]))
            rows[identity in self._spans].append(row)
        return rows


class NestedSums:
    """Sums by name over the events of one thread, which come in order of time.

    As in ``key_averages``, an event whose only nested event has the same name counts once with it.

    Args:
        sums: Self time, total time and calls by name, added to in place.
    """

    def __init__(self, sums: list[list[float]]) -> None:
        self._sums = sums
        self._open: list[
            list[float]
        ] = []  # end, identity, children, duration of a child of its name

    def add(self, start: float, duration: float, identity: int) -> None:
        """Add the next event; events come by start, and outer events before nested ones."""
        opened = self._open
        while opened and opened[-1][0] <= start:
            self._close_innermost()
        if opened:
            parent = opened[-1]
            self._sums[int(parent[1])][0] -= duration
            parent[2] += 1
            parent[3] = duration if parent[1] == identity else -1
        _add(self._sums[identity], duration)
        opened.append([start + duration, identity, 0, -1])

    def close(self) -> None:
        """Close the open events: the thread has no more."""
        while self._open:
            self._close_innermost()

    def _close_innermost(self) -> None:
        _, identity, children, like_itself = self._open.pop()
        if children == 1 and like_itself >= 0:
            self._sums[int(identity)][1] -= like_itself
            self._sums[int(identity)][2] -= 1


def sum_nested(
    starts: Sequence[float],
    durations: Sequence[float],
    identities: Sequence[int],
    sums: list[list[float]],
) -> None:
    """Add the events of one thread, in any order, to sums by name.

    Args:
        starts: Start of each event.
        durations: Duration of each event, in the unit of the starts.
        identities: Index of the entry of ``sums`` that each event belongs to.
        sums: Self time, total time and calls by name, added to in place.
    """
    nested = NestedSums(sums)
    for i in sorted(range(len(starts)), key=lambda i: (starts[i], -durations[i])):
        nested.add(starts[i], durations[i], identities[i])
    nested.close()


def _events(chunks: Iterator[str]) -> Iterator[dict[str, Any] | None]:
    """The objects in ``traceEvents`` one after another; ``None`` where something is damaged."""
    decoder = json.JSONDecoder()
    text, at = _find_events(chunks), 0
    if text is None:
        yield None
        return
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at < len(text) and text[at] == "]":
            for _ in chunks:  # a torn end shows only at the end
                pass
            return
        try:
            event, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):  # cut by the end of the text, or damaged
            chunk = next(chunks, "") if len(text) - at < _LONGEST else None
            if chunk:
                text, at = text[at:] + chunk, 0
                continue
            yield None
            while not (found := _EVENT.search(text, at + 1)):
                chunk = next(chunks, "")
                if not chunk:
                    return
                text, at = text[-64:] + chunk, -1
            at = found.start()
            continue
        if isinstance(event, dict):
            yield cast(dict[str, Any], event)


def _find_events(chunks: Iterator[str]) -> str | None:
    """Text from the first event in the list of events; ``None`` if there is no list."""
    text = ""
    for chunk in chunks:
        text = text[-64:] + chunk
        if found := re.search(r'"traceEvents"\s*:\s*\[', text):
            return text[found.end() :]
    return None


class _Text:
    """The readable text of a plain or packed file; of a long file, without the middle.

    Attributes:
        left_out_bytes: Length of the middle that was not read.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._is_packed = open_file(path), path.suffix == ".gz"
        self.left_out_bytes = 0

    def chunks(self) -> Iterator[str]:
        """Chunks of the text, in order."""
        with self._file as file, gzip.open(file) if self._is_packed else file as unpacked:
            pieces = iter(partial(_read, unpacked), b"")
            yield from map(_decoded, itertools.islice(pieces, _HALF // _CHUNK))
            if self._is_packed:
                few = itertools.islice(pieces, _MOST_UNPACKED // _CHUNK)
                last = deque[bytes](maxlen=_HALF // _CHUNK)
                for piece in few:
                    self.left_out_bytes += len(last[0]) if len(last) == last.maxlen else 0
                    last.append(piece)
                yield from map(_decoded, last)
                return
            size, at = os.fstat(file.fileno()).st_size, file.tell()
            self.left_out_bytes = max(0, size - _HALF - at)
            file.seek(at + self.left_out_bytes)
            yield from map(_decoded, itertools.islice(pieces, _HALF // _CHUNK + 1))


def _read(file: BinaryIO | gzip.GzipFile) -> bytes:
    """The next chunk; empty at the end of the file, or where the file is torn."""
    try:
        return file.read(_CHUNK)
    except (EOFError, OSError, zlib.error):
        return b""


def _decoded(piece: bytes) -> str:
    return piece.decode("latin-1")  # names are ASCII; a cut character must be no error


def _number_or_name(value: Any) -> int | float | str | None:
    return value if isinstance(value, int | float | str) else None


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and -1e18 < value < 1e18


def _add(entry: list[float], duration: float) -> None:
    entry[0] += duration
    entry[1] += duration
    entry[2] += 1


def _typed(entry: list[float]) -> tuple[float, float, int]:
    return entry[0], entry[1], int(entry[2])


def _ranked(rows: list[OperatorSum], top: int) -> list[OperatorSum]:
    return sorted(rows, key=lambda row: -row.self_us)[:top]
