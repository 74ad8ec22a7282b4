"""A copy of a run directory at a remote address, so that evidence survives the machine.

Files that must survive a kill are written to a local disk. A run whose directory is a remote
address (``s3://``, ``gs://``, ...) writes into a local folder, and its files are copied from there.
"""
# fsspec has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import contextlib
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import fsspec

from esper_lightning.core.errors import require
from esper_lightning.core.paths import expand_home

__all__ = ["Mirror", "main", "place_of", "require_writable"]

_log = logging.getLogger(__name__)
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)
_OF_THE_DEAD_S = 60.0
_LOCAL = ("file", "local")
_NEVER_WRITTEN = (  # web pages, archives, views of other places: fsspec reads them at most
    *("blockcache", "cached", "data", "dir", "dvc", "filecache", "gist", "git", "github"),
    *("http", "https", "libarchive", "pyscript", "reference", "simplecache", "tar", "zip"),
)
_PARTIAL = ".fetched"  # a file that is arriving
_COPIED_TO = ".copied_to"  # holds the address of the copies if it is not the user's
_NOT_COPIED = ("owner.lock", "phases.ring")


def place_of(location: str | Path) -> tuple[Path, str | None]:
    """Local folder for a run directory, and its remote address if it has one.

    Args:
        location: A path, or an address such as ``s3://bucket/runs``; a ``Path`` made of an address,
            which has lost a slash, counts as the address. A leading ``~`` is the user's home.

    Returns:
        The folder, absolute, and the address or ``None``. The folder of an address is
        ``runs/<protocol>/<rest>`` in the current directory.

    Raises:
        ValueError: If ``location`` is an address whose protocol fsspec does not know, or with
            which it cannot write, or if its name is no UTF-8.
    """
    field = "The run directory"
    protocol, rest = _split(field, location)
    is_text = not any("\ud800" <= letter <= "\udfff" for letter in rest)  # TensorBoard needs it
    require(is_text, field, "have a name in UTF-8", str(location))
    if protocol is None:
        return expand_home(location).absolute(), None
    if protocol in _LOCAL:
        return Path("/", rest), None
    parts = [part for part in rest.split("/") if part not in ("", ".", "..")]
    return Path("runs", protocol, *parts).absolute(), f"{protocol}://{rest.strip('/')}"


def require_writable(field: str, location: str | Path) -> None:
    """Refuse an address to which this machine could not write even where the address is reached.

    Args:
        field: Setting that names the location.
        location: As for ``place_of``.

    Raises:
        ValueError: If fsspec does not know the protocol or cannot write with it, or a package for
            it is not installed.
    """
    protocol = _split(field, location)[0] or "file"
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        rule = "be a place that this machine can reach"
        raise ValueError(f"{field} must {rule}, got {str(location)!r}. {error}.") from error


def _split(field: str, location: str | Path) -> tuple[str | None, str]:
    """The protocol of an address, and its rest; ``None`` and the whole location for a path."""
    text = str(location)
    found = _ADDRESS.fullmatch(text)
    known = (*fsspec.available_protocols(), *fsspec.registry)  # by name; as classes
    is_known = found is not None and found[1] in known
    rule = "be a path, or an address of a protocol that fsspec knows"
    require(is_known or "://" not in text, field, rule, text)
    if found is None or not is_known:
        return None, text
    rule = "be a path, or an address that can be written to"
    require(found[1] not in _NEVER_WRITTEN, field, rule, text)
    return found[1], found[2]


class Mirror:
    """Copies files of a local folder to a remote address; errors are warnings.

    A call of the library for the remote address may never return. Therefore only threads call the
    library: one thread at a time copies, and every wait for a thread has a time limit.

    Args:
        folder: Local folder to copy from.
        address: Remote address to copy to.
        rank: Global rank whose folder ``rank<k>`` is copied; rank 0 also copies all files that are
            in no rank's folder.
    """

    def __init__(self, folder: Path, address: str, rank: int) -> None:
        require_writable("The run directory", address)
        self.folder, self.address = folder, address
        self._rank = rank
        self._copied: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None  # the thread that copies
        self._is_due = False  # whether a copy must follow the one under way
        self._is_refused = False  # whether the latest copy failed

    def copy(self, *, seconds: float) -> bool:
        """Copy the files that have changed since they were copied.

        Args:
            seconds: Time to wait for the end of the copy, in seconds.

        Returns:
            Whether everything was copied within that time.
        """
        thread = self.copy_soon()
        thread.join(seconds)
        if thread.is_alive():
            text = "Copying %s to %s has not ended within %g s: the copy may be incomplete."
            _log.warning(text, self.folder, self.address, seconds)
        return not (thread.is_alive() or self._is_refused)

    def copy_soon(self) -> threading.Thread:
        """Copy in a thread, after the copy that is under way; returns the thread."""
        with self._lock:
            self._is_due = True
            thread = self._thread
            if thread is None:
                thread = threading.Thread(target=self._copy_while_due, daemon=True)
                thread.name = "run-mirror"
                thread.start()
                self._thread = thread
        return thread

    def _copy_while_due(self) -> None:
        while True:
            with self._lock:
                if not self._is_due:
                    self._thread = None
                    return
                self._is_due = False
            self._copy()

    def _copy(self) -> None:
        try:
            there, root = _file_system(self.address)
            for path in self._files():
                known = path.stat()
                version = (known.st_size, known.st_mtime_ns)
                if self._copied.get(path) != version:
                    target = f"{root}/{path.relative_to(self.folder).as_posix()}"
                    there.makedirs(target.rpartition("/")[0], exist_ok=True)
                    there.put_file(str(path), target)
                    self._copied[path] = version
            self._is_refused = False
        except Exception as error:  # of the library for the remote address
            if not self._is_refused:  # a copy is due at every checkpoint
                text = "%s cannot be copied to %s: %r. The local files stay."
                _log.warning(text, self.folder, self.address, error)
            self._is_refused = True

    def begin(self, *, fetch_s: float | None) -> str:
        """Fetch the files that a run resumes from, and choose the address of its copies.

        Where something cannot be fetched, the copies go into a new folder below the address: at the
        address itself they would replace a history and checkpoints that the run does not resume
        from. Later runs in the same local folder are copied into the new folder, too.

        Args:
            fetch_s: Time to wait while nothing arrives, in seconds; ``None`` where the local folder
                has the files of an earlier run, and nothing is fetched.

        Returns:
            Address that the run directory is copied to.
        """
        remembered = self.folder / _COPIED_TO
        if remembered.exists():
            return remembered.read_text()
        if fetch_s is None or self.fetch(seconds=fetch_s):
            return self.address
        beside = f"{self.address}/begun_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
        remembered.write_text(beside)
        return beside

    def fetch(self, *, seconds: float) -> bool:
        """Copy all files from the remote address into the local folder, for a run to resume from.

        Local files stay as they are. Each file arrives whole or not at all, and none arrives after
        the call has returned.

        Args:
            seconds: Time to wait while nothing arrives, in seconds.

        Returns:
            Whether all remote files are in the local folder; otherwise there is one warning.
        """
        problems: list[str] = []
        is_over = threading.Event()

        def run() -> None:
            try:
                self._fetch(is_over)
            except Exception as error:  # of the library for the remote address
                problems.append(repr(error))

        thread = threading.Thread(target=run, daemon=True, name="run-fetch")
        thread.start()
        try:
            before, arrived = -1, _bytes_in(self.folder)
            while thread.is_alive() and arrived > before:
                thread.join(seconds)
                before, arrived = arrived, _bytes_in(self.folder)
        finally:
            with self._lock:
                is_over.set()
        if thread.is_alive():
            problems.append(f"nothing came within {seconds:g} s")
            for partial in self.folder.rglob(_PARTIAL):
                partial.unlink(missing_ok=True)
        if problems:
            text = (
                "The files at %s cannot be fetched: %s. They stay as they are. The run begins with "
                "the files in %s, and is copied into a new folder below the address."
            )
            _log.warning(text, self.address, problems[0], self.folder)
        return not problems

    def _fetch(self, is_over: threading.Event) -> None:
        there, root = _file_system(self.address)
        for path in there.find(root):
            name = str(path).removeprefix(root).lstrip("/")
            local = self.folder / name
            if is_over.is_set():
                return
            if local.exists():
                continue
            local.parent.mkdir(parents=True, exist_ok=True)
            partial = local.with_name(_PARTIAL)
            try:
                there.get_file(path, str(partial))
                with self._lock:
                    if is_over.is_set():
                        return
                    partial.replace(local)
            finally:
                partial.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        mine = f"rank{self._rank}"
        return [
            path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
            and not path.name.startswith(".")
            and path.name not in _NOT_COPIED
            and self._is_mine(path.relative_to(self.folder).parts[0], mine)
        ]

    def _is_mine(self, top: str, mine: str) -> bool:
        of_a_rank = top.startswith("rank") and top[4:].isdecimal()
        return top == mine or (self._rank == 0 and not of_a_rank)


def _file_system(address: str) -> tuple[Any, str]:
    there, root = fsspec.url_to_fs(address)
    return there, str(root).rstrip("/")


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # the file has just been renamed
            total += path.stat().st_size
    return total


def main(folder: str, address: str, rank: str) -> None:
    """Copy the run directory of a process that vanished; its second process calls this.

    Args:
        folder: Run directory.
        address: Remote address to copy to.
        rank: Global rank of the process, in digits.
    """
    Mirror(Path(folder), address, int(rank)).copy(seconds=_OF_THE_DEAD_S)
