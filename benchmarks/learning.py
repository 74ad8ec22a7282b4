"""Learning on every classic task.

5 seeds, the configs as they are, 100 deterministic evaluation episodes at the end.

Runs ``esper fit`` as a user would, one thread each, as many at a time as there are cores, and
writes a table and the raw figures to ``benchmarks/results/``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conditions import conditions

ROOT = Path(__file__).resolve().parent.parent
GOALS = {"cartpole": 475.0, "acrobot": -100.0, "pendulum": -250.0, "mountain_car": None}


def train(task: str, seed: int, mode: str, workdir: Path) -> dict[str, float]:
    """One run; returns its last evaluation and its last history row."""
    run = workdir / f"{task}-{seed}"
    command = [
        *(
            str(Path(sys.executable).with_name("esper")),
            "fit",
            "--config",
            str(ROOT / "configs" / f"{task}.yaml"),
        ),
        *(
            "--model.seed",
            str(seed),
            "--model.compile",
            mode,
            "--run_dir",
            str(run),
        ),
        *("--trainer.enable_progress_bar", "false"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=workdir, env=environment, capture_output=True)
    evaluation = json.loads((run / "rank0" / "evaluations.jsonl").read_text().splitlines()[-1])
    row = json.loads((run / "rank0" / "history.jsonl").read_text().splitlines()[-1])
    assert evaluation["iteration"] == row["iteration"]
    print(f"{task} seed {seed}: {evaluation['eval/episode_return_mean']:.1f}", flush=True)
    return {
        "task": task,
        "seed": seed,
        "env_steps": row["env_steps"],
        "train_time_s": round(row["time_s"], 1),
        "return_mean": evaluation["eval/episode_return_mean"],
        "return_std": evaluation["eval/episode_return_std"],
        "episodes": evaluation["eval/episodes"],
    }


def table(results: list[dict[str, float]], tasks: list[str]) -> str:
    lines = [
        "| task | env steps | goal | mean return of each seed | worst | mean | training, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in tasks:
        mine = [result for result in results if result["task"] == task]
        returns = [result["return_mean"] for result in mine]
        goal = "none" if GOALS[task] is None else f">= {GOALS[task]:g}"
        seconds = sorted(result["train_time_s"] for result in mine)
        each = ", ".join(f"{value:.1f}" for value in returns)
        mean, median_s = sum(returns) / len(returns), seconds[len(seconds) // 2]
        lines.append(
            f"| {task} | {mine[0]['env_steps']:,} | {goal} | {each} "
            f"| {min(returns):.1f} | {mean:.1f} | {median_s:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--compile", default="off", choices=("off", "default", "max"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    jobs = [(task, seed) for task in arguments.tasks for seed in range(arguments.seeds)]
    with tempfile.TemporaryDirectory() as workdir, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: train(*job, arguments.compile, Path(workdir)), jobs))
    if arguments.output is None:
        name = "learning" if arguments.compile == "off" else f"learning_compile_{arguments.compile}"
        arguments.output = ROOT / "benchmarks" / "results" / f"{name}.md"
    command = " ".join(["python", "benchmarks/learning.py", *sys.argv[1:]])
    text = (
        "# Learning: mean return of 100 deterministic evaluation episodes after training\n\n"
        f"{conditions(command)}\n\n{table(results, arguments.tasks)}\n\n"
        "Steps are totals over all environments. Raw figures: the `.json` beside this file.\n"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    arguments.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
