"""Env-steps/s of growing networks, against a plain loop over modules and optimizers.

The benchmark has one process and one thread. Hosts in native code, hosts by operations of torch and
the loop take turns within a round, and the seconds are processor time of the process, because other
work shares the machine. The loop is the reference of the tests: one ``nn.Module`` and its
optimizers per host. Its time is linear in the number of hosts, and therefore it runs at most 4 of
them. All are measured in the middle of an episode, where seeds live: before that, hosts follow the
same actions but train on almost no data. Writes ``results/morphogenesis.md``.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from conditions import benchmark_parser, results

from esper_lightning.envs.morphogenesis import Morphogenesis, MorphogenesisEnv
from esper_lightning.envs.morphogenesis.baselines import never_grow, random_legal
from esper_lightning.envs.morphogenesis.lifecycle import Op, Stage
from tests.envs.morphogenesis.reference import LoneHost

LOOPED = 4  # hosts of the loop
GOALS = {"random legal": 12, "seeds kept alive": 4.4}


def keep_alive(env: MorphogenesisEnv) -> torch.Tensor:
    """Actions that fill slots in turn and blend every seed, but never fossilize or prune one."""
    legal, count = env.legal(), env.num_envs
    op = torch.zeros(count, dtype=torch.int64)
    for wanted in (Op.GERMINATE, Op.BLEND):
        op = op.masked_fill(legal[:, wanted].any(1), wanted)
    slot = legal[torch.arange(count), op].int().argmax(1)
    kind = (torch.arange(count) + env.hosts.vitals.step) % len(env.blueprints)
    return torch.stack((op, slot, kind, torch.zeros_like(op)), dim=1)


POLICIES = {
    "never grow": never_grow,
    "random legal": random_legal,
    "seeds kept alive": keep_alive,
}


class Loop:
    """A loop over plain modules that computes what the environment computes."""

    def __init__(self, spec: Morphogenesis, env: MorphogenesisEnv) -> None:
        self.spec = spec
        self.hosts = [
            LoneHost(spec, row) for row in env.hosts.weights.host[: min(LOOPED, env.num_envs)]
        ]
        self.generator = torch.Generator().manual_seed(0)
        training, validation, _ = spec.splits(torch.device("cpu"))
        self.image = training.image.permute(0, 3, 1, 2).contiguous()
        self.label = training.label
        self.validation = validation.image.permute(0, 3, 1, 2).contiguous(), validation.label

    def act(self, action: torch.Tensor) -> None:
        for host, (op, slot, blueprint, ramp) in zip(self.hosts, action.tolist(), strict=False):
            if host.life.act(Op(op).name, slot, blueprint, ramp):
                row = 0.05 * torch.randn(1 << 15, generator=self.generator)
                host.germinate(slot, row)
            host.life.tick()

    def skip(self, action: torch.Tensor) -> None:
        """The life cycle alone."""
        self.act(action)
        for host in self.hosts:
            host.life.measured()

    def step(self, action: torch.Tensor) -> None:
        spec = self.spec
        self.act(action)
        for host in self.hosts:
            index = torch.randint(
                len(self.label), (spec.train_batches, spec.batch_size), generator=self.generator
            )
            host.train([(self.image[rows], self.label[rows]) for rows in index])
            host.measure(*self.validation)


class Seconds(NamedTuple):
    """Processor seconds per env-step, and the mean number of live seeds."""

    native: float
    by_torch: float
    loop: float
    alive: float


def in_the_middle(
    spec: Morphogenesis, policy: Callable[[MorphogenesisEnv], torch.Tensor], epoch: int
) -> tuple[list[MorphogenesisEnv], Loop]:
    """Environments by native code and by torch, whose slots are in the policy's state at ``epoch``.

    Beside them, the loop.
    """
    cpu = torch.device("cpu")
    quick = replace(spec, train_batches=1, batch_size=2, validation_size=2).build(cpu, 0)
    quick.reset()
    envs = [replace(spec, compiled=compiled).build(cpu, 0) for compiled in (True, False)]
    loop = Loop(spec, envs[0])
    for _ in range(epoch):
        action = policy(quick)
        loop.skip(action)
        quick.step(action)
    for env in envs:
        env.load_state_dict(quick.state_dict())
    names = [[Stage(stage).name for stage in row] for row in envs[0].hosts.slots.stage.tolist()]
    assert names[: len(loop.hosts)] == [[s.stage for s in h.life.slots] for h in loop.hosts]
    return envs, loop


def measure(
    spec: Morphogenesis,
    policy: Callable[[MorphogenesisEnv], torch.Tensor],
    steps: int,
    *,
    epoch: int,
) -> Seconds:
    """Processor seconds per env-step."""
    envs, loop = in_the_middle(spec, policy, epoch)
    seconds, alive = [0.0, 0.0, 0.0], 0.0
    warm_up = 1
    for step in range(warm_up + steps):
        action = policy(envs[0])
        for number, run in enumerate((envs[0].step, envs[1].step, loop.step)):
            start = time.process_time()
            run(action)
            if step >= warm_up:
                seconds[number] += time.process_time() - start
        if step >= warm_up:
            stage = envs[0].hosts.slots.stage
            alive += ((stage != Stage.DORMANT) & (stage != Stage.EMBARGOED)).sum(1).float().mean()
    native, by_torch = (total / steps / spec.num_envs for total in seconds[:2])
    return Seconds(native, by_torch, seconds[2] / steps / len(loop.hosts), float(alive) / steps)


def table(preset: str, counts: list[int], options: argparse.Namespace) -> list[str]:
    lines = [
        "| actions | hosts | env-steps/s | by torch | loop "
        "| times torch | times as fast | of each round | seeds alive |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, policy in POLICIES.items():
        for count in counts:
            spec = getattr(Morphogenesis, preset)(num_envs=count, epochs=60)
            steps = max(options.steps if count <= 16 else 3, options.env_steps // count)
            rounds = options.rounds if count <= 16 else 1
            seen = [measure(spec, policy, steps, epoch=options.epoch) for _ in range(rounds)]
            native, by_torch, loop, alive = map(statistics.median, zip(*seen, strict=True))
            ratios = ", ".join(f"{one.loop / one.native:.2f}" for one in seen)
            lines.append(
                f"| {name} | {count} | {1 / native:.1f} | {1 / by_torch:.1f} | {1 / loop:.1f} "
                f"| {by_torch / native:.2f} | {loop / native:.2f} | {ratios} | {alive:.2f} |"
            )
            print(lines[-1], flush=True)
    return lines


def parser() -> argparse.ArgumentParser:
    sizes = {"env_steps": 1, "steps": 1, "rounds": 1, "epoch": 2}
    parser = benchmark_parser(__doc__, {"counts": [1], "digits_counts": [2], **sizes})
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--digits-counts", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--env-steps", type=int, default=48, help="of all hosts, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(
        steps=6, epoch=24
    )  # at least so many steps; epoch at which they begin, of 60
    return parser


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(1)
    titles = {
        "benchmark": "3x32x32 images, host of 6,418 parameters, 3 slots, 8 batches of 64 a step",
        "digits": "The digits preset",
    }
    goals = ", ".join(f"{goal} with {name}" for name, goal in GOALS.items())
    lines = [
        "- seconds are processor time of the process; times as fast as the loop",
        f"- goals up to 16 hosts, env-steps/s: {goals}; at least 5 times the loop on digits",
        "",
    ]
    with results(__file__, options, threads="one thread, shared with other work") as files:
        for preset, title in titles.items():
            counts = options.counts if preset == "benchmark" else options.digits_counts
            lines += [f"## {title}", "", *table(preset, counts, options), ""]
        files.write("Hosts trained and grown together, against a loop over modules", lines)


if __name__ == "__main__":
    main()
