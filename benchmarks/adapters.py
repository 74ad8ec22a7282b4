"""Cost of the adapters around simulators: env steps for each second of one CPU core.

The bare simulator and the adapted one are stepped in turns by the same random actions, in one
process and one thread. Both reset what ended. ``cost`` is the time that the adapter adds, as a
share of the simulator's own time: the median over rounds. Writes ``results/adapters.md``.

The part ``training`` measures, as ``esper bench`` does, an iteration of PPO on CartPole of
Gymnasium, eagerly and with native code. Writes ``results/adapters_training.md``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from conditions import Results, benchmark_parser, results
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from esper_lightning import PPOConfig
from esper_lightning.core.spaces import Discrete
from esper_lightning.envs import Gymnasium
from esper_lightning.speed import Speed, measure_speed
from esper_lightning.training.settings import PPOSettings

PARTS = ("cost", "training")
PACKAGES = ("gymnasium", "mujoco", "Box2D", "numpy")
STEPS = 32  # of a rollout
LEAST_UPDATE, MOST_OURS = 5.0, 0.15  # goals at 1,024 environments


class Case(NamedTuple):
    id: str
    num_envs: int
    steps: int  # of all environments in a round
    bound: float | None  # greatest cost that is promised


CASES = [
    Case("CartPole-v1", 8, 800, 0.30),
    Case("LunarLander-v3", 8, 400, None),
    Case("Hopper-v5", 8, 200, 0.10),
    Case("HalfCheetah-v5", 8, 250, 0.10),
    Case("Walker2d-v5", 8, 150, 0.10),
]


def raw(case: Case, actions: torch.Tensor) -> Callable[[], None]:
    """Steps of a bare ``SyncVectorEnv``, which is reset by hand where episodes ended."""
    makers = [lambda: gymnasium.make(case.id, disable_env_checker=True)] * case.num_envs
    env = SyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.DISABLED)
    space = Gymnasium(id=case.id).spaces().action
    given = actions.numpy()
    if not isinstance(space, Discrete):
        low, high = np.array(space.lows), np.array(space.highs)
        given = (low + (given + 1) / 2 * (high - low)).astype(np.float32)
    env.reset(seed=0)

    def play() -> None:
        for action in given:
            _, _, terminated, truncated, _ = env.step(action)
            ended = terminated | truncated
            if ended.any():
                env.reset(options={"reset_mask": ended})

    return play


def adapted(case: Case, actions: torch.Tensor) -> Callable[[], None]:
    """The same steps through the adapter, which takes and returns tensors."""
    env = Gymnasium(id=case.id, num_envs=case.num_envs).build(torch.device("cpu"), 0)
    space = env.spaces.action
    given = actions
    if not isinstance(space, Discrete):
        low, high = torch.tensor(space.lows), torch.tensor(space.highs)
        given = low + (actions + 1) / 2 * (high - low)
    env.reset()

    def play() -> None:
        for action in given:
            env.step(action)

    return play


def random_actions(case: Case, steps: int) -> torch.Tensor:
    """Actions ``[T, B, ...]``: choices, or numbers in [-1, 1]."""
    space, generator = Gymnasium(id=case.id).spaces().action, torch.Generator().manual_seed(0)
    shape = (steps, case.num_envs)
    if isinstance(space, Discrete):
        return torch.randint(space.n, shape, generator=generator)
    return torch.rand(*shape, *space.shape, generator=generator) * 2 - 1


def seconds(play: Callable[[], None]) -> float:
    before = time.process_time()
    play()
    return time.process_time() - before


def measure(case: Case, options: argparse.Namespace) -> str:
    """A row of the table."""
    steps = max(2, int(case.steps * options.scale))
    actions = random_actions(case, steps)
    players: list[Any] = [raw(case, actions), adapted(case, actions)]
    for play in players:
        seconds(play)
    rounds = [[seconds(play) for play in players] for _ in range(options.rounds)]
    cost = statistics.median(with_adapter / alone - 1 for alone, with_adapter in rounds)
    typical_s = [statistics.median(times) for times in zip(*rounds, strict=True)]
    rates = [case.num_envs * steps / max(took_s, 1e-9) for took_s in typical_s]
    bound = "" if case.bound is None else f"{case.bound:.0%}"
    cells = (case.id, case.num_envs, *(f"{rate:,.0f}" for rate in rates), f"{cost:.0%}", bound)
    return f"| {' | '.join(map(str, cells))} |"


def write_cost(files: Results, options: argparse.Namespace) -> None:
    """Bare and adapted simulators in turns."""
    head = ("task", "environments", "raw", "adapted", "cost of the adapter", "at most")
    lines = [
        "Env steps for each CPU second, the median of all rounds. The cost is the median of",
        "the ratios within each round, raw and adapted one after the other, and so is not",
        "quite the ratio of the two columns.",
        "",
    ]
    lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    files.write("Cost of the adapters", [*lines, *(measure(case, options) for case in CASES)])


def write_training(files: Results, options: argparse.Namespace) -> None:
    """Training with ``off`` and with ``auto`` in turns."""
    head = ("environments x steps", "compile", "iteration, ms", "environment, ms")
    head += ("rest of the rollout, us a step", "its share", "advantages, ms", "update, ms", "ratio")
    lines = [
        "Gymnasium's CartPole-v1, two hidden layers of 64, 4 epochs of 4 minibatches; medians of",
        "the rounds, each of which trains with `off` and then with `auto` for "
        f"{options.seconds:g} s. The rest of the",
        "rollout is all that is not the environment's step: the policy, noise, and storing; its",
        "share is of the iteration. The ratio is of the updates, `off` over `auto`, the median of",
        f"the ratios within each round. Goals at 1,024 environments: a ratio of at least "
        f"{LEAST_UPDATE:g}, and a",
        f"share below {MOST_OURS:.0%}.",
        "",
    ]
    lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for num_envs in options.num_envs:
        rounds = [trained(num_envs, options.seconds) for _ in range(options.rounds)]
        updates = [off.stages_ms["update"] / auto.stages_ms["update"] for off, auto in rounds]
        for index, name in enumerate(("off", "auto")):
            speeds = [pair[index] for pair in rounds]
            iteration = median(speeds, lambda speed: speed.iteration_ms)
            stages = {
                stage: median(speeds, lambda speed, stage=stage: speed.stages_ms[stage])
                for stage in ("environment", "advantages", "update")
            }
            rest = median(speeds, rest_ms)
            share = median(speeds, lambda speed: rest_ms(speed) / speed.iteration_ms)
            cells = [f"{num_envs:,} x {STEPS}", name]
            cells += [f"{iteration:,.4g}", f"{stages['environment']:,.4g}"]
            cells += [f"{1e3 * rest / STEPS:,.4g}", f"{share:.1%}"]
            cells += [f"{stages['advantages']:,.3g}", f"{stages['update']:,.4g}"]
            cells += [f"{statistics.median(updates):.2f}" if name == "auto" else ""]
            lines.append(f"| {' | '.join(cells)} |")
    files.write("Training behind an adapter", lines, part="training")


def trained(num_envs: int, seconds: float) -> tuple[Speed, Speed]:
    """The speeds of ``off`` and ``auto``."""
    env = Gymnasium(id="CartPole-v1", num_envs=num_envs)
    settings = PPOSettings(env=env, ppo=PPOConfig(rollout_steps=STEPS))
    off, auto = measure_speed(settings, num_envs=num_envs, seconds=seconds)
    return off, auto


def rest_ms(speed: Speed) -> float:
    """Milliseconds of an iteration's rollout outside of the environment's steps."""
    return speed.stages_ms["rollout"] - speed.stages_ms["environment"]


def median(speeds: list[Speed], part: Callable[[Speed], float]) -> float:
    return statistics.median(part(speed) for speed in speeds)


def parser() -> argparse.ArgumentParser:
    smallest = {"rounds": 1, "scale": 0.02, "seconds": 0.01, "num_envs": [4], "parts": PARTS}
    parser = benchmark_parser(__doc__, smallest)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["cost"])
    parser.add_argument("--rounds", type=int, default=31, help="(default: %(default)s)")
    help_ = "share of the steps of a round (default: %(default)s)"
    parser.add_argument("--scale", type=float, default=1.0, help=help_)
    help_ = "environments that are trained in (default: %(default)s)"
    parser.add_argument("--num_envs", type=int, nargs="+", default=[4, 1024, 2048], help=help_)
    help_ = "of each measurement of training (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=3.0, help=help_)
    return parser


def main() -> None:
    options = parser().parse_args()
    if "cost" in options.parts:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with results(__file__, options, threads="one thread", packages=PACKAGES) as files:
            write_cost(files, options)
        torch.set_num_threads(threads)
    if "training" in options.parts:
        said = f"{torch.get_num_threads()} threads"
        with results(__file__, options, threads=said, packages=PACKAGES) as files:
            write_training(files, options)


if __name__ == "__main__":
    main()
