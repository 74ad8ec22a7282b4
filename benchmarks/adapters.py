"""Cost of the adapters around simulators: env steps for each second of one CPU core.

The bare simulator and the adapted one are stepped in turns by the same random actions, in one
process and one thread. Both reset what ended. ``cost`` is the time that the adapter adds, as a
share of the simulator's own time: the median over rounds. Writes ``results/adapters.md``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from conditions import benchmark_parser, results
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from esper_lightning.core.spaces import Discrete
from esper_lightning.envs import Gymnasium


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


def parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__, {"rounds": 1, "scale": 0.02})
    parser.add_argument("--rounds", type=int, default=31, help="(default: %(default)s)")
    help_ = "share of the steps of a round (default: %(default)s)"
    parser.add_argument("--scale", type=float, default=1.0, help=help_)
    return parser


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(1)
    head = ("task", "environments", "raw", "adapted", "cost of the adapter", "at most")
    packages = ("gymnasium", "mujoco", "Box2D", "numpy")
    with results(__file__, options, threads="one thread", packages=packages) as files:
        lines = [
            "Env steps for each CPU second, the median of all rounds. The cost is the median of",
            "the ratios within each round, raw and adapted one after the other, and so is not",
            "quite the ratio of the two columns.",
            "",
        ]
        lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        files.write("Cost of the adapters", [*lines, *(measure(case, options) for case in CASES)])


if __name__ == "__main__":
    main()
