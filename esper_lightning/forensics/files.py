"""Files that a dying process cannot spoil: JSON lines appended whole, files replaced whole."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from esper_lightning.forensics.reading import RowReader

__all__ = [
    "JsonLines",
    "encode_rows",
    "read_json_lines",
    "replacing",
    "strict_json",
    "write_atomically",
]

Row = Mapping[str, Any]
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonLines:
    """An append-only file of one JSON object a line.

    A line is one ``write`` to the kernel: what ``append`` returned from survives the death of the
    process, by SIGKILL too. (A power failure may take the last seconds.)
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def append(self, row: Row) -> None:
        """Add a row.

        Raises:
            OSError: If the disk takes no more; nothing of the row is in the file then.
        """
        whole = line = memoryview(_encode(row))
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError:
            if len(line) < len(whole):
                written = len(whole) - len(line)
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise

    def close(self) -> None:
        """Give the file descriptor back."""
        os.close(self._fd)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines.

    A last line that was torn by a crash is left out, a missing file is empty.

    Raises:
        ValueError: If a line before the last is damaged, or it is no file.
    """
    return [_decode(row) for row in RowReader(path, strict=True, most_bytes=None)]


def write_atomically(path: Path, content: bytes) -> None:
    """Put a file in place whole or not at all.

    Raises:
        OSError: If the disk takes no more.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A temporary file to write, put in place at the end (fsync, rename), or removed at an error.

    Raises:
        OSError: If the disk takes no more.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def encode_rows(rows: Iterable[Row]) -> bytes:
    """Rows as a file of JSON lines."""
    return b"".join(map(_encode, rows))


def strict_json(value: Any) -> str:
    """Text for other programs.

    Records become objects. JSON knows no NaN and no infinity: they are spelled as in the history.
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
    """Strict JSON.

    A number that is not finite becomes a string that ``read_json_lines`` turns back.
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
