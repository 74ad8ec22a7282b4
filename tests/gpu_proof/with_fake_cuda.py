"""A program with a fake CUDA: ``python -m tests.gpu_proof.with_fake_cuda FOLDER MODULE ...``.

A torch without CUDA refuses to differentiate tensors on ``cuda``. A small library with a guard of
the device and hooks that do nothing makes torch accept them, if the library is loaded before torch
is. ``FOLDER`` keeps the compiled library for the next program.
"""

import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


def load(folder: Path) -> None:
    """Compile the library, unless it is there, and load it."""
    assert "torch" not in sys.modules
    library = folder / f"fake_cuda_{version('torch')}.so"
    if not library.exists():
        _compile(library)
    ctypes.CDLL(str(library))


def _compile(library: Path) -> None:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None  # noqa: PT018
    root = Path(found.origin).parent
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".so", delete=False) as file:
        flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{root}/include", f"-L{root}/lib"]
        libraries = ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib", "-o", file.name]
        source = Path(__file__).with_name("fake_cuda.cpp")
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, *flags, str(source), *libraries], check=True)
    Path(file.name).replace(library)


if __name__ == "__main__":
    _, _folder, _module, *_rest = sys.argv
    load(Path(_folder))
    sys.argv = [_module, *_rest]
    runpy.run_module(_module, run_name="__main__", alter_sys=True)
