"""The recipe for Ray Train runs as it is printed, and resumes after a worker was killed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from esper_lightning.forensics.attempts import read_attempts
from esper_lightning.forensics.files import read_json_lines

ROOT = Path(__file__).parents[2]
DIES = """
from tests.crash.dies import Dies
dies = Dies(at=15, how="kill", rank=1, once={once!r})
callbacks = run_callbacks
run_callbacks = lambda **settings: [*callbacks(**settings), dies]
"""


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(600)
def test_the_recipe_for_ray_resumes_after_a_death(tmp_path):
    pytest.importorskip("ray.train", reason="Ray Train is not installed: pip install 'ray[train]'")
    (recipe,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "clusters.md").read_text(), re.M | re.S
    )
    before, main, after = recipe.partition("\n\ndef train(config)")
    program = tmp_path / "recipe.py"
    program.write_text(before + DIES.format(once=str(tmp_path / "once")) + main + after)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    how = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, program], check=False, timeout=500, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "ray"
    assert [each.state for each in read_attempts([run])] == ["failed", "finished"]
    for rank in range(2):
        rows = [row["iteration"] for row in read_json_lines(run / f"rank{rank}" / "history.jsonl")]
        assert rows == list(range(1, len(rows) + 1))
