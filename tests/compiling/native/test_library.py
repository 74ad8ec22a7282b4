"""Compiled code is cached privately and whole; what cannot be compiled is said in a line."""

import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from esper_lightning.compiling.native import library
from esper_lightning.compiling.native.library import build_library, cache_directory, find_compiler
from esper_lightning.compiling.native.values import UnsupportedError
from tests import forked

SOURCE = 'extern "C" int answer() { return 42; }'
CONSTANT = 'extern "C" int answer() { return 0x1234567; }'
BUILD = (
    "from esper_lightning.compiling.native.library import build_library\n"
    f"assert build_library({SOURCE!r}).answer() == 42"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of libraries; the compiler is not asked whether it rounds as it must."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(library, "_flaw", lambda *_: None)
    return tmp_path / "esper_lightning" / "native"


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    seen: list[str] = []
    original = library._compile

    def compile_(*args) -> None:
        seen.append(args[2])
        original(*args)

    monkeypatch.setattr(library, "_compile", compile_)
    return seen


def test_a_library_is_compiled_once_and_is_its_owners_alone(folder, compilations):
    umask = os.umask(0)
    try:
        assert [build_library(SOURCE).answer() for _ in range(2)] == [42, 42]
    finally:
        os.umask(umask)
    assert len(compilations) == 1
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_other_sources_flags_and_compilers_are_other_libraries(folder, compilations, monkeypatch):
    build_library(SOURCE)
    build_library(SOURCE + "\n")
    monkeypatch.setenv("CXXFLAGS", "-O1")
    build_library(SOURCE)
    monkeypatch.setenv("CXX", f"{find_compiler()[0]} -fno-ident")
    build_library(SOURCE)
    assert len(compilations) == len(list(folder.iterdir())) == 4


def is_other(content: bytes) -> bytes:
    """A library that can be loaded, and computes wrongly."""
    at = content.index((0x1234567).to_bytes(4, "little"))
    return content[:at] + b"\0" + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "text": lambda content: b"not a library",
    "cut": lambda content: content[:8192],  # loading it ends the process
    "short": lambda content: content[:-4096],
    "zeros": lambda content: content[:4096] + bytes(4096) + content[8192:],
    "other": is_other,
}


def test_a_damaged_library_is_compiled_again(folder):
    build_library(CONSTANT)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for name, damage in DAMAGES.items():
        damaged = folder / name / "esper_lightning" / "native" / path.name
        damaged.parent.mkdir(parents=True)
        damaged.write_bytes(damage(whole))
    program = (
        "import os, pathlib, sys\n"
        "from esper_lightning.compiling.native import library\n"
        "whole = pathlib.Path(sys.argv[1]).read_bytes()\n"
        "library._flaw = lambda *_: None\n"
        "library._compile = lambda *arguments: arguments[3].write_bytes(whole)\n"
        "for os.environ['XDG_CACHE_HOME'] in sys.argv[2:]:\n"
        f"    print(library.build_library({CONSTANT!r}).answer())\n"
    )
    done = forked.run(["-c", program, str(path), *(str(folder / name) for name in DAMAGES)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(0x1234567)] * len(DAMAGES)


def test_a_library_is_on_the_disk_before_its_name_is(folder, monkeypatch):
    """Else a power failure could leave the name of a file without content."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def record_replace(path: Path, target: Path) -> Path:
        events.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    build_library(SOURCE)
    assert events == ["file", "rename", "folder"]


def test_what_a_killed_process_left_is_deleted(folder):
    left, living = cache_directory() / "build-left", cache_directory() / "build-living"
    for build in (left, living):
        build.mkdir()
        (build / "code.cpp").touch()
    os.utime(left, (0, 0))
    build_library(SOURCE)
    assert {path.name for path in folder.glob("build-*")} == {"build-living"}


def test_processes_and_threads_that_compile_at_once_do_not_disturb_each_other(folder):
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: forked.run(["-c", BUILD]), range(4)))
    assert [one.returncode for one in done] == [0] * 4, done[0].stderr
    assert len(list(folder.iterdir())) == 2  # with the library that shows how the compiler rounds


def test_what_was_used_least_is_deleted_where_the_cache_is_full(folder, monkeypatch):
    for number in range(3):
        build_library(f"{SOURCE}  // {number}")
        for path in folder.iterdir():
            os.utime(path, (path.stat().st_atime - 100, path.stat().st_mtime - 100))
    first, *_ = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    size = first.stat().st_size
    build_library(f"{SOURCE}  // 0")  # now it is the latest
    monkeypatch.setattr(library, "_MOST_BYTES", int(2.5 * size))
    build_library(f"{SOURCE}  // 3")
    assert first.exists()
    assert len(list(folder.iterdir())) == 2


def refused(words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        build_library(SOURCE)
    assert "\n" not in str(caught.value)


def test_without_a_compiler_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    refused("CXX='no-such-compiler -x' is no program .*install g\\+\\+ or clang")
    monkeypatch.setenv("CXX", "g++ '-O2")
    refused('CXX="g\\+\\+ \'-O2" cannot be read: No closing quotation')
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("there is no C\\+\\+ compiler .*install g\\+\\+ or clang")


def test_a_compiler_that_fails_leaves_nothing(folder, monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-no-such-flag")
    refused("failed: .*no-such-flag")
    assert list(folder.iterdir()) == []


def test_a_program_that_is_no_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    refused("^\\S*false --version ends with status 1 \\(install g\\+\\+ or clang, or set CXX\\)$")
    monkeypatch.setenv("CXX", "true")
    refused("true made no library .*install g\\+\\+ or clang")


UNUSABLE = """#!/bin/sh
[ "$1" = --version ] && exit
for last; do :; done
echo "no library" > "$last"
"""


def test_the_reason_of_a_failure_is_the_same_at_every_call(tmp_path, monkeypatch):
    """Each reason is logged once: the name of no file of the cache may be in it."""

    def reasons(*sources: str) -> set[str]:
        found: set[str] = set()
        for source in sources:
            with pytest.raises(UnsupportedError) as caught:
                build_library(source)
            found.add(str(caught.value))
        return found

    (reason,) = reasons("int x = ;", "int x = ;")
    assert re.search(r"failed: code\.cpp:.*error", reason)
    compiler = tmp_path / "compiler"
    compiler.write_text(UNUSABLE)
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    (reason,) = reasons("int a;", "int b;")
    assert reason.startswith("compiled code cannot be loaded: ")


SLEEPS = """#!/bin/sh
[ "$1" = --version ] && exit
exec sleep 20
"""


def test_a_compiler_that_takes_long_is_named_while_it_runs(tmp_path, monkeypatch, caplog):
    compiler = tmp_path / "compiler"
    compiler.write_text(SLEEPS)
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(library, "_SLOW_S", 0.05)
    monkeypatch.setattr(library, "_COMPILE_S", 0.1)
    refused("compiler took more than 0 s")
    (record,) = caplog.records
    assert "compiler has compiled a part of the training for" in record.getMessage()


def test_large_sources_are_compiled_with_fewer_optimizations(monkeypatch):
    """With -O3, ten times as long or longer."""
    flags: list[list[str]] = []
    monkeypatch.setattr(library, "_compile", lambda _, given, *rest: flags.append(given))
    for source in (SOURCE, SOURCE.ljust(200_000)):
        with pytest.raises(UnsupportedError, match="cannot be loaded"):
            build_library(source)
    small, large = ([flag for flag in one if flag.startswith("-O")][-1] for one in flags)
    assert (small, large) == ("-O3", "-O1")


def test_a_cache_that_others_may_write_to_is_not_used(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    refused("may be written by others")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # of no user
    refused("no folder for compiled code: the user has no home folder")


LINKER_FAILS = """#!/bin/sh
[ "$1" = --version ] && exit
echo "/usr/bin/ld: final link failed: No space left on device" >&2
echo "collect2: error: ld returned 1 exit status" >&2
exit 1
"""


def test_why_a_linker_fails_is_said(tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text(LINKER_FAILS)
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    refused("compiler failed: /usr/bin/ld: final link failed: No space left on device$")


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused("no folder for compiled code")


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_leaves_no_torn_library(small_disk, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    folder = cache_directory()
    (small_disk / "filler").touch()
    with pytest.raises(OSError, match="space"):
        fill(small_disk / "filler")
    refused("[Nn]o space left on device")
    assert list(folder.glob("*.so")) == []


def test_the_compiler_sees_nothing_of_torch():
    text = "\n".join(header.read_text() for header in library._HEADERS)
    included = [line for line in text.splitlines() if line.startswith("#include")]
    assert {line.split()[1] for line in included} <= {
        "<pthread.h>",
        "<signal.h>",
        "<stddef.h>",
        "<stdint.h>",
    }


def test_a_relative_folder_of_caches_is_ignored(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory().is_relative_to(tmp_path / "home")
    assert not (tmp_path / "relative").exists()
