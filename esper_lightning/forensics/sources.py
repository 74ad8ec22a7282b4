"""Digests of the source files of the user's program that are loaded. Standard library only.

A repository may not hold them, or hold them without changes that git knows: a file that is not
tracked, a program outside of any repository.
"""

import contextlib
import hashlib
import os
import sys
import sysconfig
from pathlib import Path
from typing import TypeGuard

__all__ = ["digests_of_sources"]

_MOST_FILES = 200
_MOST_BYTES = 1 << 20  # of a file
_INSTALLED = ("site-packages", "dist-packages")
_PACKAGE = str(Path(__file__).resolve().parents[1])


def digests_of_sources() -> dict[str, str]:
    """Digests of the files of loaded modules by path, without those of installed distributions.

    A path is relative to the current directory where the file is below it. Distributions, this
    package and Python itself have versions, and are left out. Of more than 200 files those below
    the current directory count first, then the first by path; files larger than 1 MB do not.
    """
    standard = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    apart = tuple(f"{each}{os.sep}" for each in (*standard, _PACKAGE))
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):  # the current directory may be gone
        here = Path.cwd()
        names = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        paths = {str(here / name) for name in names if _is_users(name, apart)}
        nearest = sorted((not Path(path).is_relative_to(here), path) for path in paths)
        for is_far, path in nearest[:_MOST_FILES]:
            content = _read(path)
            if content is not None:
                digest = hashlib.blake2b(content, digest_size=6).hexdigest()
                found[path if is_far else os.path.relpath(path, here)] = digest
    return found


def _is_users(path: object, apart: tuple[str, ...]) -> TypeGuard[str]:
    if not isinstance(path, str) or path.startswith(apart) or not path.endswith(".py"):
        return False
    return not any(f"{os.sep}{name}{os.sep}" in path for name in _INSTALLED)


def _read(path: str) -> bytes | None:
    """Content of a file; ``None`` where it is too large, or out of reach."""
    with contextlib.suppress(OSError), Path(path).open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
        return content if len(content) <= _MOST_BYTES else None
    return None
