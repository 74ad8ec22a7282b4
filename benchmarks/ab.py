"""An A/B comparison on CartPole by one command, with one of its runs killed half-way.

Starts ``scripts/ab.py`` as a user would, sends SIGKILL to one run when half its budget is used, and
writes the comparison by ``esper compare`` to ``results/ab.md`` and ``ab.png``.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conditions import ROOT, benchmark_parser, results

from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.rank_record import ProcessRecord

VARIANTS = ("--variant", "base", "--variant", "slow: --model.ppo.learning_rate 3e-4")


def kill_half_way(launcher: subprocess.Popen[bytes], run: Path, at_env_steps: int) -> str:
    """Wait until a run has as many env steps, and kill it; returns a sentence about the kill."""
    while True:
        rows = read_json_lines(run / "rank0" / "history.jsonl")
        if rows and rows[-1]["env_steps"] >= at_env_steps:
            break
        if launcher.poll() is not None:
            sys.exit(f"{run} must get to {at_env_steps:,} env steps, and everything has ended.")
        time.sleep(0.01)
    process = ProcessRecord.read(run / "rank0" / "process.json")
    assert process is not None
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    return f"SIGKILL to `slow/{run.name}` when it had {rows[-1]['env_steps']:,} env steps"


def parser() -> argparse.ArgumentParser:
    settings = ["--model.env.num_envs", "4", "--model.total_env_steps", "2_560"]
    settings += ["--model.eval_episodes", "2", "--model.iterations_per_epoch", "5"]
    smallest = {"seeds": [0], "killed": 0, "at_env_steps": 256, "settings": settings}
    parser = benchmark_parser(__doc__, smallest)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.set_defaults(
        seeds=[0, 1, 2, 3, 4],
        killed=3,  # seed of the run that is killed
        at_env_steps=250_000,
        settings=["--model.iterations_per_epoch", "10"],
    )
    return parser


def main() -> None:
    options = parser().parse_args()
    with (
        results(__file__, options, threads="one thread a run") as files,
        tempfile.TemporaryDirectory() as folder,
    ):
        output = Path(folder) / "ab"
        command = [sys.executable, str(ROOT / "scripts" / "ab.py"), *VARIANTS]
        command += ["--config", "configs/cartpole.yaml", "--output", str(output)]
        command += ["--seeds", *map(str, options.seeds), "--jobs", str(options.jobs)]
        start = time.monotonic()
        launcher = subprocess.Popen([*command, "--", *options.settings], cwd=ROOT)
        killed = kill_half_way(
            launcher, output / "slow" / f"seed{options.killed}", options.at_env_steps
        )
        status = launcher.wait()
        took_s = time.monotonic() - start
        title, _, rest = (output / "comparison.md").read_text().partition("\n")
        shown = rest.replace(f"{output}/", "").replace("comparison.png", "ab.png").strip()
        files.write(
            title.removeprefix("# "),
            [
                f"- killed: {killed}",
                f"- {options.jobs} runs at a time; {took_s:.0f} s in all, exit status {status}",
                "",
                shown,
            ],
        )
        shutil.copyfile(output / "comparison.png", files.path(suffix=".png"))


if __name__ == "__main__":
    main()
