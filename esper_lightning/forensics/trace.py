"""Chrome traces of any size, read in bounded memory; torn and damaged ones as far as they go."""

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
_MOST_UNPACKED = 1 << 30  # bytes of a packed trace that are unpacked to get to its end
_LONGEST = 1 << 17  # characters of one event; what is longer is damaged
_DISORDER = 1024  # events of a thread are in order of time but for so many
_MAX_NAMES, _MAX_THREADS = 20_000, 512
_EVENT = re.compile(r'\{\s*"(?:ph|name|cat)"\s*:')
_HOST = {"cpu_op": 0, "user_annotation": 0, "cpu_instant_event": 0, "cuda_runtime": 1}
_LEFT_OUT = ("Trace", "python_function")  # marks, and the frames of with_stack: no operators
_OTHERS = "(other names)"


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
    left_out_bytes: int  # of the middle, which was not read
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
        FileNotFoundError: If there is no file.
        ValueError: If it is no file that can be opened. Damage within is not an error: ``complete``
            says so. Of a trace with more than 128 MB of text the beginning and the end are read.
    """
    text = _Text(path)
    host, device = _Host(last), defaultdict[str, list[float]](lambda: [0.0, 0.0, 0])
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
    """Sums over what ran on the CPU, and the operators that began last.

    Calls of the CUDA runtime are in the file apart from the operators that made them: each of the
    two is nested in itself only.
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
        """Take an event."""
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
        """Sums of the operators, and of the spans."""
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
    """Adds the events of one thread, in order of time, to their names' sums.

    As ``key_averages`` does, an event that holds nothing but one of its own name counts once.

    Args:
        sums: Self time, total time and calls by name, added to in place.
    """

    def __init__(self, sums: list[list[float]]) -> None:
        self._sums = sums
        self._open: list[list[float]] = []  # end, identity, children, duration of one like itself

    def add(self, start: float, duration: float, identity: int) -> None:
        """Take the next event: none that began earlier follows, outer ones come first."""
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
        """The thread has no more events."""
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
    """Add the events of one thread to the sums of ``NestedSums``, whatever their order.

    Args:
        starts: Of each event.
        durations: In the same unit.
        identities: Which entry of ``sums`` an event belongs to.
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
            for _ in chunks:  # to see a torn end
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
    """Text from within the list of events on; ``None`` if there is no list."""
    text = ""
    for chunk in chunks:
        text = text[-64:] + chunk
        if found := re.search(r'"traceEvents"\s*:\s*\[', text):
            return text[found.end() :]
    return None


class _Text:
    """Text of a plain or packed file, as far as it can be read; of a long one, without the middle.

    Attributes:
        left_out_bytes: Length of the middle that was not read.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._is_packed = open_file(path), path.suffix == ".gz"
        self.left_out_bytes = 0

    def chunks(self) -> Iterator[str]:
        """Pieces of it, in order."""
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
    """The next piece; empty at the end, or where it is torn."""
    try:
        return file.read(_CHUNK)
    except (EOFError, OSError, zlib.error):
        return b""


def _decoded(piece: bytes) -> str:
    return piece.decode("latin-1")  # names are ASCII; a cut character must not stop us


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
