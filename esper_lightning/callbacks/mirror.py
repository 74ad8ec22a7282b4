"""A copy of a run directory at a remote address, so that evidence survives the machine.

Files that must survive a kill are written to a local disk. A run whose directory is a remote
address (``s3://``, ``gs://``, ...) writes into a local folder, and its files are copied from there.
"""
# fsspec has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import contextlib
import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from esper_lightning.callbacks.address_claims import (
    beside,
    claim_address,
    is_beside,
    new_claims,
    read_claims,
    refuse_address,
    remembered_address,
    remembers_address,
)
from esper_lightning.core.errors import require
from esper_lightning.core.paths import expand_home
from esper_lightning.forensics.claims import DirectoryRefusedError
from esper_lightning.forensics.files import write_atomically
from esper_lightning.forensics.layout import RunLayout

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
_NOT_COPIED = ("owner.lock", "phases.ring", "copies.jsonl")  # the last is how it is claimed


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

    Before each copy the mirror looks whether the address is still that of its run. Where another
    run has claimed it, or a user has files with the names of a run's, one warning says so, and the
    copies go into a new folder below the address from then on.

    Args:
        folder: Local folder to copy from.
        address: Remote address to copy to.
        rank: Global rank whose folder ``rank<k>`` is copied; rank 0 also copies all files that are
            in no rank's folder.
        claims: Claims of the folder (``callbacks.address_claims``), the same on all ranks; ``None``
            before ``begin``, and for an address without an owner.

    Attributes:
        has_written: Whether files from the address, or about it, may be in the folder.
    """

    has_written = False

    def __init__(self, folder: Path, address: str, rank: int, claims: str | None = None) -> None:
        require_writable("The run directory", address)
        self.folder, self.address, self.claims = folder, address, claims
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
            there, root = self._claim()
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

    def _claim(self) -> tuple[Any, str]:
        """Claim the address, or a folder below it; returns its file system and path."""
        there, root = _file_system(self.address)
        if self.claims is None:
            return there, root
        alone = self.address.endswith(beside("", self.claims))
        if alone and self._copied:  # nobody else knows the name
            return there, root
        names = [path.relative_to(self.folder).as_posix() for path in self._files()]
        others = claim_address(there, root, self.claims, names, alone=alone)
        if others is None:
            return there, root
        text = "%s holds %s. Nothing there is replaced: %s is copied to %s."
        former = self.address
        with contextlib.suppress(OSError):
            self._move()
        _log.warning(text, former, others, self.folder, self.address)
        return self._claim()

    def _move(self) -> None:
        """Copy into a folder below the address from now on, and in later runs in the folder."""
        assert self.claims is not None
        self.address = beside(self.address, self.claims)
        self._copied.clear()
        if self._rank == 0:
            write_atomically(remembers_address(self.folder), self.address.encode())

    def begin(self, *, fetch_s: float | None, written: Sequence[str] = ()) -> str:
        """Fetch the files that a run resumes from, and choose and claim the address of its copies.

        Where something cannot be fetched, the copies go into a new folder below the address: at the
        address itself they would replace a history and checkpoints that the run does not resume
        from. Later runs in the same local folder are copied into the new folder, too.

        Args:
            fetch_s: Time to wait while nothing arrives, in seconds; ``None`` where the local folder
                has the files of an earlier run, and nothing is fetched.
            written: Patterns of the names that the run will write, relative to its directory.

        Returns:
            Address that the run directory is copied to.

        Raises:
            DirectoryRefusedError: If a living process of this host copies another folder to the
                address, or a user has files with such names there.
            OSError: If a file cannot be written.
        """
        given = self.address
        self.address = remembered_address(self.folder, given)
        is_complete = fetch_s is None or self.address != given
        if fetch_s is not None and not is_complete:
            is_complete = self.fetch(seconds=fetch_s, written=written)
        self.has_written = True
        self.claims = self.claims or new_claims(self.folder)
        if not is_complete:
            self._move()
        return self.address

    def fetch(self, *, seconds: float, written: Sequence[str] = ()) -> bool:
        """Copy all files from the remote address into the local folder, for a run to resume from.

        The address is claimed, then.

        Local files stay as they are. Each file arrives whole or not at all, and none arrives after
        the call has returned.

        Args:
            seconds: Time to wait while nothing arrives, in seconds.
            written: As for ``begin``.

        Returns:
            Whether all remote files are in the local folder; otherwise there is one warning.

        Raises:
            DirectoryRefusedError: As for ``begin``; nothing is fetched then.
        """
        problems: list[str] = []
        refusals: list[DirectoryRefusedError] = []
        is_over = threading.Event()

        def run() -> None:
            try:
                self._fetch(is_over, written)
            except DirectoryRefusedError as error:
                refusals.append(error)
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
        if refusals:
            raise refusals[0]
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

    def _fetch(self, is_over: threading.Event, written: Sequence[str]) -> None:
        there, root = _file_system(self.address)
        refuse_address(there, root, self.address, written)
        self.has_written = True
        for path in there.find(root):
            name = str(path).removeprefix(root).lstrip("/")
            local = self.folder / name
            if is_over.is_set():
                return
            if local.exists() or is_beside(name):
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
        with self._lock:
            if is_over.is_set():
                return
            self.claims = new_claims(self.folder)
        there.makedirs(root, exist_ok=True)
        there.pipe_file(f"{root}/{RunLayout(self.folder).copies.name}", self.claims.encode())

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
    place = Path(folder)
    claims = read_claims(place) or new_claims(place)
    mirror = Mirror(place, remembered_address(place, address), int(rank), claims)
    mirror.copy(seconds=_OF_THE_DEAD_S)
