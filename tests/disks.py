"""Disks so small that a test can fill them."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_LIBC = ctypes.CDLL(None, use_errno=True)
_DETACH = 2


@contextlib.contextmanager
def mounted(place: Path, size: int) -> Iterator[Path]:
    """A file system of a size in bytes, in memory; skips the test where mounting is not allowed."""
    place.mkdir()
    options = f"size={size}".encode()
    if _LIBC.mount(b"tmpfs", bytes(place), b"tmpfs", 0, options) != 0:
        pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield place
    finally:
        _LIBC.umount2(bytes(place), _DETACH)


def fill(disk: Path) -> Path:
    """Fill a disk; returns the file that fills it."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast
