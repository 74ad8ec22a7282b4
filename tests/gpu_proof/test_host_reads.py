"""Nothing of an iteration reads the host, or copies between host and device, but for one read.

Iterations run on a fake CUDA device (``on_cuda``), in a process of their own. The numbers of
kernels are compared with ``kernels.json``, so that a change that launches more of them is seen.
This writes the file anew:

    python -m tests.gpu_proof.with_fake_cuda .pytest_cache/fake_cuda tests.gpu_proof.on_cuda --write
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).with_name("kernels.json")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("group", ["few", pytest.param("others", marks=pytest.mark.slow)])
def test_an_iteration_reads_the_host_once_and_launches_no_more_kernels_than_before(group):
    env = {**os.environ, "TORCH_COMPILE_DISABLE": "0", "JAXTYPING_DISABLE": "1"}
    folder = str(ROOT / ".pytest_cache" / "fake_cuda")
    modules = ("tests.gpu_proof.with_fake_cuda", folder, "tests.gpu_proof.on_cuda")
    command = [sys.executable, "-m", *modules, group]
    ended = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    found, hosts, evaluation = json.loads(ended.stdout).values()
    assert evaluation == {"steps": 1 + 32, "reads": True, "copies": {}}
    expected = json.loads(KERNELS.read_text())
    cases = [name for name in found if name.endswith(", off")]
    assert len(found) == 2 * len(cases) >= 6
    assert len(hosts) == (2 if group == "others" else 0)
    wrong = {name: count for name, count in hosts.items() if count != expected[name]}
    for name, case in found.items():
        if case.get("error") or case["copies"] or not case["reads where it must"]:
            wrong[name] = case
        elif not case["compiled"]:
            wrong[name] = "What is to be compiled runs eagerly."
        elif name in cases and case["kernels"] != expected[name.removesuffix(", off")]:
            wrong[name] = f"{case['kernels']} and not {expected[name.removesuffix(', off')]}"
    assert not wrong, json.dumps(wrong, indent=1)
