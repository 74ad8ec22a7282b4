"""CartPole on one process and on two ranks: wall clock, throughput, and whether it is solved.

Every contender in turn, several rounds, a process of its own each, one thread a rank.
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

from conditions import conditions

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = {  # ranks, environments of each
    "1 process x 64": (1, 64),
    "2 ranks x 64": (2, 64),
}


def train(ranks: int, num_envs: int, directory: Path) -> dict[str, float]:
    """One run of the config; throughput is that of its rows, without start-up and evaluations."""
    budget = ranks * 500_000
    words = [
        str(Path(sys.executable).with_name("esper")),
        *("fit", "--config", str(ROOT / "configs" / "cartpole.yaml")),
        *("--model.env.num_envs", str(num_envs), "--model.total_env_steps", str(budget)),
        *("--trainer.devices", str(ranks), "--trainer.strategy", "ddp" if ranks > 1 else "auto"),
        *("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
        *("--run_dir", str(directory)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    subprocess.run(words, check=True, env=environment, capture_output=True)
    wall_s = time.perf_counter() - began
    rows = [json.loads(row) for row in (directory / "rank0/history.jsonl").open()]
    evaluation = json.loads((directory / "rank0/evaluations.jsonl").read_text().splitlines()[-1])
    rate = statistics.median(row["env_steps_per_s"] for row in rows)
    return {
        "wall_s": wall_s,
        "env_steps": rows[-1]["env_steps"],
        "rate": rate,
        "return": evaluation["eval/episode_return_mean"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=ROOT / "benchmarks/results/ranks.md", type=Path)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for name, (ranks, num_envs) in CONTENDERS.items():
                directory = Path(folder, f"{ranks}x{num_envs}-{number}")
                found[name].append(train(ranks, num_envs, directory))
                print(name, found[name][-1], flush=True)
    lines = [
        "# CartPole on one process and on two gloo ranks\n",
        conditions(f"python benchmarks/ranks.py --rounds {arguments.rounds}", "one thread a rank"),
        f"- load averages at the end: {', '.join(f'{load:.1f}' for load in os.getloadavg())}",
        "",
        "Medians over rounds, every contender in turn. Env-steps/s are those of the median "
        "iteration; wall clock is that of the whole command.",
        "",
        "| contender | env steps | wall clock (s) | env-steps/s | of each rank | last evaluation |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (ranks, _) in CONTENDERS.items():
        of = {key: statistics.median(run[key] for run in found[name]) for key in found[name][0]}
        lines.append(
            f"| {name} | {of['env_steps']:,.0f} | {of['wall_s']:.1f} | {of['rate']:,.0f} "
            f"| {of['rate'] / ranks:,.0f} | {of['return']:.1f} |"
        )
    lines += ["", "Ratio of two ranks to one process, of each round, in env-steps/s:", ""]
    for num_envs in {num_envs for _, num_envs in CONTENDERS.values()}:
        pairs = zip(found[f"2 ranks x {num_envs}"], found[f"1 process x {num_envs}"], strict=True)
        ratios = ", ".join(f"{two['rate'] / one['rate']:.2f}" for two, one in pairs)
        lines.append(f"- {num_envs} environments on each: {ratios}")
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
