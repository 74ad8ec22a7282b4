"""The phases of a process, in a small memory-mapped file that outlives the process.

The layout is little-endian, written in place by one process and readable at any moment: a header, a
table of names, the stack of open spans, a ring of closed spans, and the memory of the process
(which rings of earlier versions lack). A written page belongs to the kernel, so that SIGKILL loses
nothing.
"""

import contextlib
import mmap
import os
import struct
import time
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

from esper_lightning.forensics.memory import Memory, measure_memory
from esper_lightning.forensics.reading import read_file

__all__ = ["COLLECTIVE", "PhaseRing", "Phases", "Span", "read_phases"]

_MAGIC = b"ESPERPH1"
# Magic, iteration, names, depth, closed, start, collectives that began and that were finished.
_HEADER = struct.Struct("<8sqIIqqII")
_SPAN = struct.Struct("<qqqHHI")  # begin_ns, end_ns, iteration, name, depth, spare
_NAME_BYTES, _MAX_NAMES, _MAX_DEPTH, _MAX_CLOSED = 96, 1024, 64, 4096
_NAMES_AT = 64
_STACK_AT = _NAMES_AT + _NAME_BYTES * _MAX_NAMES
_RING_AT = _STACK_AT + _SPAN.size * _MAX_DEPTH
_MEMORY_AT = _RING_AT + _SPAN.size * _MAX_CLOSED
_MEMORY = struct.Struct("<4q")  # rss, peak, limit, available; all 0 where memory is not known
_SIZE = _MEMORY_AT + _MEMORY.size
_ITERATION_AT, _NAMES_COUNT_AT, _DEPTH_AT, _CLOSED_AT, _COLLECTIVES_AT = 8, 16, 20, 24, 40
_I64, _U32, _COUNTS = struct.Struct("<q"), struct.Struct("<I"), struct.Struct("<II")

COLLECTIVE = "collective "
"""Beginning of the names of spans that are collectives."""


class Span(NamedTuple):
    """One phase, with times in nanoseconds since the epoch; ``end_ns`` is 0 in an open phase."""

    name: str
    begin_ns: int
    end_ns: int
    iteration: int
    depth: int


class Phases(NamedTuple):
    """The content of a ring: open spans, outermost first, and the latest closed ones in order."""

    iteration: int
    open: list[Span]
    closed: list[Span]
    memory: Memory | None = None
    collectives_begun: int = 0
    """Number of collectives that the rank has called, modulo 2^32."""
    collectives_finished: int = 0
    """Number of those that have ended well."""


class PhaseRing:
    """The writer of the file; a span takes about a microsecond, and no system call.

    Only one thread, the one that trains, may call ``enter`` and ``leave``.

    Args:
        path: Path of the file. An existing file is replaced, not truncated: it may be mapped.

    Attributes:
        error: Error if the disk or a limit allows no file: spans are then known to this process
            alone. ``None`` where there is a file.
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        try:
            self._map = _map_new_file(path)
        except OSError as error:
            self.error, self._map = error, mmap.mmap(-1, _SIZE)
        self._ids: dict[str, int] = {}
        self._stack: list[tuple[int, int]] = []
        self._closed = 0
        self._iteration = 0
        self._begun = self._finished = 0  # collectives
        _HEADER.pack_into(self._map, 0, _MAGIC, 0, 0, 0, 0, time.time_ns(), 0, 0)
        self.note_memory()

    def note_memory(self) -> None:
        """Write the memory of the process into the file; any thread may call this, at any time."""
        memory = measure_memory()
        if memory is not None:
            with contextlib.suppress(TypeError, ValueError):  # the ring has been closed
                _MEMORY.pack_into(self._map, _MEMORY_AT, *memory)

    @property
    def iteration(self) -> int:
        """Number of the iteration that spans belong to."""
        return self._iteration

    @iteration.setter
    def iteration(self, value: int) -> None:
        self._iteration = value
        _I64.pack_into(self._map, _ITERATION_AT, value)

    @property
    def open_names(self) -> list[str]:
        """Names of the open spans, outermost first."""
        names = list(self._ids)
        return [names[identity] for identity, _ in self._stack]

    def enter(self, name: str) -> None:
        """Open a span within the open spans."""
        identity = self._ids.get(name)
        if identity is None:
            identity = self._add_name(name)
        depth, now = len(self._stack), time.time_ns()
        self._stack.append((identity, now))
        if depth < _MAX_DEPTH:
            at = _STACK_AT + depth * _SPAN.size
            _SPAN.pack_into(self._map, at, now, 0, self._iteration, identity, depth, 0)
            _U32.pack_into(self._map, _DEPTH_AT, depth + 1)

    def leave(self, name: str) -> None:
        """Close the innermost span of this name, and the spans that are open within it."""
        identity = self._ids.get(name, _MAX_NAMES - 1)
        innermost_is_it = bool(self._stack) and self._stack[-1][0] == identity
        if not innermost_is_it and all(identity != opened for opened, _ in self._stack):
            return
        now = time.time_ns()
        while True:
            innermost, begin = self._stack.pop()
            depth = len(self._stack)
            at = _RING_AT + (self._closed % _MAX_CLOSED) * _SPAN.size
            _SPAN.pack_into(self._map, at, begin, now, self._iteration, innermost, depth, 0)
            self._closed += 1
            _I64.pack_into(self._map, _CLOSED_AT, self._closed)
            if innermost == identity:
                break
        _U32.pack_into(self._map, _DEPTH_AT, min(len(self._stack), _MAX_DEPTH))

    @contextlib.contextmanager
    def collective(self, name: str) -> Generator[None]:
        """A span and a number for a collective; one that fails stays open, and is not finished.

        Ranks call the same collectives in the same order, so that their numbers can be compared.

        Args:
            name: Kind and size of the collective.
        """
        self._begun += 1
        self._note_collectives()
        self.enter(COLLECTIVE + name)
        yield
        self.leave(COLLECTIVE + name)
        self._finished += 1
        self._note_collectives()

    def _note_collectives(self) -> None:
        counts = (self._begun & 0xFFFFFFFF, self._finished & 0xFFFFFFFF)
        _COUNTS.pack_into(self._map, _COLLECTIVES_AT, *counts)

    def close(self) -> None:
        """Unmap the file, which stays on disk."""
        self._map.close()

    def _add_name(self, name: str) -> int:
        if len(self._ids) == _MAX_NAMES:  # later names share the last entry
            return _MAX_NAMES - 1
        identity = self._ids[name] = len(self._ids)
        text = name.encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
        at = _NAMES_AT + identity * _NAME_BYTES
        self._map[at : at + _NAME_BYTES] = text
        _U32.pack_into(self._map, _NAMES_COUNT_AT, identity + 1)
        return identity


def _map_new_file(path: Path) -> mmap.mmap:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        # The file is not sparse: a full disk must be an error here and not a SIGBUS later.
        os.posix_fallocate(fd, 0, _SIZE)
        return mmap.mmap(fd, _SIZE)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def read_phases(path: Path) -> Phases:
    """The content of the file of a living or dead process.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file cannot be read, is no phase ring, or has content that no run writes.
    """
    content = read_file(path, most_bytes=_SIZE)
    if len(content) < _MEMORY_AT or not content.startswith(_MAGIC):
        raise ValueError(f"{path} must be a phase ring, got {content[:8]!r}.")
    _, iteration, names, depth, closed, _, begun, finished = _HEADER.unpack_from(content, 0)
    damaged = ValueError(f"{path} must be a phase ring, got one with damaged content.")
    if names > _MAX_NAMES or depth > _MAX_DEPTH or min(iteration, closed) < 0:
        raise damaged
    table: list[str] = [
        content[_NAMES_AT + i * _NAME_BYTES : _NAMES_AT + (i + 1) * _NAME_BYTES]
        .rstrip(b"\0")
        .decode(errors="replace")
        for i in range(names)
    ]

    def span(at: int) -> Span:
        fields: tuple[int, ...] = _SPAN.unpack_from(content, at)
        begin_ns, end_ns, number, identity, level, _ = fields
        if identity >= len(table) or begin_ns <= 0:
            raise damaged
        return Span(table[identity], begin_ns, end_ns, number, level)

    first = max(0, closed - _MAX_CLOSED)
    ring = [span(_RING_AT + (i % _MAX_CLOSED) * _SPAN.size) for i in range(first, closed)]
    stack = [span(_STACK_AT + i * _SPAN.size) for i in range(depth)]
    memory = None
    if len(content) >= _SIZE:
        memory = Memory(*_MEMORY.unpack_from(content, _MEMORY_AT))
    memory = memory if memory and memory.limit_bytes > 0 else None
    return Phases(iteration, stack, ring, memory, begun, finished)
