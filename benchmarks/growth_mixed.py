"""Does a policy decide differently for different networks, and is it better for it?

Trains ``configs/digits_mixed.yaml`` with several seeds, one thread each: as it is, blind
(``hide_training``: an open-loop policy, which cannot react), and with memory. Then they all play
the same fresh hosts, and so does everyone who was not trained: every fixed schedule of a grid, a
rule that reacts, whose thresholds are searched on other hosts, and an oracle that is told classes,
wrong labels and width of each host. The same is done on hosts of kinds that are in no training.
Writes ``results/growth_mixed.md`` and ``growth_mixed.png``. Runs stay in a folder of the commit
below ``--runs``, beside the outcomes of rules and schedules: called again, what is finished is not
repeated, and other runs resume.

    python benchmarks/growth_mixed.py --jobs 2
    python benchmarks/growth_mixed.py --seeds 0 1 --hosts 100 -- --model.total_env_steps 61_440
"""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from conditions import ROOT, Results, results
from growth import growth_parser, measure_in_folder, options_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from esper_lightning import PPO
from esper_lightning.comparison.statistics import Estimate, estimate_crossed, mean
from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.envs.morphogenesis.baselines import (
    Baseline,
    never_grow,
    plateau,
    random_legal,
    schedule,
)
from esper_lightning.envs.morphogenesis.lifecycle import LIVE, is_in
from esper_lightning.envs.morphogenesis.population import DIGITS_HELD_OUT, Kinds
from esper_lightning.growth.kinds import Outcome, best_for_kind, kind_names, kind_numbers
from esper_lightning.growth.play import Played, fresh_hosts, play_baselines, play_trained
from esper_lightning.training.checkpoint.states import checkpoint_at

VARIANTS = {
    "PPO": ("ppo", ""),
    "PPO, blind": ("blind", "--model.env.hide_training true"),
    "PPO with memory": ("memory", "--model.policy Recurrent"),
}
"""Folder and settings of each trained policy."""
SLOTS = ((0,), (1,), (2,), (1, 2), (0, 1, 2))
STARTS = (2, 4, 6)
RAMPS = (0, 2)
IN_TABLES = ("PPO", "PPO, blind")
"""Trained policies that the tables compare."""
CPU = torch.device("cpu")
Scores = NDArray[np.float64]


def train(options: argparse.Namespace, folder: Path) -> dict[str, list[Path]]:
    """Train every variant with each seed; returns the run directories by name."""
    command = [sys.executable, str(ROOT / "scripts" / "ab.py")]
    command += ["--config", str(ROOT / "configs" / "digits_mixed.yaml")]
    command += ["--seeds", *map(str, options.seeds), "--jobs", str(options.jobs)]
    command += ["--output", str(folder)]
    found: dict[str, list[Path]] = {}
    for name in options.policies:  # one after another: esper compare compares no environments
        within, settings = VARIANTS[name]
        words = ["--variant", f"{within}: {settings}", "--", *options.settings, *options.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *words], check=True, env=environment)
        found[name] = [folder / within / f"seed{seed}" for seed in options.seeds]
    return found


def schedules(spec: Morphogenesis, *, few: bool) -> dict[str, Baseline]:
    """Every fixed schedule of the grid, by its name."""
    grid = itertools.product(spec.blueprints, SLOTS, STARTS, RAMPS)
    found: dict[str, Baseline] = {"never grow": never_grow}
    for blueprint, slots, start, ramp in grid:
        where = ", ".join(map(str, slots))
        name = f"`{blueprint}` in {where} from {start}, over {spec.ramp_epochs[ramp]}"
        found[name] = schedule(blueprint=blueprint, slots=slots, start=start, ramp=ramp)
    return dict(itertools.islice(found.items(), 3)) if few else found


def rules(*, few: bool) -> dict[str, Baseline]:
    """Rules that react, by their names."""
    grid = itertools.product(
        ("low_rank", "conv_light", "conv_heavy"),
        ((1,), (1, 2)),
        (2, 3),
        (0.03, 1.0),
        (0.4, 0.55, 0.7, 0.85, 1.1),
    )
    found: dict[str, Baseline] = {}
    for blueprint, slots, window, rise, below in grid:
        where = ", ".join(map(str, slots))
        name = f"`{blueprint}` in {where} where accuracy is below {below} "
        name += f"and rose by less than {rise} in {window} epochs"
        found[name] = plateau(
            blueprint=blueprint,
            slots=slots,
            window=window,
            rise=rise,
            below=below,
            training_epochs=1,
            judges=False,
        )
    return dict(itertools.islice(found.items(), 2)) if few else found


def play_some(
    spec: Morphogenesis, hosts: int, seed: int, some: Mapping[str, Baseline]
) -> dict[str, Outcome]:
    """Play rules on the same fresh hosts, in this process."""
    torch.set_num_threads(1)
    with fresh_hosts(spec, hosts=hosts, device=CPU, seed=seed) as env:
        return {name: Outcome.of([one]) for name, one in play_baselines(env, some)}


def play_rules(
    spec: Morphogenesis, seed: int, some: Mapping[str, Baseline], options: argparse.Namespace
) -> dict[str, Outcome]:
    """Play rules on the same fresh hosts, in as many processes as there may be jobs."""
    names = [*some]
    parts = [{name: some[name] for name in names[k :: options.jobs]} for k in range(options.jobs)]
    work = partial(play_some, spec, options.hosts, seed)
    if options.jobs == 1:
        found = work(some)
    else:
        with ProcessPoolExecutor(options.jobs) as pool:
            found = {name: one for part in pool.map(work, parts) for name, one in part.items()}
    return {name: found[name] for name in names}


def kept(path: Path, play: Callable[[], dict[str, Outcome]]) -> dict[str, Outcome]:
    """Outcomes from a file; where there is none, they are played, and stored for the next call."""
    if not path.exists():
        arrays = {name: [*map(torch.from_numpy, one)] for name, one in play().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(arrays, path)
    stored = torch.load(path, weights_only=True)
    return {name: Outcome(*(row.numpy() for row in rows)) for name, rows in stored.items()}


class Test(NamedTuple):
    """Everyone on the same fresh hosts."""

    kinds: Kinds
    played: dict[str, Outcome]
    chosen: dict[str, str]  # what a name of ``played`` stands for
    plays: list[Played]  # of PPO


def test(
    models: Mapping[str, Sequence[PPO]],
    spec: Morphogenesis,
    rule: tuple[str, Baseline],
    options: argparse.Namespace,
    file: Path,
) -> Test:
    """Play policies, rules and schedules on the same fresh hosts; ``file`` keeps the schedules."""
    plays: dict[str, list[Played]] = {}
    for name, some in models.items():
        for model in some:
            own = replace(spec, hide_training=model.env.hide_training)
            seed = options.host_seed
            with fresh_hosts(own, hosts=options.hosts, device=CPU, seed=seed) as env:
                _, one = next(play_trained(model, env))
            plays.setdefault(name, []).append(one)
            print(f"{name}, seed {model.seed}: {one.episode_return.mean():.3f}", flush=True)
    kinds = plays["PPO"][0].kinds
    assert kinds is not None
    played = {name: Outcome.of(some) for name, some in plays.items()}
    others = {"the rule that reacts": rule[1], "random legal": random_legal}
    played |= play_rules(spec, options.host_seed, others, options)
    every = schedules(spec, few=options.smallest)
    grid = kept(file, lambda: play_rules(spec, options.host_seed, every, options))
    table = np.stack([one.episode_return[0] for one in grid.values()])  # [G, N]
    everything = Outcome(*(np.concatenate(fields) for fields in zip(*grid.values(), strict=True)))
    best = np.full(table.shape[1], table.mean(1).argmax())
    kind = kind_numbers(kinds)
    told, honest = best_for_kind(table, kind), best_for_kind(table, kind, without_itself=True)
    played |= {
        "never grow": grid["never grow"],
        "best fixed schedule": everything.choose(best),
        "best schedule of each kind": everything.choose(told),
        "the same, chosen on other hosts": everything.choose(honest),
    }
    chosen = {"best fixed schedule": [*grid][best[0]], "the rule that reacts": rule[0]}
    chosen |= {
        f"best schedule of {label}": [*grid][told[kind == number][0]]
        for number, label in enumerate(kind_names(kinds))
        if (kind == number).any()
    }
    return Test(kinds, played, chosen, plays["PPO"])


def tuned_rule(
    spec: Morphogenesis, options: argparse.Namespace, file: Path
) -> tuple[str, Baseline]:
    """The rule with the highest mean return on hosts that nobody is tested on."""
    some = rules(few=options.smallest)
    found = kept(file, lambda: play_rules(spec, options.host_seed + 1, some, options))
    name = max(found, key=lambda name: found[name].episode_return.mean())
    return name, some[name]


def estimated(score: Scores) -> Estimate:
    """Mean with its interval; hosts of a population differ, so no quarter of them is dropped."""
    return estimate_crossed(score, mean)


def table(found: Test) -> list[str]:
    """Lines of the table of a test."""
    head = ["policy", "return", "95 %", "PPO's less that, host by host", "test accuracy, %"]
    head += ["grown parameters", "hosts that grow, %"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    ppo = found.played["PPO"].episode_return
    for name, one in found.played.items():
        value, low, high = estimated(one.episode_return)
        lead = "" if name == "PPO" else words(estimated(ppo - one.episode_return))
        cells = [name, f"{value:.3f}", f"{low:.3f} to {high:.3f}", lead]
        cells += [f"{100 * one.test_accuracy.mean():.1f}", f"{one.grown_parameters.mean():,.0f}"]
        lines.append(f"| {' | '.join([*cells, f'{100 * one.grows.mean():.0f}'])} |")
    return [*lines, ""]


def words(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def verdicts(found: Test) -> list[str]:
    """Sentences on the intervals of PPO, and on the share of the gap to the oracle it closes."""
    ppo, fixed = (found.played[name].episode_return for name in ("PPO", "best fixed schedule"))
    lines: list[str] = []
    for name in ("best fixed schedule", "PPO, blind"):
        other = found.played[name].episode_return
        ahead, one, two = estimated(ppo - other), estimated(ppo), estimated(other)
        where = "above" if ahead.low > 0 else "below" if ahead.high < 0 else "on both sides of"
        apart = "do not overlap" if one.low > two.high else "overlap"
        lines.append(
            f"- Host by host, PPO's return less that of {name}, {words(ahead)}, lies {where} 0. "
            f"The intervals of the two returns {apart}."
        )
    for name in ("best schedule of each kind", "the same, chosen on other hosts"):
        gap = (found.played[name].episode_return - fixed).mean()
        lead = (ppo - fixed).mean()
        closed = f"{100 * lead / gap:.0f} %" if min(gap, lead) > 0 else "nothing"
        lines.append(
            f"- From the best fixed schedule to {name} it is {gap:.3f}; PPO closes {closed}."
        )
    lines += [f"- {name}: {what}." for name, what in found.chosen.items()]
    return [*lines, ""]


def by_kind(found: Test) -> list[str]:
    """Lines of the table of kinds: returns, and what PPO does."""
    head = ["kind", "hosts", "never grow", "best fixed schedule", "PPO, blind", "PPO"]
    head += ["best schedule of each kind", "PPO: hosts that grow, %", "PPO: grown parameters"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    kind = kind_numbers(found.kinds)
    for number, name in enumerate(kind_names(found.kinds)):
        mine = kind == number
        if not mine.any():
            continue
        row = [name, str(mine.sum())]
        row += [f"{found.played[who].episode_return[:, mine].mean():.2f}" for who in head[2:7]]
        ppo = found.played["PPO"]
        row += [f"{100 * ppo.grows[:, mine].mean():.0f}"]
        row += [f"{ppo.grown_parameters[:, mine].mean():,.0f}"]
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, ""]


def picture(found: Test, path: Path) -> None:
    """Returns with their intervals, what PPO grows in each kind, and its lead in each kind."""
    figure = Figure(figsize=(12, 4.6), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[4, 4, 4])
    for k, (name, one) in enumerate(found.played.items()):
        value, low, high = estimated(one.episode_return)
        colour = "#0072B2" if name.startswith("PPO") else "#666666"
        left.plot([low, high], [k, k], "-", color=colour, lw=3, alpha=0.6)
        left.plot(value, k, "o", color=colour, ms=7, mec="white")
    left.set_yticks(range(len(found.played)), list(found.played))
    left.set_ylim(len(found.played) - 0.5, -0.5)
    left.set_xlabel("return on fresh hosts,\nmean and 95 %")
    _growth(middle, found)
    _leads(right, found)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _growth(axes: Axes, found: Test) -> None:
    """Seeds in a host over the epochs, by number of classes and share of wrong labels."""
    seeds = [is_in(one.course.stage, LIVE).sum(2).double() for one in found.plays]
    live = torch.stack(seeds).mean(0)  # [T, N]
    classes, noise = found.kinds.classes, found.kinds.label_noise
    for number, share in sorted(set(zip(classes.tolist(), noise.tolist(), strict=True))):
        mine = (classes == number) & (noise == share)
        label = f"{number} classes, {100 * share:.0f} % wrong labels"
        axes.plot(range(1, len(live) + 1), live[:, mine].mean(1), label=label, lw=2)
    axes.set_xlabel("epoch of the host")
    axes.set_ylabel("modules that PPO has grown in a host")
    axes.legend(fontsize=7, loc="center right")


def _leads(axes: Axes, found: Test) -> None:
    """PPO's return less that of the best fixed schedule, by kind."""
    kind, names = kind_numbers(found.kinds), kind_names(found.kinds)
    fixed = found.played["best fixed schedule"].episode_return
    for number in range(len(names)):
        lead = (found.played["PPO"].episode_return - fixed)[:, kind == number]
        if lead.shape[1] > 1:
            value, low, high = estimated(lead)
            axes.plot([low, high], [number, number], "-", color="#0072B2", lw=3, alpha=0.6)
            axes.plot(value, number, "o", color="#0072B2", ms=7, mec="white")
    axes.set_yticks(range(len(names)), [name.replace(" labels", "") for name in names], fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(0, color="0.5", lw=0.8)
    axes.set_xlabel("PPO's lead over\nthe best fixed schedule")


def each_seed(models: Mapping[str, Sequence[PPO]], found: Test) -> list[str]:
    lines = [
        "| policy | seed | best after env steps | mean return |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, some in models.items():
        for model, returns in zip(some, found.played[name].episode_return, strict=True):
            lines.append(f"| {name} | {model.seed} | {model.env_steps:,} | {returns.mean():.3f} |")
    return [*lines, ""]


def measure(options: argparse.Namespace, files: Results, folder: Path) -> None:
    """Train, play, and write tables and figure."""
    runs = train(options, folder)
    torch.set_num_threads(1)
    models = {
        name: [PPO.load_from_checkpoint(checkpoint_at(run)) for run in some]
        for name, some in runs.items()
    }
    spec = models["PPO"][0].env
    assert isinstance(spec, Morphogenesis)
    hosts = f"{options.hosts}_hosts_{options.host_seed}.pt"
    rule = tuned_rule(spec, options, folder / f"rules_{hosts}")
    seen = test(models, spec, rule, options, folder / f"schedules_{hosts}")
    unseen = replace(spec, population=DIGITS_HELD_OUT)
    strange = test(models, unseen, rule, options, folder / f"held_out_{hosts}")
    curves = files.path(suffix=".png")
    steps = f"{models['PPO'][0].settings.total_env_steps:,}"
    grid, rules_tried = schedules(spec, few=options.smallest), rules(few=options.smallest)
    text = [
        f"`configs/digits_mixed.yaml`, {len(options.seeds)} training seeds of {steps} env steps;",
        "of each, the best checkpoint by its evaluations during training. Blind policies",
        "(`hide_training`) see nothing that is measured in the training of a host. Then everyone",
        f"plays the same {options.hosts} hosts, which neither training nor that choice has seen.",
        "Means, because hosts differ; intervals draw training seeds and hosts anew (Owen 2007, the",
        f"pigeonhole bootstrap). The best fixed schedule is chosen from {len(grid)} in hindsight,",
        "on the very hosts of the test. So is the best schedule of each kind, by someone who is",
        "told classes, wrong labels and width, but not learning rate nor number of images: it is",
        "too high by what chance adds to a maximum. Chosen on the other hosts of the kind, it is",
        f"too low. The rule that reacts is the best of {len(rules_tried)} on {options.hosts}",
        "hosts that nobody is tested on. Settings were chosen for PPO without memory that sees.\n",
        "## Fresh hosts\n",
        *table(seen),
        *verdicts(seen),
        f"![Returns, growth by kind, lead by kind]({curves.name})\n",
        "## By kind\n",
        *by_kind(seen),
        "## Kinds that are in no training\n",
        *table(strange),
        *verdicts(strange),
        *by_kind(strange),
        "## Training seeds\n",
        *each_seed(models, seen),
    ]
    picture(seen, curves)
    files.write("Growing networks that differ in what they need", text)


def parser() -> argparse.ArgumentParser:
    settings = ["--model.env.num_envs", "4", "--model.env.epochs", "6"]
    settings += ["--model.env.train_batches", "1", "--model.total_env_steps", "96"]
    settings += ["--model.eval_episodes", "2", "--model.ppo.minibatches", "2"]
    settings += ["--model.env.validation_size", "100"]
    smallest = {"seeds": [0], "hosts": 12, "jobs": 1, "settings": settings}
    smallest["policies"] = ["PPO", "PPO, blind"]
    parser = growth_parser(__doc__, smallest, hosts=400, runs="growth_mixed")
    parser.add_argument(
        "--policies",
        nargs="+",
        default=[*VARIANTS],
        choices=[*VARIANTS],
        help=f"{IN_TABLES} at least",
    )
    parser.set_defaults(host_seed=8209)  # nobody chose a setting by these hosts (decision 29)
    return parser


def options_with_policies(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of this call; the process ends where a policy of the tables is not trained."""
    options = options_of(parser)
    if not {*IN_TABLES} <= {*options.policies}:
        parser.error(f"--policies must name {IN_TABLES} at least, got {options.policies}")
    return options


if __name__ == "__main__":
    options = options_with_policies(parser())
    with results(__file__, options, threads="one thread a run") as files:
        measure_in_folder(options, files, measure)
