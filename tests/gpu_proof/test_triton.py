"""What Inductor makes for a GPU: it compiles to machine code, and its programs are right.

``make gpu-proof`` installs what these tests need.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = ("cartpole", "tanh", "gru", "growth")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]


def run(*words: object, **variables: str) -> dict[str, object]:
    command = [sys.executable, "-m", *map(str, words)]
    env = {**os.environ, "TORCH_COMPILE_DISABLE": "0", "JAXTYPING_DISABLE": "1", **variables}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """A folder with the programs of all stages, and ``kernels.json`` with their numbers."""
    folder = tmp_path_factory.mktemp("programs")
    library = ROOT / ".pytest_cache" / "fake_cuda"
    caches = {name: str(folder) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    modules = ("tests.gpu_proof.with_fake_cuda", library, "tests.gpu_proof.lowering")
    found = run(*modules, folder, *CASES, **caches)
    (folder / "kernels.json").write_text(json.dumps(found))
    return folder


@pytest.mark.timeout(1800)
def test_every_kernel_compiles_to_machine_code(programs):
    found = json.loads((programs / "kernels.json").read_text())
    assert len(found) == 4 * 3 + 1
    for name, counts in found.items():
        assert counts["compiled"] == counts["configurations"] >= counts["kernels"] > 0, name
    # Launches of one step, by which the time of a small run is bounded.
    assert found["cartpole-rollout"]["launches"] <= 12
    assert found["cartpole-update"]["launches"] <= 42
    assert found["growth-update"]["launches"] <= 300  # 959 before


@pytest.mark.timeout(1800)
def test_interpreted_programs_agree_with_the_graphs_that_they_were_made_of(programs):
    found = run("tests.gpu_proof.interpreted", programs, *CASES, TRITON_INTERPRET="1")
    assert len(found) == 4 * 3 + 1
    for name, difference in found.items():
        assert difference < (1e-12 if name.endswith("advantages") else 1e-6), (name, difference)
