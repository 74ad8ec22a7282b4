"""Compiling C++ to a shared library, and the cache of libraries on disk.

A library's name is a hash of everything that its content depends on: source, compiler, flags and
kind of processor. Files appear whole (they are renamed) and are readable by their owner only. Each
ends with a digest of its content, which is compared before the file is loaded. The oldest are
deleted when there are too many. What a compiler makes is used only if a small library, made by the
same command, shows that it rounds as it must (``exactness``).
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from esper_lightning.compiling.native.exactness import PROBE, flaw_of
from esper_lightning.compiling.native.values import UnsupportedError

__all__ = ["build_library", "cache_directory", "compiler_digest", "find_compiler"]

_log = logging.getLogger(__name__)
_HEADERS = [Path(__file__).with_name(name) for name in ("kernels.hpp", "convolutions.hpp")]
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fopenmp-simd", "-fwrapv", "-w"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
_MOST_BYTES = 256 * 2**20  # of all libraries in the cache
_LARGE = 150_000  # characters of a source for which -O3 takes too long, up to 30 s and more
_SLOW_S = 20.0  # seconds after which a line says that a compiler takes long
_COMPILE_S = 300.0  # seconds after which a compiler is given up
_ABANDONED_S = 3600.0  # age of a build folder whose process must be dead
_DIGEST_BYTES = hashlib.sha256().digest_size
_INSTALL = "install g++ or clang, or set CXX"


def find_compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX``, else ``g++``, ``clang++`` or ``c++``.

    Raises:
        UnsupportedError: If there is none.
    """
    chosen = _words_of("CXX")
    for words in [chosen] if chosen else [["g++"], ["clang++"], ["c++"]]:
        path = shutil.which(words[0])
        if path is not None:
            return [path, *words[1:]]
    named = os.environ.get("CXX", "").strip()
    what = f"CXX={named!r} is no program" if chosen else "there is no C++ compiler"
    raise UnsupportedError(f"{what} ({_INSTALL})")


def _words_of(variable: str) -> list[str]:
    """The words of an environment variable, which are divided as in a shell."""
    value = os.environ.get(variable, "").strip()
    try:
        return shlex.split(value)
    except ValueError as error:  # a quote without its end
        raise UnsupportedError(f"{variable}={value!r} cannot be read: {error}") from error


@functools.cache
def _identity(command: tuple[str, ...]) -> str:
    """What a compiler's output depends on besides source and flags."""
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=60, check=True
        )
    except subprocess.CalledProcessError as error:
        why = f"{command[0]} --version ends with status {error.returncode}"
        raise UnsupportedError(f"{why} ({_INSTALL})") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise UnsupportedError(f"{command[0]} does not run: {error}") from error
    return "\n".join([*command, done.stdout, _processor()])


def compiler_digest() -> str:
    """A hash of the C++ compiler and of the processor for which it compiles; "none" without one."""
    try:
        identity = _identity(tuple(find_compiler()))
    except UnsupportedError:
        return "none"
    return hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()


def _processor() -> str:
    """The kind of processor, for which ``-march=native`` compiles."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("model name", "flags", "features", "cpu part")
        return "\n".join(sorted({line for line in lines if line.lower().startswith(wanted)}))
    return f"{platform.machine()} {platform.processor()}"


def cache_directory() -> Path:
    """The folder of compiled libraries, which nobody else may write to.

    It is ``esper_lightning/native`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        UnsupportedError: If there is no such folder and none can be made.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the standard has relative ones ignored
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:  # of a user without an entry, as in some containers
            why = "the user has no home folder (set HOME or XDG_CACHE_HOME)"
            raise UnsupportedError(f"no folder for compiled code: {why}") from error
    folder = base / "esper_lightning" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise UnsupportedError(f"no folder for compiled code: {error}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UnsupportedError(
            f"{folder} may be written by others (remove it, or set XDG_CACHE_HOME)"
        )
    return folder


def build_library(source: str, *more_flags: str) -> ctypes.CDLL:
    """Compile C++ into a shared library, or take it from the cache.

    Args:
        source: C++ text, to which ``kernels.hpp`` and ``convolutions.hpp`` are prepended.
        *more_flags: Flags of the compiler that override the usual ones.

    Raises:
        UnsupportedError: If there is no compiler, if it fails or rounds otherwise than it must, or
            if the library cannot be written or loaded.
    """
    command = find_compiler()
    identity = _identity(tuple(command))
    own = _words_of("CXXFLAGS")
    flags = [*_FLAGS, *(["-O1"] if len(source) > _LARGE else []), _architecture_flag(), *own]
    if "Free Software Foundation" in identity:
        # Else a sum may be rounded twice in one loop and once in another, as the tuning for some
        # processors has it: the rows of a product would differ with the division among threads.
        flags.append("--param=avoid-fma-max-bits=0")
    if (flaw := _flaw(tuple(command), tuple(flags))) is not None:
        raise UnsupportedError(f"code of {shlex.join([*command, *own])} {flaw}")
    flags += more_flags  # of the package, which knows what they change
    text = "\n".join([*(header.read_text() for header in _HEADERS), source, ""])
    return _library(command, flags, text)


@functools.cache
def _flaw(command: tuple[str, ...], flags: tuple[str, ...]) -> str | None:
    """What a compiler does that it must not with some flags; ``None`` if nothing."""
    return flaw_of(lambda: _library(command, flags, PROBE))


def _library(command: Sequence[str], flags: Sequence[str], text: str) -> ctypes.CDLL:
    """The library of a text, from the cache if it is there."""
    key = "\n".join([_identity(tuple(command)), *flags, text])
    folder = cache_directory()
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if _is_whole(path):
        with suppress(OSError):  # a file that needs libraries of another system is compiled again
            os.utime(path)
            return ctypes.CDLL(str(path))
    _compile(command, flags, text, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        why = str(error).replace(f"{path}: ", "")  # each reason is logged once
        raise UnsupportedError(f"compiled code cannot be loaded: {why}") from error


def _is_whole(path: Path) -> bool:
    """Whether a file ends with the digest of what comes before.

    A library that is cut or changed could end the process when it is loaded, or compute wrongly.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return _digest(content[:-_DIGEST_BYTES]) == content[-_DIGEST_BYTES:]


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _architecture_flag() -> str:
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    return "-mcpu=native" if is_arm else "-march=native"


def _compile(command: Sequence[str], flags: Sequence[str], text: str, path: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as build:
            source, made = Path(build) / "code.cpp", Path(build) / "code.so"
            source.write_text(text)
            done = _run([*command, *flags, str(source), "-o", str(made)])
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
                # Linkers say why they fail before the compiler says that they do.
                errors = [line for line in lines if re.search("error|failed|No space", line)]
                said = (errors or lines)[0].replace(f"{build}/", "")  # each reason is logged once
                raise UnsupportedError(f"{command[0]} failed: {said[:200]}")
            if not made.exists():
                raise UnsupportedError(f"{command[0]} made no library ({_INSTALL})")
            _finish(made, path)
    except subprocess.TimeoutExpired as error:
        raise UnsupportedError(f"{command[0]} took more than {_COMPILE_S:.0f} s") from error
    except OSError as error:
        why = error.strerror or error  # without the temporary path
        raise UnsupportedError(f"code cannot be compiled in {path.parent}: {why}") from error
    _delete_abandoned(path.parent)
    _delete_oldest(path.parent, keep=path)


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler to its end, with a line in the log where that takes long."""
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, errors="replace") as process:
        try:
            try:
                out, err = process.communicate(timeout=_SLOW_S)
            except subprocess.TimeoutExpired:
                line = "%s has compiled a part of the training for %.0f s; the result is cached."
                _log.warning(line, words[0], _SLOW_S)
                out, err = process.communicate(timeout=_COMPILE_S - _SLOW_S)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def _finish(made: Path, path: Path) -> None:
    """Append the digest, which loaders ignore, and move a library to its place."""
    made.chmod(0o700)
    digest = _digest(made.read_bytes())
    with made.open("ab") as file:
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())
    made.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _delete_abandoned(folder: Path) -> None:
    """Delete the folders of processes that were killed while they compiled."""
    for path in folder.glob("build-*"):
        with suppress(OSError):  # another process deleted it
            if path.stat().st_mtime < time.time() - _ABANDONED_S:
                shutil.rmtree(path)


def _delete_oldest(folder: Path, *, keep: Path) -> None:
    """Delete the libraries that were not used for the longest time, if all are too large."""
    found: list[tuple[float, int, Path]] = []
    for path in folder.glob("*.so"):
        with suppress(OSError):  # another process deleted it
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= _MOST_BYTES:
            return
        if path != keep:
            with suppress(OSError):
                path.unlink()
            total -= size
