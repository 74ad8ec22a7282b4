"""Export of a recorded window to a file for Perfetto: gzipped, whole or not at all."""

import contextlib
import gzip
import itertools
import json
import os
import resource
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType

from esper_lightning.forensics.files import write_atomically

__all__ = ["export_trace", "export_whole"]

_TAIL = b"\n]}\n"
_TAIL_BYTES = 64  # end of a gzip file: the compressor's remainder, and the checksum
_BATCH = 64  # events; the size of a file is known after each
_numbers = itertools.count(1)


def export_trace(profile: torch.profiler.profile, path: Path) -> list[Path]:
    """Write the result of a stopped profiler.

    Kineto writes once only, needs room for a file that is not compressed, and reports a full disk
    on stderr alone. Where Kineto has written nothing, this function writes the events: names,
    times, threads and shapes, in as many files as a limit on the size of files demands. Each file
    is a whole trace.

    Args:
        profile: Profiler after its ``stop``.
        path: File to write; its name ends in ``.pt.trace.json.gz``.

    Returns:
        ``path`` alone, or files ``<name>-piece<n>.pt.trace.json.gz`` beside it in order of time.

    Raises:
        ValueError: If there is no result: saving an empty result would crash the process.
        OSError: If the files cannot be written; none of them remains.
    """
    results = None if profile.profiler is None else profile.profiler.kineto_results
    if results is None or results.trace_start_ns() == 0:
        raise ValueError("the profiler holds no result: its session was ended by someone else")
    # The name is short: the file system may refuse a name longer than that of the trace.
    name = f".{os.getpid()}-{next(_numbers)}"
    plain, packed = path.with_name(f"{name}.json"), path.with_name(f"{name}.tmp.json.gz")
    try:
        if _written_by_kineto(profile, plain, packed):
            packed.replace(path)
            return [path]
    finally:
        for temporary in path.parent.glob(f"{name}.*"):
            temporary.unlink(missing_ok=True)
    return _write_pieces(results, path)


def export_whole(profile: torch.profiler.profile, path: str, *args: Any, **kwargs: Any) -> None:
    """Export a trace as torch does, but leave no torn file, and raise if none was written.

    Args:
        profile: Profiler after its ``stop``.
        path: File to write.
        *args: Further arguments of ``export_chrome_trace``.
        **kwargs: Further arguments of ``export_chrome_trace``.

    Raises:
        OSError: If torch has written nothing.
    """
    target, was_there = Path(path), Path(path).exists()
    try:
        type(profile).export_chrome_trace(profile, path, *args, **kwargs)
        if not target.exists():
            raise OSError(f"{target.parent} takes no trace")
    except BaseException:
        torn = [Path(f"{path}.tmp"), *([] if was_there else [target])]
        for left in torn:
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
        raise


def _written_by_kineto(profile: torch.profiler.profile, plain: Path, packed: Path) -> bool:
    try:
        type(profile).export_chrome_trace(profile, str(plain))
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


def _write_pieces(results: Any, path: Path) -> list[Path]:
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = limit if limit != resource.RLIM_INFINITY else None
    written: list[Path] = []
    stem = path.name.removesuffix(".pt.trace.json.gz")
    try:
        for number, content in enumerate(_pieces(results, most), 1):
            piece = path.with_name(f"{stem}-piece{number}.pt.trace.json.gz")
            write_atomically(piece, content)
            written.append(piece)
        if len(written) == 1:
            written = [written[0].replace(path)]
    except BaseException:
        for piece in written:
            piece.unlink(missing_ok=True)
        raise
    return written


def _pieces(results: Any, most: int | None) -> Iterator[bytes]:
    """Whole traces, each with the events of a span of time, in order.

    Args:
        results: ``kineto_results`` of a stopped profiler.
        most: Greatest size of each trace in bytes, unless a few events need more; ``None`` for no
            limit.
    """
    start_ns = results.trace_start_ns()
    head = f'{{"schemaVersion":1,"baseTimeNanoseconds":{start_ns},"traceEvents":[\n'.encode()
    events = iter(sorted(results.events(), key=lambda event: event.start_ns()))
    batch = _lines(events, start_ns)
    while True:
        packer = zlib.compressobj(level=6, wbits=31)
        content, separator, largest = packer.compress(head), b"", 0
        while batch:
            added = packer.compress(separator + batch) + packer.flush(zlib.Z_FULL_FLUSH)
            content, separator, largest = content + added, b",\n", max(largest, len(added))
            batch = _lines(events, start_ns)
            if most is not None and len(content) + 2 * largest + _TAIL_BYTES > most:
                break
        yield content + packer.compress(_TAIL) + packer.flush()
        if not batch:
            return


def _lines(events: Iterator[Any], start_ns: int) -> bytes:
    batch = (_as_json(event, start_ns) for event in itertools.islice(events, _BATCH))
    return ",\n".join(batch).encode()


def _as_json(event: Any, start_ns: int) -> str:
    on_cpu = event.device_type() == DeviceType.CPU
    kind = "cpu_op" if on_cpu else "kernel"
    if hasattr(event, "activity_type"):  # torch >= 2.7
        kind = event.activity_type()
    elif event.is_user_annotation():
        kind = "user_annotation"
    fields = {
        "ph": "X",
        "cat": kind,
        "name": event.name(),
        "pid": os.getpid() if on_cpu else event.device_index(),
        "tid": event.start_thread_id() if on_cpu else event.device_resource_id(),
        "ts": (event.start_ns() - start_ns) / 1e3,
        "dur": event.duration_ns() / 1e3,
    }
    shapes = event.shapes()
    if shapes:
        fields["args"] = {"Input Dims": shapes}
    return json.dumps(fields, separators=(",", ":"))
