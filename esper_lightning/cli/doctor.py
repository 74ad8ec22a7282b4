"""``esper doctor``: what this machine has, what will run fast on it, and what is missing."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from esper_lightning.cli.errors import CommandParser
from esper_lightning.forensics.files import strict_json
from esper_lightning.forensics.memory import measure_memory

__all__ = ["run"]

_PACKAGES = ("esper_lightning", "torch", "lightning", "tensorboard", "jsonargparse")
_FOR_DEVELOPERS = ("bench", "dev", "docs")  # extras that no command needs
_LEAST_DISK = 2 << 30  # bytes below which a full disk is near
_MARKS = {"good": "ok", "slow": "slow", "bad": "FAIL", "info": "--"}


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        topic: A word or two for what was examined.
        state: ``good``, ``slow`` for what makes training slow, ``bad`` for what makes it fail, or
            ``info``.
        text: What was found, and how to mend it.
    """

    topic: str
    state: str
    text: str


def run(arguments: list[str]) -> None:
    """Print the findings; exit with status 1 if training cannot run here."""
    parser = CommandParser("esper doctor", "What this machine has, and what will run fast on it.")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    options = parser.parse_args(arguments)
    findings = [*_versions(), *_devices(), *_compiler(), *_threads(), *_disk(), *_extras()]
    if options.json:
        print(strict_json([finding._asdict() for finding in findings]))
    else:
        width = max(len(finding.topic) for finding in findings)
        for topic, state, text in findings:
            print(f"{_MARKS[state]:<5} {topic:<{width}}  {text}")
    if any(finding.state == "bad" for finding in findings):
        sys.exit(1)


def _versions() -> Iterator[Finding]:
    yield Finding("Python", "info", f"{platform.python_version()} at {sys.executable}")
    for name in _PACKAGES:
        if _is_installed(name):
            yield Finding(name, "info", importlib.metadata.version(name))
        else:
            yield Finding(name, "bad", f"not installed: pip install {name}")


def _devices() -> Iterator[Finding]:
    import torch  # noqa: PLC0415 - takes seconds

    count = torch.cuda.device_count()
    for k in range(count):
        has = cast(Any, torch.cuda).get_device_properties(k)
        text = f"{has.name}, {has.total_memory / 1e9:.0f} GB, capability {has.major}.{has.minor}"
        yield Finding(f"cuda:{k}", "good", f"{text}; --model.compile max captures graphs")
    if not count:
        built = torch.version.cuda
        text = "this build of torch has no CUDA" if built is None else "no device can be used"
        yield Finding("CUDA", "info", f"{text}; training runs on the CPU")


def _compiler() -> Iterator[Finding]:
    from esper_lightning.compiling.native.library import (  # noqa: PLC0415
        build_library,
        cache_directory,
        find_compiler,
    )
    from esper_lightning.compiling.native.values import UnsupportedError  # noqa: PLC0415

    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        yield Finding("native code", "slow", "TORCH_COMPILE_DISABLE=1 switches it off")
        return
    try:
        command = find_compiler()
        build_library('extern "C" int esper_doctor() { return 0; }')
    except UnsupportedError as error:
        yield Finding("native code", "slow", f"training runs eagerly: {error}")
        return
    yield Finding("native code", "good", f"{' '.join(command)} compiles; cache {cache_directory()}")


def _threads() -> Iterator[Finding]:
    import torch  # noqa: PLC0415

    usable, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    text = f"{threads} threads on {usable} of {os.cpu_count()} cores"
    if threads > usable:
        yield Finding("threads", "slow", f"{text}; set OMP_NUM_THREADS={usable}")
    else:
        yield Finding("threads", "good", text)
    load = os.getloadavg()[0]
    if load > usable / 2:
        text = f"{load:.1f} processes are busy: a run wants its cores to itself"
        yield Finding("load", "slow", f"{text} (OMP_NUM_THREADS=1 beside others)")
    memory = measure_memory()
    available = None if memory is None else memory.available_bytes
    if available is not None:
        yield Finding("memory", "info", f"{available / 1e9:.1f} GB are free")


def _disk() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    writable = os.access(here, os.W_OK)
    state = "good" if writable and free > _LEAST_DISK else "bad" if not writable else "slow"
    text = "" if writable else ", and nothing can be written here"
    yield Finding("disk", state, f"{free / 1e9:.1f} GB are free in {here}{text}")


def _extras() -> Iterator[Finding]:
    """For each extra of the package, whether what it brings is installed."""
    absent: dict[str, list[str]] = {}
    try:
        requirements = importlib.metadata.requires("esper_lightning") or ()
    except importlib.metadata.PackageNotFoundError:
        yield Finding("extras", "info", "unknown: the package is used without being installed")
        return
    for line in requirements:
        found = re.match(r"([\w.-]+).*; extra == [\"'](\w+)[\"']", line)
        if found and found[2] not in _FOR_DEVELOPERS:
            missing = absent.setdefault(found[2], [])
            missing += [] if _is_installed(found[1]) else [found[1]]
    for extra, names in absent.items():
        text = f"{', '.join(names)} missing: pip install 'esper_lightning[{extra}]'"
        state = "info" if names else "good"
        yield Finding(f"extra {extra}", state, text if names else "installed")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
