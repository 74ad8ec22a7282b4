"""Learning in simulators of others: 5 seeds of each config of the zoo, beside published scores.

Each run is ``esper fit --config NAME`` with a seed, on one thread, as many at a time as there are
cores; it ends with deterministic evaluation episodes. ``--peer`` trains Stable-Baselines3 with the
same settings and seeds after it, on the same cores. Each task has results files of its own,
``results/zoo_<task>.md`` and ``.json``, so that a task can be measured again by itself. Tasks of
gymnax and mjlab run in environments for Python of their own, which ``worlds.py`` makes.
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
from statistics import mean, median
from typing import Any

from conditions import ROOT, benchmark_parser, results
from learning import finish, train
from worlds import HERE, interpreter

BENCHMARKS = ROOT / "benchmarks"
OURS, PEER = "esper_lightning", "Stable-Baselines3"
CLEANRL = "CleanRL, 1 M env steps, v4 of the task"
ZOO = "rl-baselines3-zoo, one run"
# Mean returns that others have published, and what differs there.
PUBLISHED = {
    "lunarlander": f"242 ({ZOO}, v2 of the task)",
    "halfcheetah": f"1,443 ({CLEANRL}); 5,819 ({ZOO}, tuned settings, v3)",
    "hopper": f"2,383 ({CLEANRL}); 2,410 ({ZOO}, v3)",
    "walker2d": f"2,288 ({CLEANRL}); 3,479 ({ZOO}, v3)",
    "swimmer": f"282 ({ZOO}, v3)",
    "doorkey": "none; about 0.96 is a shortest way",
    "breakout": "none after so few steps",
    "space_invaders": "none after so few steps",
    "navigation": "none",
    "mjlab_cartpole": "none",
}
WORLDS = {"breakout": "jax", "space_invaders": "jax", "mjlab_cartpole": "mjlab"}  # others run here
WITH_PEER = ("lunarlander", "halfcheetah", "hopper")


def train_peer(job: tuple[str, int], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one run with Stable-Baselines3 in a process of its own."""
    task, seed = job
    sizes = [str(options.peer_env_steps), str(options.peer_episodes)]
    command = [sys.executable, "-c", "import zoo_peer; zoo_peer.run()", task, str(seed), *sizes]
    path = folder / f"{task}-{seed}.json"
    with path.open("w") as printed:
        cpu_s = finish(command, stdout=printed, cwd=BENCHMARKS)
    run = json.loads(path.read_text().splitlines()[-1])
    print(f"{task} seed {seed}, {PEER}: {run['return_mean']:.1f}", flush=True)
    return {"task": task, "seed": seed, "cpu_s": round(cpu_s, 1), **run}


def words_about(task: str, python: str) -> list[str]:
    """Lines below a table: what its columns mean, what others reach, and whose packages ran."""
    world = WORLDS.get(task)
    lines = ["CPU seconds are those of the whole process, with imports and evaluations."]
    lines += ["", f"Published: {PUBLISHED[task]}."]
    if world is not None:
        program = f"import worlds; print(worlds.versions({world!r}))"
        said = subprocess.check_output([python, "-c", program], cwd=BENCHMARKS, text=True)
        lines += ["", f"In an environment for Python of its own: {said.strip()}."]
    return lines


def row(library: str, runs: list[dict[str, Any]]) -> str:
    returns = [run["return_mean"] for run in runs]
    digits = 2 if max(map(abs, returns)) < 10 else 1
    each = ", ".join(f"{value:.{digits}f}" for value in returns)
    average, worst = f"{mean(returns):.{digits}f}", f"{min(returns):.{digits}f}"
    wall_s, cpu_s = (median(run[name] for run in runs) for name in ("train_time_s", "cpu_s"))
    return f"| {library} | {each} | {worst} | {average} | {wall_s:.0f} | {cpu_s:.0f} |"


def parser() -> argparse.ArgumentParser:
    settings = ["--model.env.num_envs", "2", "--model.total_env_steps", "512"]
    settings += ["--model.ppo.rollout_steps", "256", "--model.ppo.minibatches", "2"]
    settings += ["--model.eval_episodes", "2"]
    smallest = {"tasks": ["lunarlander"], "seeds": 1, "settings": settings}
    smallest |= {"peer": True, "peer_env_steps": 512, "peer_episodes": 2}
    parser = benchmark_parser(__doc__, smallest)
    parser.add_argument("--tasks", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help=f"train {PEER} too, where it can")
    parser.set_defaults(settings=[], peer_env_steps=1_000_000, peer_episodes=100)
    return parser


def main() -> None:
    options = parser().parse_args()
    threads = f"one thread a run, {os.cpu_count()} runs at a time"
    packages = ("gymnasium", "mujoco", "minigrid", "vmas", "stable-baselines3")
    with (
        results(__file__, options, threads=threads, packages=packages) as files,
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for task in options.tasks:
            jobs = [(task, seed) for seed in range(options.seeds)]
            given: dict[str, Any] = {"options": options, "folder": Path(folder)}
            python = str(interpreter(WORLDS.get(task, HERE)))
            ours = pool.map(partial(train, python=python, **given), jobs)
            peer = options.peer and task in WITH_PEER
            theirs = pool.map(partial(train_peer, **given), jobs if peer else [])
            runs = {OURS: list(ours), PEER: list(theirs)}
            steps, episodes = runs[OURS][0]["env_steps"], runs[OURS][0]["episodes"]
            files.write(
                f"{task}: mean return of {episodes:.0f} deterministic episodes "
                f"after {steps:,} env steps",
                [
                    "| library | mean return of each seed | worst | mean | training, s | CPU, s |",
                    "| --- | --- | --- | --- | --- | --- |",
                    *(row(library, mine) for library, mine in runs.items() if mine),
                    "",
                    *words_about(task, python),
                ],
                part=task,
            )
            files.path(task, ".json").write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
