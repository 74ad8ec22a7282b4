"""An A/B on CartPole from one command, with one of its runs killed half-way.

Starts ``scripts/ab.py`` as a user would, sends SIGKILL to one run when it has half its budget, and
writes what ``esper compare`` made of it to ``benchmarks/results/ab.md`` and ``ab.png``.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conditions import ROOT, conditions

from esper_lightning.forensics.files import read_json_lines

KILLED, AT_ENV_STEPS = Path("slow/seed3"), 250_000
COMMAND = [
    *("scripts/ab.py", "--config", "configs/cartpole.yaml", "--seeds", "0", "1", "2", "3", "4"),
    *("--variant", "base", "--variant", "slow: --model.ppo.learning_rate 3e-4"),
]


def kill_half_way(run: Path) -> str:
    """Wait for the run to get there, and kill it."""
    while True:
        rows = read_json_lines(run / "rank0" / "history.jsonl")
        if rows and rows[-1]["env_steps"] >= AT_ENV_STEPS:
            break
        time.sleep(0.05)
    process = json.loads((run / "rank0" / "process.json").read_text())
    os.kill(process["pid"], signal.SIGKILL)
    return f"SIGKILL to `{KILLED}` when it had {rows[-1]['env_steps']:,} env steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        output = Path(folder).relative_to(ROOT) / "ab"
        under = conditions("python benchmarks/ab.py")
        arguments = [*COMMAND, "--output", str(output), "--jobs", str(options.jobs)]
        arguments += ["--", "--model.iterations_per_epoch", "10"]
        start = time.monotonic()
        launcher = subprocess.Popen([sys.executable, *arguments], cwd=ROOT)
        killed = kill_half_way(ROOT / output / KILLED)
        status = launcher.wait()
        took_s = time.monotonic() - start
        text = (ROOT / output / "comparison.md").read_text().replace(f"{output}/", "")
        results = ROOT / "benchmarks" / "results"
        title, _, rest = text.partition("\n")
        head = [
            *(title, "", under, f"- killed: {killed}"),
            f"- {options.jobs} runs at a time; {took_s:.0f} s in all, exit status {status}",
        ]
        text = "\n".join(head) + "\n" + rest.replace("comparison.png", "ab.png")
        (results / "ab.md").write_text(text)
        shutil.copyfile(ROOT / output / "comparison.png", results / "ab.png")


if __name__ == "__main__":
    main()
