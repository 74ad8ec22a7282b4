"""CartPole on one process and on two ranks: wall clock, throughput, and whether it is solved.

In each of several rounds every contender runs in turn, in processes of its own with one thread a
rank. Writes ``results/ranks.md``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from conditions import ROOT, benchmark_parser, results

from esper_lightning.forensics.files import read_json_lines

CONTENDERS = {"1 process": 1, "2 ranks": 2}


class Run(NamedTuple):
    """Duration, speed and result of a run; the speed is that of the median iteration."""

    wall_s: float
    env_steps: float
    env_steps_per_s: float
    episode_return: float


def train(ranks: int, options: argparse.Namespace, directory: Path) -> Run:
    """Train one run of the config; its speed excludes start-up and evaluations."""
    words = [sys.executable, "-m", "esper_lightning.cli.main", "fit", "--run_dir", str(directory)]
    words += ["--config", str(ROOT / "configs" / "cartpole.yaml")]
    words += ["--model.env.num_envs", str(options.num_envs)]
    words += ["--model.total_env_steps", str(ranks * options.env_steps)]
    words += ["--model.eval_episodes", str(options.episodes)]
    words += ["--trainer.devices", str(ranks), "--trainer.accelerator", "cpu"]
    words += ["--trainer.strategy", "ddp" if ranks > 1 else "auto"]
    words += ["--trainer.enable_progress_bar", "false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
    wall_s = time.perf_counter() - began
    rows = read_json_lines(directory / "rank0/history.jsonl")
    evaluation = read_json_lines(directory / "rank0/evaluations.jsonl")[-1]
    speed = statistics.median(row["env_steps_per_s"] for row in rows)
    return Run(wall_s, rows[-1]["env_steps"], speed, evaluation["eval/episode_return_mean"])


def measure(options: argparse.Namespace) -> list[str]:
    """Lines of the table, and of the ratios of each round."""
    found: dict[str, list[Run]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name, ranks in CONTENDERS.items():
                found[name].append(train(ranks, options, Path(folder, f"{ranks}-{number}")))
                print(name, json.dumps(found[name][-1]._asdict()), flush=True)
    lines = [
        "Medians over rounds, every contender in turn. Env-steps/s are those of the median "
        "iteration; wall clock is that of the whole command.",
        "",
        "| contender | env steps | wall clock (s) | env-steps/s | of each rank | last evaluation |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, ranks in CONTENDERS.items():
        typical = Run(*map(statistics.median, zip(*found[name], strict=True)))
        speed, per_rank = typical.env_steps_per_s, typical.env_steps_per_s / ranks
        lines.append(
            f"| {name} x {options.num_envs} | {typical.env_steps:,.0f} | {typical.wall_s:.1f} "
            f"| {speed:,.0f} | {per_rank:,.0f} | {typical.episode_return:.1f} |"
        )
    pairs = zip(found["2 ranks"], found["1 process"], strict=True)
    ratios = ", ".join(f"{two.env_steps_per_s / one.env_steps_per_s:.2f}" for two, one in pairs)
    lines += ["", "Ratio of two ranks to one process, of each round, in env-steps/s:", ""]
    return [*lines, f"- {options.num_envs} environments on each: {ratios}"]


def parser() -> argparse.ArgumentParser:
    smallest = {"rounds": 1, "num_envs": 4, "env_steps": 256, "episodes": 2}
    parser = benchmark_parser(__doc__, smallest)
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(num_envs=64, env_steps=500_000, episodes=100)
    return parser


def main() -> None:
    options = parser().parse_args()
    with results(__file__, options, threads="one thread a rank") as files:
        files.write("CartPole on one process and on two gloo ranks", measure(options))


if __name__ == "__main__":
    main()
