"""Does PPO grow networks better than rules do?

Trains ``configs/morphogenesis.yaml`` with several seeds, one thread each; then lets the best
checkpoint of each, by its evaluations, and four baselines play the same fresh hosts, and writes a
table and figures: ``results/growth.md``, ``growth.png`` and ``growth_episode.png``. One of the
baselines, to grow at the start, is tried with every blueprint. Runs stay in a folder of the commit
below ``--runs``: called again, those that are finished are not repeated, and others resume.

    python benchmarks/growth.py --jobs 2
    python benchmarks/growth.py --seeds 0 1 --hosts 4 -- --model.total_env_steps 5_120
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conditions import ROOT, Results, benchmark_parser, results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from esper_lightning import PPO
from esper_lightning.comparison.runs import read_run
from esper_lightning.comparison.statistics import Estimate, estimate_crossed
from esper_lightning.envs.morphogenesis import MorphogenesisEnv
from esper_lightning.envs.morphogenesis.baselines import grow_at_start
from esper_lightning.growth.figure import draw
from esper_lightning.growth.play import Played, fresh_hosts, play_baselines, play_trained
from esper_lightning.growth.table import table
from esper_lightning.training.checkpoint.states import checkpoint_at

COLOURS = ("#0072B2", "#56B4E9", "#666666", "#009E73", "#CC79A7", "#D55E00")


def train(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Train a policy with each seed; returns the run directories."""
    command = [sys.executable, str(ROOT / "scripts" / "ab.py")]
    command += ["--config", str(ROOT / "configs" / "morphogenesis.yaml")]
    command += ["--seeds", *map(str, options.seeds), "--jobs", str(options.jobs)]
    command += ["--variant", "ppo", "--output", str(folder)]
    command += ["--", *options.settings, *options.arguments]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [folder / "ppo" / f"seed{seed}" for seed in options.seeds]


def play(models: list[PPO], env: MorphogenesisEnv) -> dict[str, list[Played]]:
    """Play every policy and baseline on the same hosts; returns the episodes by name."""
    played: dict[str, list[Played]] = {}
    for model in models:
        for name, one in play_trained(model, env):
            played.setdefault(name, []).append(one)
            print(f"seed {model.seed}, {name}: {one.episode_return.mean():.3f}", flush=True)
    played |= {name: [one] for name, one in play_baselines(env)}
    return played


def returns(plays: list[Played]) -> NDArray[np.float64]:
    """Returns ``[R, N]`` by training seed and host."""
    return torch.stack([one.episode_return for one in plays]).double().numpy()


def estimates(played: dict[str, list[Played]]) -> dict[str, Estimate]:
    """Estimates of the mean return, by name of the policy."""
    return {name: estimate_crossed(returns(plays)) for name, plays in played.items()}


def verdicts(played: dict[str, list[Played]]) -> list[str]:
    """Sentences on whether intervals overlap, and on PPO's lead on the same hosts."""
    found = estimates(played)
    ppo, lines = found["PPO"], list[str]()
    for name, other in found.items():
        if name.startswith("PPO"):
            continue
        where = "overlaps that of"
        if ppo.low > other.high:
            where = "lies above that of"
        elif ppo.high < other.low:
            where = "lies below that of"
        ahead = estimate_crossed(returns(played["PPO"]) - returns(played[name]))
        lines.append(
            f"- PPO's interval of return, {ppo.low:.3f} to {ppo.high:.3f}, {where} {name}, "
            f"{other.low:.3f} to {other.high:.3f}. Host by host, PPO's return less that is "
            f"{ahead.value:.3f} ({ahead.low:.3f} to {ahead.high:.3f})."
        )
    return lines


def each_blueprint(env: MorphogenesisEnv) -> dict[str, list[Played]]:
    """Episodes of the baseline that grows at the start, for each blueprint."""
    rules = {name: partial(grow_at_start, blueprint=name) for name in env.blueprints}
    return {name: [one] for name, one in play_baselines(env, rules)}


def each_seed(models: list[PPO], played: dict[str, list[Played]]) -> list[str]:
    lines = ["| seed | best after env steps | mean return | mean test accuracy, % |"]
    lines += ["| ---: | ---: | ---: | ---: |"]
    for model, one in zip(models, played["PPO"], strict=True):
        accuracy = 100 * one.test_accuracy.mean()
        mean = one.episode_return.mean()
        lines.append(f"| {model.seed} | {model.env_steps:,} | {mean:.3f} | {accuracy:.1f} |")
    return lines


def picture(runs: list[Path], found: dict[str, Estimate], path: Path) -> None:
    figure = Figure(figsize=(11, 5.0), dpi=130, layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=[3, 2])
    colour = dict(zip(found, COLOURS, strict=True))
    for k, run in enumerate(map(read_run, runs)):
        for score, style, name in (
            ("rollout", "-", "PPO, actions drawn"),
            ("evaluation", "o", "PPO"),
        ):
            shape = {"lw": 0.9, "ms": 4, "color": colour[name]}
            label = f"{name}, each seed ({score})" if k == 0 else None
            points = run.points[score]
            if points:
                curves.plot(*zip(*points, strict=True), style, label=label, **shape)
    for name, estimate in found.items():
        if not name.startswith("PPO"):
            curves.axhline(estimate.value, color=colour[name], ls="--", lw=1.2, label=name)
    curves.set_xlabel("environment steps")
    curves.set_ylabel("return")
    curves.set_title("Training; baselines on fresh hosts", fontsize=10)
    curves.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    intervals(ends, found, colour)
    for axes in (curves, ends):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def intervals(axes: Axes, found: dict[str, Estimate], colour: dict[str, str]) -> None:
    for k, (name, (value, low, high)) in enumerate(found.items()):
        axes.plot([low, high], [k, k], "-", color=colour[name], lw=3, alpha=0.6)
        axes.plot(value, k, "o", color=colour[name], ms=7, mec="white")
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("return on fresh hosts")
    axes.set_title("Interquartile mean, 95 % intervals", fontsize=10)


def measure(options: argparse.Namespace, files: Results, folder: Path) -> None:
    """Train, play, and write table and figures."""
    runs = train(options, folder)
    torch.set_num_threads(1)
    models = [PPO.load_from_checkpoint(checkpoint_at(run)) for run in runs]
    cpu = torch.device("cpu")
    hosts = fresh_hosts(models[0].env, hosts=options.hosts, device=cpu, seed=options.host_seed)
    with hosts as env:
        played, others = play(models, env), each_blueprint(env)
        by_blueprint = table(others, host_parameters=env.host_parameters)
        section = table(played, host_parameters=env.host_parameters).markdown()
    steps = f"{models[0].settings.total_env_steps:,}"
    curves, episode = files.path(suffix=".png"), files.path("episode", ".png")
    text = [
        f"`configs/morphogenesis.yaml`, {len(runs)} training seeds of {steps} env steps.",
        "Of each, the best checkpoint by its evaluations during training. Then everyone plays the",
        "same hosts, which neither training nor that choice has seen. Test accuracy is of a split",
        "that no reward and no observation comes from. Intervals draw training seeds and hosts",
        "anew (Owen 2007, the pigeonhole bootstrap); baselines have no training seeds.\n",
        *section,
        *verdicts(played),
        "",
        *replace(by_blueprint, title="Grow at the start, with each blueprint").markdown(),
        "The baseline above grows `conv_light`. PPO learnt what to grow; these rules were told.\n",
        *verdicts({"PPO": played["PPO"], **others}),
        f"\n![Learning curves and intervals]({curves.name})\n",
        "## Training seeds\n",
        *each_seed(models, played),
        f"\n## An episode\n\n![An episode]({episode.name})\n",
    ]
    files.write("Growing networks: PPO against four baselines", text)
    picture(runs, estimates(played), curves)
    one = played["PPO"][0]
    median = int(one.episode_return.argsort()[options.hosts // 2])
    title = f"PPO, seed {options.seeds[0]}, median of {options.hosts} hosts"
    draw(one, median, models[0].env, episode, title=title)


def growth_parser(
    document: str | None, smallest: dict[str, Any], *, hosts: int, runs: str
) -> argparse.ArgumentParser:
    """The options of a benchmark that trains policies and lets them play fresh hosts."""
    parser = benchmark_parser(document, smallest)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--hosts", type=int, default=hosts, help="fresh ones, the same for all")
    parser.add_argument("--host-seed", type=int, default=2026)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / runs, metavar="DIR")
    parser.add_argument("arguments", nargs="*", help="of esper fit, after --")
    parser.set_defaults(settings=[])
    return parser


def run(
    file: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Results, Path], None],
) -> None:
    """Train and measure in a folder of the commit: runs of another are not results of this one."""
    options = parser.parse_args()
    if options.hosts < 2:
        parser.error(f"--hosts must be at least 2, got {options.hosts}")
    with results(file, options, threads="one thread a run") as files:
        if options.smallest:
            with tempfile.TemporaryDirectory() as folder:
                measure(options, files, Path(folder))
        else:
            measure(options, files, options.runs / files.commit)


def parser() -> argparse.ArgumentParser:
    settings = ["--model.env.num_envs", "2", "--model.env.epochs", "10"]
    settings += ["--model.env.train_batches", "1", "--model.total_env_steps", "40"]
    settings += ["--model.eval_episodes", "2", "--model.ppo.minibatches", "2"]
    smallest = {"seeds": [0], "hosts": 2, "settings": settings}
    return growth_parser(__doc__, smallest, hosts=200, runs="growth")


if __name__ == "__main__":
    run(__file__, parser(), measure)
