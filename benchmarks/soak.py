"""Runs that are killed at random moments, for twenty minutes. Writes ``results/soak.md``."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from conditions import benchmark_parser, results  # noqa: E402

from tests.crash.soak import Soak, Tally  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = benchmark_parser(__doc__, {"minutes": 0.1})
    options.add_argument("--minutes", type=float, default=20.0)
    options.add_argument("--seed", type=int, default=0)
    return options


def main() -> None:
    options = parser().parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))  # is not removed if something is wrong
    end = time.monotonic() + 60 * options.minutes
    with results(__file__, options, threads="runs of one thread each") as files:
        soak = Soak(folder, options.seed)
        soak.train_undisturbed()
        while time.monotonic() < end:
            soak.one_run(until_s=end, keeps_state=soak.tally.runs % 2 == 1)
        files.write("Runs that are killed at random moments", report(soak.tally, options.minutes))


def report(tally: Tally, minutes: float) -> list[str]:
    """Lines of the results file."""
    kills = sum(tally.kills.values())
    return [
        f"`esper fit` of CartPole, SIGKILLed at random moments for {minutes:g} minutes and resumed",
        "with `--ckpt_path last` until it was done. After each kill every file in the run",
        "directory could be read to its end; each run ended with the history, the evaluations and",
        "the checkpoints of an undisturbed run, bit for bit, but for wall-clock times.",
        "",
        f"- kills, after each of which the run was resumed: {kills}",
        f"- runs, each of which came to its end: {tally.runs}",
        "",
        "Every second run stored the state after each iteration. After a kill, such a run repeated",
        "the iteration whose state, evaluation or checkpoint was being made, and no other:",
        "",
        "| iterations that a run repeated after a kill | kills |",
        "| --- | --- |",
        *(f"| {count} | {kills} |" for count, kills in sorted(tally.repeated.items())),
        "",
        "| what the run was doing when it was killed | kills |",
        "| --- | --- |",
        *(f"| {name} | {count} |" for name, count in tally.kills.most_common()),
    ]


if __name__ == "__main__":
    main()
