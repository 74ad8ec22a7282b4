"""The fingerprint of a run: all that decides what a program does, besides its state.

Two runs from the same checkpoint are the same bits if their fingerprints agree; where they differ,
``differences`` says in what. Standard library only; ``recorder.fingerprint`` adds what torch knows.
No secret is stored: see ``secret_texts``.
"""

import contextlib
import functools
import hashlib
import os
import platform
import re
import selectors
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from esper_lightning.forensics.memory import limits_of_cgroups
from esper_lightning.forensics.records import Record
from esper_lightning.forensics.secret_texts import (
    is_secret,
    is_whole,
    shortened,
    without_secrets,
    words_without_secrets,
)
from esper_lightning.forensics.sources import digests_of_sources

__all__ = [
    "Fingerprint",
    "differences",
    "fingerprint_of_process",
    "folders_to_restore",
    "loaded_versions",
    "variables_to_restore",
    "with_config",
]

PREFIXES = (
    *("NCCL_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "ATEN_", "DNNL_", "ONEDNN_"),
    *("CUDA_", "CUBLAS_", "OMP_", "MKL_", "KMP_", "XLA_"),
)
"""Beginnings of the names of environment variables that decide how numbers are computed."""
_OTHERS = ("PYTHONHASHSEED",)
_NOT_NUMBERS = ("TORCHINDUCTOR_CACHE_DIR",)  # which torch sets itself while it compiles
_OF_MACHINE = re.compile(
    r"^CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|MPS_)|^NCCL_(SOCKET|IB|NET|COMM_ID|HOSTID|TOPO|CONF|.*_FILE$)"
)
_ATTEMPTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "JOBSET_RESTART_ATTEMPT")
_JOBS = (
    *("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID"),
    *("SLURM_PROCID", "SLURM_NODEID", "SLURM_JOB_NODELIST", "SLURMD_NODENAME"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS", "GROUP_RANK", "RANK", "LOCAL_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "KUBERNETES_SERVICE_HOST", "POD_NAME", "POD_NAMESPACE"),
    *("POD_UID", "NODE_NAME", "JOB_NAME", "JOB_COMPLETION_INDEX", "JOBSET_NAME"),
    *_ATTEMPTS,
)
_OF_PYTHON = re.compile(
    r"[/\\](site|dist)-packages([/\\]|$)|[/\\]lib\d*[/\\]python\d[^/\\]*([/\\]|$)"
)
_GIT_S = 0.5  # longest that git may take to compare the files with the commit
_MOST_BYTES = 32 << 20  # of a difference to the commit
_MOST_RECORD_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Fingerprint(Record):
    """All that decides what a program does, besides its state.

    Attributes:
        command: Words of the command line, without secrets.
        directory: Current directory at the start.
        search_path: Further places where Python looked for modules, besides its own: the folder of
            the program, and those of ``PYTHONPATH`` and of the program's making.
        config: Hash of the resolved config: of ``config.yaml`` on the first rank, where a run has
            that file, and of the module's hyper-parameters otherwise.
        commit: Commit of the user's git repository: that of the program's file, or of the current
            directory where the program is installed; ``None`` outside a repository.
        changes: Hash of the changes to files of that commit that are not committed; empty where
            there are none, and ``None`` where git gave no answer in half a second.
        sources: Digests of the loaded files of the user's program, by path.
        versions: Versions of Python, of this package and of the distributions that are loaded.
        threads: Numbers of threads and of CPUs, by name.
        hardware: Names of machine, processor, devices and driver, and versions of CUDA and NCCL.
        variables: Environment variables that decide how numbers are computed.
        job: Identifiers by which SLURM, Kubernetes or torchelastic know the process.
        attempt: Number of times that the launcher has started the run again.
        limits: Limits of the process's control group: ``memory_bytes`` and ``cpus``.
    """

    command: tuple[str, ...] = ()
    directory: str | None = None
    search_path: tuple[str, ...] = ()
    config: str | None = None
    commit: str | None = None
    changes: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict[str, str])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    threads: Mapping[str, int] = field(default_factory=dict[str, int])
    hardware: Mapping[str, str] = field(default_factory=dict[str, str])
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    job: Mapping[str, str] = field(default_factory=dict[str, str])
    attempt: int | None = None
    limits: Mapping[str, float] = field(default_factory=dict[str, float])


def differences(before: Fingerprint, now: Fingerprint) -> tuple[str, ...]:
    """What differs between two runs, in a few words each, such as ``torch 2.12.0 -> 2.13.0``.

    What differs between any two runs is not compared: the command line, the identifiers of jobs,
    and files and distributions that only one of the runs has loaded.
    """
    found: list[str] = []
    if None not in (before.commit, now.commit) and before.commit != now.commit:
        found.append(f"commit {(before.commit or '')[:10]} -> {(now.commit or '')[:10]}")
    if None not in (before.changes, now.changes) and before.changes != now.changes:
        found.append(f"uncommitted changes {_some(before.changes)} -> {_some(now.changes)}")
    if None not in (before.config, now.config) and before.config != now.config:
        found.append("another config")
    old, new = before.sources, now.sources
    found += [f"{path} changed" for path in old if path in new and old[path] != new[path]]
    for name in ("versions", "threads", "hardware", "limits"):
        old, new = getattr(before, name), getattr(now, name)
        found += [f"{k} {old[k]} -> {new[k]}" for k in old if k in new and old[k] != new[k]]
    old, new = before.variables, now.variables
    for name in sorted(old.keys() | new.keys()) if before.command and now.command else ():
        if old.get(name) != new.get(name):
            found.append(f"{name} {old.get(name, 'not set')} -> {new.get(name, 'not set')}")
    return tuple(found)


def _some(changes: str | None) -> str:
    return changes or "none"


def fingerprint_of_process(main: Path | None) -> Fingerprint:
    """The fingerprint of this process, as far as the standard library knows it.

    Git is asked once in a process for each repository, while the rest is found out.

    Args:
        main: File of the program; ``None`` where there is no such file.
    """
    repository = _repository(_users_folder(main))
    changes = None if repository is None else _changes_of(repository)
    job = {name: shortened(os.environ[name]) for name in _JOBS if name in os.environ}
    attempts = [int(job[name]) for name in _ATTEMPTS if job.get(name, "").isdecimal()]
    fingerprint = Fingerprint(
        command=tuple(words_without_secrets(sys.argv)),
        search_path=_search_path(),
        sources=digests_of_sources(),
        versions={"python": platform.python_version()} | loaded_versions(),
        threads={"cpus": len(os.sched_getaffinity(0))},
        hardware={"machine": platform.machine()} | _processor(),
        variables={
            name: shortened(without_secrets(value))
            for name, value in sorted(os.environ.items())
            if (name.startswith(PREFIXES) or name in _OTHERS) and not is_secret(name)
            if name not in _NOT_NUMBERS
        },
        job=job,
        attempt=max(attempts, default=None),
        limits=limits_of_cgroups(),
    )
    with contextlib.suppress(OSError):  # the current directory may be gone
        fingerprint = replace(fingerprint, directory=str(Path.cwd()))
    if repository is None or changes is None:
        return fingerprint
    return replace(fingerprint, commit=_commit(repository), changes=changes.digest)


def with_config(fingerprint: Fingerprint, content: bytes) -> Fingerprint:
    """A fingerprint with the hash of a config, without the lines that say where a run writes."""
    lines = content.splitlines()
    kept = [line for line in lines if not line.startswith((b"run_dir:", b"ckpt_path:"))]
    digest = hashlib.blake2b(b"\n".join(kept), digest_size=6).hexdigest()
    return replace(fingerprint, config=digest)


def variables_to_restore(fingerprint: Fingerprint) -> tuple[dict[str, str], list[str]]:
    """The variables with which a run computes as before, and the names of those that are lost.

    A variable is lost where its value was hidden or cut. Those that name devices and networks of
    the machine are neither.
    """
    found = {k: v for k, v in fingerprint.variables.items() if not _OF_MACHINE.search(k)}
    lost = [name for name, value in found.items() if not is_whole(value)]
    return {name: value for name, value in found.items() if name not in lost}, lost


def folders_to_restore(fingerprint: Fingerprint) -> list[str]:
    """Places where a run found modules, and this process does not look, in the order of the run.

    A place that has this package is left out: a replay is that of the package that plays it.
    """
    known, own = set(sys.path), __name__.partition(".")[0]
    places = (each for each in fingerprint.search_path if each not in known)
    return [each for each in places if Path(each).exists() and not Path(each, own).exists()]


def _search_path() -> tuple[str, ...]:
    with contextlib.suppress(OSError):  # the current directory may be gone
        places = dict.fromkeys(str(Path(each).absolute()) for each in sys.path)
        of_others = {str(Path.cwd()), sysconfig.get_path("scripts")}
        found = (each for each in places if not (each in of_others or _OF_PYTHON.search(each)))
        return tuple(each for each in found if Path(each).exists())
    return ()


# The user's repository.


def _users_folder(main: Path | None) -> Path | None:
    """Folder of the user's program; the current one where the program is an installed command."""
    with contextlib.suppress(OSError):
        here = Path.cwd()
        if main is None or any(part in ("bin", "site-packages") for part in main.parts):
            return here
        installed = Path(__file__).resolve().parents[1]
        return here if installed in main.resolve().parents else main.resolve().parent
    return None


def _repository(folder: Path | None) -> Path | None:
    """The git repository that holds a folder; ``None`` without one."""
    places = () if folder is None else (folder, *folder.parents)
    return next((place for place in places if (place / ".git").exists()), None)


def _commit(repository: Path) -> str | None:
    """Commit that is checked out, from git's own files: no process is needed."""
    with contextlib.suppress(OSError, ValueError):
        folder = repository / ".git"
        if folder.is_file():  # of a worktree or a submodule
            folder = repository / folder.read_text().removeprefix("gitdir:").strip()
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head[:64]
        return _commit_of(head.removeprefix("ref:").strip(), folder)
    return None


def _commit_of(name: str, folder: Path) -> str | None:
    """Commit of a branch, in the folder of git or, for a worktree, in the folder of all of them."""
    folders = [folder]
    with contextlib.suppress(OSError):
        folders.append(folder / (folder / "commondir").read_text().strip())
    for each in folders:
        with contextlib.suppress(OSError):
            return (each / name).read_text().strip()[:64]
        with contextlib.suppress(OSError):
            for line in (each / "packed-refs").read_text().splitlines():
                if line.endswith(f" {name}"):
                    return line.split()[0][:64]
    return None


@functools.cache
def _changes_of(repository: Path) -> "_Changes":
    return _Changes(repository)


class _Changes:
    """What ``git diff HEAD`` prints, while other things are found out.

    Git writes nothing, and starts no program that a repository may configure: files are compared
    without its filters.

    Args:
        repository: Folder of the repository.
    """

    def __init__(self, repository: Path) -> None:
        self._end = time.monotonic() + _GIT_S
        self._repository = repository
        names = self._filters()
        self._process: subprocess.Popen[bytes] | None = None
        if names is not None:
            unset = ("clean=", "process=", "required=false")
            filters = [f"filter.{name}.{each}" for name in names for each in unset]
            words = [w for each in ("core.fsmonitor=false", *filters) for w in ("-c", each)]
            words += ["diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD", "--"]
            self._process = self._start(words)

    def _start(self, words: Sequence[str]) -> "subprocess.Popen[bytes] | None":
        variables = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
        with contextlib.suppress(OSError):  # there is no git
            return subprocess.Popen(
                ["git", *words],
                cwd=self._repository,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return None

    def _filters(self) -> set[str] | None:
        """Names of the filters that git knows; ``None`` if git took too long or failed."""
        process = self._start(["config", "--null", "--name-only", "--get-regexp", "^filter[.]"])
        found = None if process is None else self._output(process, (0, 1))  # 1: there are none
        if found is None:
            return None
        keys = [os.fsdecode(key) for key in found.split(b"\0") if key]
        if any("=" in key for key in keys):  # ``git -c`` ends the name there
            return None
        return {key.removeprefix("filter.").rpartition(".")[0] for key in keys}

    @functools.cached_property
    def digest(self) -> str | None:
        """Hash of the changes; empty without any, and ``None`` if git took too long or failed."""
        if self._process is None:
            return None
        content = self._output(self._process, (0,))
        if not content:
            return None if content is None else ""
        return hashlib.blake2b(content, digest_size=6).hexdigest()

    def _output(self, process: "subprocess.Popen[bytes]", statuses: Sequence[int]) -> bytes | None:
        """What git prints; ``None`` if it took too long, or ended with another status."""
        with process:
            content = self._read(process)
            if content is None:
                process.kill()
                return None
            return content if process.wait() in statuses else None

    def _read(self, process: "subprocess.Popen[bytes]") -> bytes | None:
        assert process.stdout is not None
        content = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(max(0.0, self._end - time.monotonic())):
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    return bytes(content)
                content += piece
                if len(content) > _MOST_BYTES:
                    return None
        return None


# Software and hardware.


def loaded_versions() -> dict[str, str]:
    """Versions of the distributions of which a module is loaded, by name.

    The names of folders say name and version. Only where no loaded module has the name of the
    distribution are its files read: reading all metadata would take a tenth of a second.
    """
    modules = frozenset(name.partition(".")[0] for name in list(sys.modules))
    found: dict[str, str] = {}
    for entry in dict.fromkeys(sys.path):
        with contextlib.suppress(OSError):
            for folder in os.scandir(entry or "."):
                name, dot, kind = folder.name.rpartition(".")
                if not dot or kind not in ("dist-info", "egg-info"):
                    continue
                name, _, version = name.partition("-")
                own = name.replace(".", "_").lower()
                if own not in found and (own in modules or _has(folder.path, modules)):
                    found[own] = version.partition("-")[0]
    return dict(sorted(found.items()))


def _has(folder: str, modules: frozenset[str]) -> bool:
    """Whether a distribution has one of these modules."""
    return not modules.isdisjoint(_modules_of(folder))


@functools.cache
def _modules_of(folder: str) -> Sequence[str]:
    """Modules of a distribution, by its list of modules or else of files."""
    with contextlib.suppress(OSError, ValueError):
        return Path(folder, "top_level.txt").read_text().split()
    with contextlib.suppress(OSError, ValueError):
        record = Path(folder, "RECORD")
        if record.stat().st_size < _MOST_RECORD_BYTES:
            files = re.findall(r"^(\w+)(?:/__init__)?\.py,", record.read_text(), re.MULTILINE)
            return cast(list[str], files)
    return ()


def _processor() -> dict[str, str]:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return {"processor": line.partition(":")[2].strip()}
    return {}
