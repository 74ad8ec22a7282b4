"""Reading of any files in a run directory, in bounded time and memory.

Files may be damaged, of any length, or not be files at all. A file that cannot be read raises
``ValueError`` with the reason in a few words, and a missing file raises ``FileNotFoundError``.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

__all__ = [
    "RowOrder",
    "RowReader",
    "numbered_rows",
    "open_file",
    "parse_json",
    "printable",
    "read_file",
    "refuse_unbounded",
    "whole_number",
]

_MOST_BYTES = 16 << 20  # greatest size of a file that is read as a whole
_MOST_ROW_BYTES = 128 << 20  # size of rows that are read: two seconds, or a day of training
_LONGEST_LINE = 1 << 20
_DEEPEST, _MOST_ENTRIES = 100, 1_000_000
_DIGITS = 18  # an integer of so many digits fits into int64
_KNOWN_ITERATIONS = 1_000_000
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file; a pipe could block the reader, and a device may have no end.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If ``path`` is no regular file, or cannot be opened.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = next((name for is_it, name in _KINDS if is_it(mode)), "something else")
            raise ValueError(f"it is {kind}")
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def read_file(path: Path, *, most_bytes: int = _MOST_BYTES) -> bytes:
    """The content of a file that is expected to be small.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If ``path`` is no regular file, cannot be read, or is longer than
            ``most_bytes``.
    """
    with open_file(path) as file:
        try:
            content = file.read(most_bytes + 1) or b""
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from error
    if len(content) > most_bytes:
        raise ValueError(f"it is longer than {most_bytes:,} bytes")
    return content


def parse_json(content: bytes) -> Any:
    """The value of a JSON text, within limits that every reader can rely on.

    The value is neither deep nor endless, and its integers have at most 18 digits: longer integers
    become floats.

    Raises:
        ValueError: If ``content`` is no JSON, or nested too deep.
    """
    try:
        value = _DECODER.decode(content.decode("utf-8", "surrogatepass"))
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEEPEST} deep") from None
    refuse_unbounded(value)
    return value


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else float(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)


def refuse_unbounded(value: object) -> None:
    """Refuse a value that holds itself, or more entries than a reader can visit.

    An entry that the value holds several times counts as often: a few lines of YAML can stand for
    billions.

    Raises:
        ValueError: If the value is nested more than 100 deep, or has more than a million entries.
    """
    entries, level = 0, [value]
    for _ in range(_DEEPEST):
        within: list[object] = []
        for container in level:
            inner: list[object] = []
            if isinstance(container, Mapping):
                inner = list(cast(Mapping[object, object], container).values())
            elif isinstance(container, list | tuple):
                inner = cast(list[object], container)
            entries += len(inner)
            if entries > _MOST_ENTRIES:
                raise ValueError(f"it has more than {_MOST_ENTRIES:,} entries")
            within += [entry for entry in inner if isinstance(entry, Mapping | list | tuple)]
        if not within:
            return
        level = within
    raise ValueError(f"it is nested more than {_DEEPEST} deep")


def whole_number(value: object) -> int | None:
    """A count as an integer; ``None`` for a negative value or a non-integer, such as a bool."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return None
    return value


class RowReader:
    """Rows of a file of JSON lines, one after another, with counts of what is wrong in the file.

    Of a file of more than 128 MB the beginning and the end are read.

    Args:
        path: Path of the file; a missing file has no rows.
        strict: Whether a damaged line before the last is an error.
        most_bytes: Number of bytes of the file that are read; ``None`` for all.
        last_is_short: Whether the last row may come sooner than the others, as that of an epoch
            that the end of a run cut short.

    Attributes:
        rows: Number of rows so far.
        damaged: Number of lines that are no rows, a torn last line among them.
        left_out_bytes: Length of the middle that was not read.
        order: Order of the rows, which should come one for each iteration.
    """

    def __init__(
        self,
        path: Path,
        *,
        strict: bool = False,
        most_bytes: int | None = _MOST_ROW_BYTES,
        last_is_short: bool = False,
    ) -> None:
        self._path, self._strict, self._most_bytes = path, strict, most_bytes
        self.rows = self.damaged = self.left_out_bytes = 0
        self.order = RowOrder(last_is_short=last_is_short)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read the rows.

        Raises:
            ValueError: If the file cannot be read or is no file; if ``strict``, also for damage.
        """
        try:
            file = open_file(self._path)
        except FileNotFoundError:
            return
        except ValueError as error:
            raise ValueError(f"{self._path} cannot be read: {error}.") from error
        with file:
            for number, line in enumerate(self._lines(file), 1):
                row = _row(line)
                if row is not None:
                    self.rows += 1
                    self.order.add(row)
                    yield row
                elif line.strip():
                    self.damaged += 1
                    if self._strict and line.endswith(b"\n"):  # else its write was cut off
                        got = line.rstrip(b"\n")[:80]
                        raise ValueError(f"{self._path}:{number} must be a JSON object, got {got}.")

    @property
    def remarks(self) -> list[str]:
        """Sentences that a reader of the rows must know."""
        name, remarks = self._path.name, list[str]()
        if self.left_out_bytes:
            size = f"{self.left_out_bytes / 1e6:,.0f} MB"
            remarks.append(f"The middle of {name}, {size}, was not read.")
        if disorder := self.order.disorder:
            rule = f"{name} has not one row for each iteration in order"
            remarks.append(f"{rule}: of {self.rows:,} rows, {disorder}.")
        return remarks

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        size = os.fstat(file.fileno()).st_size
        if self._most_bytes is None or size <= self._most_bytes:
            yield from _lines(file, size)
            return
        half = self._most_bytes // 2
        yield from _lines(file, half)
        begins = max(file.tell(), size - half)
        self.left_out_bytes = begins - file.tell()
        self.order.leave_gap()
        file.seek(begins)
        file.readline(_LONGEST_LINE)  # the rest of a line
        yield from _lines(file, half)


def _lines(file: BinaryIO, most_bytes: int) -> Iterator[bytes]:
    """Lines that begin within ``most_bytes``; of a line that is too long, its beginning."""
    done = 0
    while done < most_bytes and (line := file.readline(_LONGEST_LINE)):
        done, rest = done + len(line), line
        while len(rest) == _LONGEST_LINE and rest[-1:] != b"\n" and done < most_bytes:
            rest = file.readline(_LONGEST_LINE)
            done += len(rest)
        yield line if rest is line else line + b"\n" * rest.endswith(b"\n")


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line) if len(line) < _LONGEST_LINE else None
    except ValueError:
        return None
    return cast(dict[str, Any], row) if isinstance(row, dict) else None


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a history with their iterations; none of a file that cannot be read.

    A row whose iteration is no whole number is skipped: damage made it.
    """
    with contextlib.suppress(OSError, ValueError):
        for row in RowReader(path):
            iteration = whole_number(row.get("iteration"))
            if iteration is not None:
                yield iteration, row


class RowOrder:
    """Order of rows: counts of all rows that do not follow the iteration before them.

    Args:
        last_is_short: Whether the last step may be shorter than the others.
    """

    def __init__(self, *, last_is_short: bool = False) -> None:
        self._last_is_short = last_is_short
        self._last_jump: int | None = None
        self._repeated = self._late = self._unnumbered = self._env_steps_back = 0
        self._seen: set[int] = set()
        self._first: int | None = None
        self._filled = 0  # late iterations that are after the first
        self._greatest = self._env_steps = -1
        self._stride: int | None = None  # smallest step from an iteration to the next
        self._jumps = self._jumped = 0  # number of such steps, and their sum
        self._is_first = True

    def add(self, row: Mapping[str, Any]) -> None:
        """Count the next row."""
        iteration = whole_number(row.get("iteration"))
        if iteration is None:
            self._unnumbered += 1
        elif iteration in self._seen or iteration == self._greatest:
            self._repeated += 1
        else:
            self._place(iteration)
        env_steps = whole_number(row.get("env_steps"))
        if env_steps is not None:
            self._env_steps_back += env_steps < self._env_steps
            self._env_steps = env_steps

    def _place(self, iteration: int) -> None:
        jump = iteration - self._greatest
        if jump < 0:
            self._late += 1
            self._filled += iteration > (self._first or 0)
        elif not self._is_first:
            whole = self._last_jump if self._last_is_short else jump
            if whole is not None:
                self._stride = min(whole, self._stride or whole)
            self._last_jump = jump
            self._jumps, self._jumped = self._jumps + 1, self._jumped + jump
        if len(self._seen) < _KNOWN_ITERATIONS:
            self._seen.add(iteration)
        self._first = iteration if self._first is None else self._first
        self._greatest, self._is_first = max(iteration, self._greatest), False

    def leave_gap(self) -> None:
        """Note that the following rows were not read, up to the next ``add``."""
        self._is_first = True

    @property
    def disorder(self) -> str:
        """Kinds of disorder with their counts, in words; empty if rows are in order.

        Iterations are missing where a step is longer than the shortest one: a module with several
        optimizers may count by twos.
        """
        missing = 0
        if self._stride:
            last = self._last_jump if self._last_is_short else None
            jumped, jumps = self._jumped - (last or 0), self._jumps - (last is not None)
            missing = jumped // self._stride - jumps - self._filled
            missing += 0 if last is None else -(-last // self._stride) - 1
        counts = (
            (self._repeated, "repeated"),
            (self._late, "out of order"),
            (self._unnumbered, "without an iteration"),
            (max(0, missing), "missing"),
            (self._env_steps_back, "going back in env_steps"),
        )
        return ", ".join(f"{count:,} {what}" for count, what in counts if count)


def printable(text: str) -> str:
    """A text for a terminal, with escape sequences, line ends and lone surrogates spelled out."""
    if text.isprintable():
        return text
    spelled = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(spelled)
