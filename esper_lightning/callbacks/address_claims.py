"""Whose a remote address is: the run directory that was first copied to it.

``copies.jsonl`` of a run directory has a line for each process that has copied the directory, and
so has the address. A run may go on with an address whose lines are the first lines of its own: it
descends from all that was copied there. Any other address belongs to another run.
"""
# fsspec has no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import glob
import json
import os
import re
import secrets
import time
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from esper_lightning.forensics.claims import in_use, not_of_a_run
from esper_lightning.forensics.files import write_atomically
from esper_lightning.forensics.layout import OF_CALLBACKS, RunLayout
from esper_lightning.forensics.owner_record import parse_owner, read_owner
from esper_lightning.forensics.processes import ProcessIdentity, identify, is_alive, same_process
from esper_lightning.forensics.reading import read_file

__all__ = [
    "beside",
    "claim_address",
    "files_of_others",
    "is_beside",
    "new_claims",
    "read_claims",
    "refuse_address",
    "remembered_address",
    "remembers_address",
]

_BESIDE = "begun_"
_SIGNS_OF_A_RUN = ("copies.jsonl", "rank[0-9]*/process.json", "rank[0-9]*/history.jsonl")


def new_claims(directory: Path) -> str:
    """Add a line for this process to the claims of a run directory.

    On a full disk the claims are returned all the same, and count for this process alone.

    Returns:
        All lines.
    """
    mine = {**identify(os.getpid()).to_dict(), "claimed_s": time.time()}
    mine |= {"token": secrets.token_hex(4), "directory": str(directory)}
    line = json.dumps(mine) + "\n"
    earlier = read_claims(directory)
    with contextlib.suppress(OSError):
        write_atomically(RunLayout(directory).copies, (earlier + line).encode())
    return earlier + line


def read_claims(directory: Path) -> str:
    """The claims of a run directory; empty where there are none, or they are damaged."""
    with contextlib.suppress(OSError, ValueError):
        return read_file(RunLayout(directory).copies).decode()
    return ""


def beside(address: str, claims: str) -> str:
    """A folder below an address that is that of the latest of some claims alone."""
    latest = _latest(claims)
    since = time.strftime("%Y%m%d_%H%M%S", time.localtime(latest.get("claimed_s", 0.0)))
    return f"{address}/{_BESIDE}{since}_{latest.get('token')}"


def is_beside(name: str) -> bool:
    """Whether a file at an address is in a folder that ``beside`` has named."""
    return name.startswith(_BESIDE)


def claim_address(
    there: Any, root: str, claims: str, names: Iterable[str], *, alone: bool
) -> str | None:
    """Claim an address, unless it belongs to another run.

    Args:
        there: File system of the address.
        root: Path of the address in the file system.
        claims: Claims of the run directory.
        names: Names of the files that will be copied, relative to the run directory.
        alone: Whether the address is that of the latest of the claims alone.

    Returns:
        What is there of others, as a part of a sentence; ``None`` if the address is claimed.

    Raises:
        Exception: Whatever the library for the address raises.
    """
    found = "" if alone else _read(there, root)
    if found == claims:
        return None
    if not found and not alone:
        # A logger that was given the address may have begun files of its own there.
        written = [*OF_CALLBACKS, "checkpoints", "config.yaml", *map(glob.escape, names)]
        theirs = files_of_others(_names_at(there, root), written)
        if theirs:
            return f"{theirs[0]}, which this run did not write"
    if not claims.startswith(found):
        owner = _latest(found)
        return f"the files of another run, of process {owner.get('pid')} on {owner.get('host')}"
    there.makedirs(root, exist_ok=True)
    there.pipe_file(f"{root}/{RunLayout(Path()).copies.name}", claims.encode())
    return None


def refuse_address(there: Any, root: str, address: str, written: Iterable[str]) -> None:
    """Refuse an address that is in use, or has files of others, as a run directory.

    Args:
        there: File system of the address.
        root: Path of the address in the file system.
        address: The address.
        written: Patterns of the names that the run will write, relative to the address.

    Raises:
        DirectoryInUseError: If a living process of this host copies another directory to there.
        DirectoryRefusedError: If no run wrote to the address, and files have such names there.
        Exception: Whatever the library for the address raises.
    """
    latest = _latest(_read(there, root))
    owner, directory = ProcessIdentity.from_dict(latest), Path(str(latest.get("directory")))
    runs = read_owner(directory).get("pid") == owner.pid  # else the process has ended that run
    if runs and is_alive(owner) and not same_process(owner, identify(os.getpid())):
        raise in_use(address, owner, "run")
    names = _names_at(there, root)
    if any(fnmatchcase(name, sign) for name in names for sign in _SIGNS_OF_A_RUN):
        return
    theirs = files_of_others(names, written)
    if theirs:
        more = f" and {len(theirs) - 1} more" if len(theirs) > 1 else ""
        raise not_of_a_run(address, theirs[0] + more, "run")


def files_of_others(names: Iterable[str], written: Iterable[str]) -> list[str]:
    """The names that fit patterns, or are in folders that do; folders end with a slash.

    Args:
        names: Names of files, relative to an address.
        written: Patterns of names.
    """
    patterns = tuple(written)

    def fits(name: str) -> bool:
        folders = [str(folder) for folder in PurePosixPath(name).parents][:-1]
        places = (name, *folders, *(f"{folder}/" for folder in folders))
        return any(fnmatchcase(place, pattern) for place in places for pattern in patterns)

    return sorted(name for name in names if not is_beside(name) and fits(name))


def remembers_address(directory: Path) -> Path:
    """File of a run directory with the address of its copies, if that is not the user's."""
    return directory / ".copied_to"


def remembered_address(directory: Path, address: str) -> str:
    """The address that a run directory is copied to.

    Args:
        directory: The run directory.
        address: Address that the user gave. An earlier run may have chosen a folder below it.
    """
    with contextlib.suppress(OSError, ValueError):
        found = read_file(remembers_address(directory)).decode()
        if re.fullmatch(rf"{re.escape(address)}/{_BESIDE}\w+", found):
            return found
    return address


def _names_at(there: Any, root: str) -> list[str]:
    return [str(path).removeprefix(root).lstrip("/") for path in there.find(root)]


def _read(there: Any, root: str) -> str:
    try:
        return there.cat_file(f"{root}/{RunLayout(Path()).copies.name}").decode(errors="replace")
    except FileNotFoundError:
        return ""


def _latest(claims: str) -> dict[str, Any]:
    """The last line of claims; empty where there is none, or it is damaged."""
    lines = claims.splitlines()
    return parse_owner(lines[-1].encode()) if lines else {}
