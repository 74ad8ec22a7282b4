"""Files that a dying process cannot damage: JSON lines appended whole, files replaced whole."""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from esper_lightning.forensics.processes import identify, is_alive
from esper_lightning.forensics.reading import RowReader

__all__ = [
    "Appender",
    "Backlog",
    "JsonLines",
    "Row",
    "encode_rows",
    "first_cause",
    "read_json_lines",
    "replacing",
    "strict_json",
    "write_atomically",
]

Row = Mapping[str, Any]
Entry = TypeVar("Entry")
_log = logging.getLogger(__name__)
_numbers = itertools.count(1)  # of temporary files: two threads may write the same file
_KEPT = 100_000  # greatest number of entries that wait
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Appender:
    """A file to which pieces are appended whole.

    Once ``append`` has returned, the piece survives the death of the process, by SIGKILL too. (A
    power failure may lose the pieces of the last seconds.)
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def append(self, content: bytes) -> None:
        """Append a piece to the file.

        Raises:
            OSError: If the disk takes no more; nothing of the piece is in the file then.
        """
        whole = rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            if len(rest) < len(whole):
                written = len(whole) - len(rest)
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise

    def close(self) -> None:
        """Close the file descriptor."""
        os.close(self._fd)


class JsonLines:
    """An append-only file of JSON objects, one a line; a line is one ``write`` to the kernel."""

    def __init__(self, path: Path) -> None:
        self._file = Appender(path)

    def append(self, row: Row) -> None:
        """Append a row to the file.

        Raises:
            OSError: If the disk takes no more; nothing of the row is in the file then.
        """
        self._file.append(_encode(row))

    def close(self) -> None:
        """Close the file descriptor."""
        self._file.close()


class Backlog(Generic[Entry]):
    """Entries for a place that may take none for a while: they wait, and are offered again.

    There is one warning when the place first refuses an entry, one when it first takes entries
    again, and one at the end about entries that are lost.

    Args:
        name: Name of the place, for the warnings.
        take: Function that passes one entry to the place, or raises.
        errors: Class of the errors that ``take`` raises where the place takes no entry.
        prepare: Function called before entries are offered, for instance to open a file; it may
            raise errors of the same class.
        drops_refused: Whether the oldest entry is dropped where the place takes the newest entry.
        said: Kinds of warnings that were given; shared by places that the user sees as one.

    Attributes:
        error: Error for which the place takes no entries; ``None`` where it takes them.
        said: Kinds of warnings that were given.
    """

    def __init__(
        self,
        name: str,
        take: Callable[[Entry], object],
        *,
        errors: type[Exception] = OSError,
        prepare: Callable[[], object] = lambda: None,
        drops_refused: bool = False,
        said: set[str] | None = None,
    ) -> None:
        self._name, self._take, self._errors, self._prepare = name, take, errors, prepare
        self._drops_refused = drops_refused
        self._entries: deque[Entry] = deque()
        self._lost = 0
        self.said = set[str]() if said is None else said
        self.error: Exception | None = None

    def __len__(self) -> int:
        """The number of entries that wait."""
        return len(self._entries)

    def put(self, entry: Entry) -> None:
        """Offer an entry to the place, after the entries that wait."""
        if len(self._entries) < _KEPT:
            self._entries.append(entry)
        else:
            self._lost += 1
            self._say("full", "%s: later rows are lost: %d wait already.", _KEPT)
        self.offer()

    def offer(self) -> None:
        """Offer the entries that wait, until the place refuses one."""
        try:
            self._prepare()
            while self._entries:
                self._offer_oldest()
        except self._errors as error:
            self.error = error
            text = "%s takes no rows: %s. Training continues; rows wait to be written later."
            self._say("refused", text, first_cause(error))
        else:
            if self.error is not None:
                text = "%s takes rows again" + ("." if self._lost else ": none is lost.")
                self._say("taken", text)
            self.error = None

    def warn(self, text: str, *values: object) -> None:
        """Warn that the place refuses entries, unless such a warning was given.

        Args:
            text: Text with ``%s`` for the name of the place, and for each of the values.
            *values: Values that the text contains after the name.
        """
        self._say("refused", text, *values)

    def close(self) -> None:
        """Offer the entries that wait a last time, and report how many are lost."""
        self.offer()
        lost, self._lost = self._lost + len(self._entries), 0
        self._entries.clear()
        if lost:
            _log.error("%s: %d rows are lost: none was taken.", self._name, lost)

    def _offer_oldest(self) -> None:
        oldest = self._entries.popleft()  # not offered again if something else ends the attempt
        try:
            self._take(oldest)
        except self._errors:
            self._entries.appendleft(oldest)
            if not self._drops_refused or len(self._entries) == 1:
                raise
            self._take(self._entries[-1])  # raises too, unless only the oldest is refused
            self._entries.pop()
            self._entries.popleft()
            self._lost += 1

    def _say(self, kind: str, text: str, *values: object) -> None:
        if kind not in self.said:
            self.said.add(kind)
            _log.warning(text, self._name, *values)


def first_cause(error: BaseException) -> BaseException:
    """The first error of a chain of causes: libraries raise less telling errors of their own.

    (TensorBoard's logger turns a full disk into "currently not supported".)
    """
    seen = list[BaseException]()
    while error.__cause__ is not None and error not in seen:
        seen.append(error)
        error = error.__cause__
    return error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines.

    A last line that a crash has torn is skipped; a missing file has no rows.

    Raises:
        ValueError: If a line before the last is damaged, or ``path`` is no file.
    """
    return [_decode(row) for row in RowReader(path, strict=True, most_bytes=None)]


def write_atomically(path: Path, content: bytes) -> None:
    """Write or replace a file, whole or not at all.

    Raises:
        OSError: If the disk takes no more.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path, *, place: Callable[[Path], object] | None = None) -> Generator[Path]:
    """A temporary file that replaces ``path`` at the end (fsync, rename), or not at all.

    Temporary files of dead processes for ``path`` are removed at the end, too.

    Args:
        path: File to replace.
        place: Function that renames the temporary file, its argument; ``None`` to rename it to
            ``path``.

    Yields:
        Path of the temporary file, to be written in the block.

    Raises:
        OSError: If the disk takes no more; the error names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{next(_numbers)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if place is None:
            temporary.replace(path)
        else:
            place(temporary)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    _remove_leftovers(path)


def _remove_leftovers(path: Path) -> None:
    start = f".{path.name}."
    with contextlib.suppress(OSError):
        for left in path.parent.iterdir():
            if not (left.name.startswith(start) and left.name.endswith(".tmp")):
                continue
            owner = left.name[len(start) :].partition(".")[0]
            if owner.isdecimal() and is_alive(identify(int(owner))) is False:
                left.unlink(missing_ok=True)


def encode_rows(rows: Iterable[Row]) -> bytes:
    """The content of a file of JSON lines with the given rows, whose values may be nested."""
    return b"".join(_encode(_plain(row)) for row in rows)


def strict_json(value: Any) -> str:
    """A value as strict JSON, for other programs.

    Records become objects. JSON has no NaN and no infinity: both are spelled as in the history.
    """
    return json.dumps(_plain(value), default=str, indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, tuple) and hasattr(cast(Any, value), "_asdict"):
        return _plain(cast(Any, value)._asdict())
    if isinstance(value, Mapping):
        pairs = cast(Mapping[Any, Any], value).items()
        return {str(key): _plain(entry) for key, entry in pairs}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in cast(list[Any], value)]
    return _spell(value)


def _encode(row: Row) -> bytes:
    """A row as a line of strict JSON.

    A number that is not finite becomes a string, from which ``read_json_lines`` restores it.
    """
    plain = {key: _spell(value) for key, value in row.items()}
    return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _spell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _decode(row: Row) -> dict[str, Any]:
    return {
        key: _NON_FINITE.get(value, value) if isinstance(value, str) else value
        for key, value in row.items()
    }
