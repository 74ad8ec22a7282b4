"""Learning on every classic task: 5 seeds, with the configs as they are.

Each run ends with 100 deterministic evaluation episodes. The benchmark runs ``esper fit`` as a user
would, one thread each, as many at a time as there are cores, and writes a table and the raw
metrics: ``results/learning.md`` and ``learning.json``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from conditions import ROOT, benchmark_parser, results

GOALS = {"cartpole": 475.0, "acrobot": -100.0, "pendulum": -250.0, "mountain_car": None}


def finish(command: list[str], **given: Any) -> float:
    """Run a process to its end, on one thread; returns its CPU seconds.

    Raises:
        CalledProcessError: If the process fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, **given)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return used.ru_utime + used.ru_stime


def train(
    job: tuple[str, int], options: argparse.Namespace, folder: Path, python: str = sys.executable
) -> dict[str, Any]:
    """Train one run; returns its last evaluation and its last history row."""
    task, seed = job
    run = folder / f"{task}-{seed}"
    command = [python, "-m", "esper_lightning.cli.main", "fit"]
    command += ["--config", str(ROOT / "configs" / f"{task}.yaml"), "--run_dir", str(run)]
    command += ["--model.seed", str(seed)]
    command += ["--trainer.enable_progress_bar", "false", *options.settings]
    cpu_s = finish(command, cwd=folder, stdout=subprocess.DEVNULL)
    evaluation = json.loads((run / "rank0" / "evaluations.jsonl").read_text().splitlines()[-1])
    row = json.loads((run / "rank0" / "history.jsonl").read_text().splitlines()[-1])
    assert evaluation["iteration"] == row["iteration"]
    print(f"{task} seed {seed}: {evaluation['eval/episode_return_mean']:.1f}", flush=True)
    return {
        "task": task,
        "seed": seed,
        "env_steps": row["env_steps"],
        "train_time_s": round(row["time_s"], 1),
        "cpu_s": round(cpu_s, 1),
        "return_mean": evaluation["eval/episode_return_mean"],
        "return_std": evaluation["eval/episode_return_std"],
        "episodes": evaluation["eval/episodes"],
    }


def table(runs: list[dict[str, Any]], tasks: list[str]) -> list[str]:
    lines = [
        "| task | env steps | goal | mean return of each seed | worst | mean | training, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in tasks:
        mine = [run for run in runs if run["task"] == task]
        returns = [run["return_mean"] for run in mine]
        goal = "none" if GOALS[task] is None else f">= {GOALS[task]:g}"
        seconds = sorted(run["train_time_s"] for run in mine)
        each = ", ".join(f"{value:.1f}" for value in returns)
        mean, median_s = sum(returns) / len(returns), seconds[len(seconds) // 2]
        lines.append(
            f"| {task} | {mine[0]['env_steps']:,} | {goal} | {each} "
            f"| {min(returns):.1f} | {mean:.1f} | {median_s:.0f} |"
        )
    return lines


def parser() -> argparse.ArgumentParser:
    settings = ["--model.env.num_envs", "4", "--model.total_env_steps", "256"]
    settings += ["--model.eval_episodes", "2"]
    smallest = {"tasks": ["cartpole"], "seeds": 1, "settings": settings}
    parser = benchmark_parser(__doc__, smallest)
    parser.add_argument("--tasks", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.set_defaults(settings=[])
    return parser


def main() -> None:
    options = parser().parse_args()
    jobs = [(task, seed) for task in options.tasks for seed in range(options.seeds)]
    with (
        results(__file__, options, threads="one thread a run") as files,
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        runs = list(pool.map(partial(train, options=options, folder=Path(folder)), jobs))
        files.write(
            "Learning: mean return of 100 deterministic evaluation episodes after training",
            [
                *table(runs, options.tasks),
                "",
                "Steps are totals over all environments. The `.json` beside this has every run.",
            ],
        )
        files.path("", ".json").write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
