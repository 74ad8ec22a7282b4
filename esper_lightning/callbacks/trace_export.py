"""A recorded window as a file that opens in Perfetto: gzipped, whole or not at all."""

import gzip
import os
import shutil
from pathlib import Path

import torch

__all__ = ["export_trace"]


def export_trace(profile: torch.profiler.profile, path: Path) -> Path:
    """Write the result of a stopped profiler.

    Kineto writes once only, and tells of a full disk on stderr alone; where it left nothing,
    torch's own writer is tried, which compresses as it goes.

    Args:
        profile: After its ``stop``.
        path: A name that ends in ``.pt.trace.json.gz``.

    Returns:
        ``path``.

    Raises:
        ValueError: If there is no result: saving an empty one would crash the process.
        OSError: If the file cannot be written; nothing is left of it.
    """
    results = None if profile.profiler is None else profile.profiler.kineto_results
    if results is None or results.trace_start_ns() == 0:
        raise ValueError("the profiler holds no result: its session was ended by someone else")
    plain = path.with_name(f".{path.name}.{os.getpid()}.json")
    packed = path.with_name(f".{path.name}.{os.getpid()}.tmp.json.gz")
    try:
        if not _written_by_kineto(profile, plain, packed):
            _write_in_python(profile, packed)
        packed.replace(path)
    finally:
        for temporary in path.parent.glob(f".{path.name}.{os.getpid()}.*"):
            temporary.unlink(missing_ok=True)
    return path


def _written_by_kineto(profile: torch.profiler.profile, plain: Path, packed: Path) -> bool:
    try:
        profile.export_chrome_trace(str(plain))
    except RuntimeError:  # "Trace is already saved."
        return False
    if not plain.exists():
        return False
    try:
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except OSError:  # no room for both
        return False
    return True


def _write_in_python(profile: torch.profiler.profile, packed: Path) -> None:
    try:
        from torch.profiler import _chrome_trace_export as writer  # noqa: PLC0415 - torch >= 2.13
    except ImportError:
        raise OSError(f"{packed.parent} takes no trace") from None
    assert profile.profiler is not None
    writer.export_chrome_trace(
        profile.profiler.kineto_results, str(packed), getattr(profile, "_trace_metadata", {})
    )
