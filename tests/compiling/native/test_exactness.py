"""Compilers that do not round as they must are refused, however their flags are called."""

import shutil
import subprocess
import sys

import pytest
import torch

from esper_lightning.compiling.native import library
from esper_lightning.compiling.native.library import build_library
from esper_lightning.compiling.native.values import UnsupportedError

SOURCE = 'extern "C" int answer() { return 42; }'
LOOSE = {
    "-ffast-math": "does not notice NaN",
    "-ffp-contract=fast": "does not round products",
    "-fassociative-math -fno-signed-zeros": "changes the order of sums",
    "-fno-signed-zeros": "loses the signs of zeros",
    "-freciprocal-math": "does not round quotients",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "g++")
    library._flaw.cache_clear()
    yield
    library._flaw.cache_clear()


def refused(words: str) -> None:
    for _ in range(2):  # a library that is loaded again may behave better than at first
        with pytest.raises(UnsupportedError, match=f"^code of \\S*g\\+\\+ -?\\S.* {words}$"):
            build_library(SOURCE)


@pytest.mark.parametrize("flag", LOOSE)
def test_loose_flags_are_refused(flag, monkeypatch):
    monkeypatch.setenv("CXXFLAGS", flag)
    refused(LOOSE[flag])


def test_loose_flags_in_the_command_are_refused_and_do_not_change_torch(monkeypatch):
    """``-ffast-math`` has all code of a thread take denormal numbers for zero."""
    monkeypatch.setenv("CXX", "g++ -ffast-math")
    refused("does not notice NaN")
    assert bool((torch.full((8,), 1e-40) * torch.ones(8) > 0.0).all())


def crtfastmath() -> str:
    """The object file with which a library has denormal numbers taken for zero."""
    words = ["g++", "-print-file-name=crtfastmath.o"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="the object file is one of Linux")
def test_a_library_that_loses_denormal_numbers_is_refused(monkeypatch):
    monkeypatch.setenv("CXXFLAGS", crtfastmath())
    refused("takes denormal numbers for zero")


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_flags_of_clang_are_refused(monkeypatch):
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setenv("CXXFLAGS", "-fno-honor-nans")
    refused("does not notice NaN")


def test_a_compiler_is_asked_once(monkeypatch):
    made: list[str] = []
    original = library._compile
    monkeypatch.setattr(library, "_compile", lambda *args: (made.append(args[2]), original(*args)))
    build_library(SOURCE)
    assert len(made) == 2
    library._flaw.cache_clear()  # as in another process
    build_library(SOURCE)
    build_library(SOURCE + "\n")
    assert len(made) == 3


def test_a_user_who_has_torch_flush_denormal_numbers_keeps_it_so():
    torch.set_flush_denormal(True)
    try:
        build_library(SOURCE)
        assert bool((torch.full((8,), 2.0**-126) * 0.5 == 0.0).all())
    finally:
        torch.set_flush_denormal(False)
