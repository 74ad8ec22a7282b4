"""Env-steps/s of the whole training loop, against the peers: in one session, in turn, as ratios.

Every contender is a process of its own that waits for its turn. In a round each runs for about a
second, in an order that rotates with every round. Ratios are within rounds; results are medians and
quartiles over rounds. The benchmark also measures start-up times, and speed and memory over the
number of environments. Writes ``results/throughput.md``, ``throughput_startup.md`` and
``throughput_scaling.md``.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from conditions import benchmark_parser, results
from contenders import CONTENDERS, STAGES, Seconds

OURS, BARE, ARITHMETIC = "esper", "esper, bare loop", "library arithmetic alone"
PEERS = ("gymnasium", "jax", "rsl-rl-lib", "skrl", "stable-baselines3")
PARTS = ("peers", "startup", "scaling")
PROGRAM = Path(__file__).with_name("contenders.py")
TITLE = "the whole training loop: CartPole, two hidden layers of 64"


class Setting(NamedTuple):
    """The size of a contender's iteration, and the number of threads."""

    num_envs: int
    steps: int
    threads: int
    eager: bool = False

    @property
    def title(self) -> str:
        return f"{self.num_envs} environments x {self.steps} steps, {self.threads} threads"

    @property
    def env_steps(self) -> int:
        return self.num_envs * self.steps


CORES = os.cpu_count() or 1
LARGE, SMALL = Setting(2048, 32, CORES), Setting(4, 128, 1)
TINY = Setting(4, 8, 1, eager=True)
ONLY_IN = {"stable-baselines3, Gymnasium": SMALL, "stable-baselines3, batched env": LARGE}


class Worker:
    """A process of a contender, which runs iterations on request.

    Raises:
        RuntimeError: If the contender fails; the error has the end of the process's output.
    """

    def __init__(self, name: str, setting: Setting, environment: dict[str, str]) -> None:
        self.name, self.env_steps = name, setting.env_steps
        words = [f"--num-envs={setting.num_envs}", f"--steps={setting.steps}"]
        words += [f"--threads={setting.threads}", *["--eager"] * setting.eager]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), name, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        )
        self._read()
        self.start_s = time.perf_counter() - started
        self.start_cpu_s = self._cpu_s()
        self.run(2)

    def run(self, count: int) -> Seconds:
        """Run ``count`` iterations; returns the seconds of the stages, or of the whole, of each."""
        assert self._process.stdin is not None
        print(count, file=self._process.stdin, flush=True)
        return self._read()

    def peak_mb(self) -> float:
        """Peak of the process's resident memory, in MB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # pyright: ignore[reportOptionalSubscript]

    def _cpu_s(self) -> float:
        """Seconds that the process and its finished children have computed, all threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> str:
        """Let the process end; returns what it wrote to its log."""
        self._process.communicate("0\n")
        self._log.seek(0)
        return self._log.read()

    def _read(self) -> Seconds:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} failed:\n{self.close()[-2000:]}")
        return json.loads(line)


def compare(names: list[str], setting: Setting, options: argparse.Namespace) -> list[str]:
    """Tables of speeds, of ratios, and of the stages of the bare loop."""
    ours, rounds = options.ours, options.rounds
    workers = [Worker(name, setting, {}) for name in names]
    counts = {worker.name: iterations_in(options.turn_s, worker) for worker in workers}
    seconds: dict[str, list[float]] = defaultdict(list)
    stages = Seconds()
    for number in range(rounds):
        turn = number % len(workers)
        for worker in workers[turn:] + workers[:turn]:
            found = worker.run(counts[worker.name])
            seconds[worker.name].append(statistics.median(map(sum, found)))
            stages += found if worker.name == BARE else []
        print(f"round {number + 1} of {rounds}", flush=True)
    for worker in workers:
        worker.close()
    table = [
        f"| | env-steps/s | ms an iteration | {ours}: times as fast | quartiles |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in names:
        times = seconds[name]
        ratios = [theirs / mine for theirs, mine in zip(times, seconds[ours], strict=True)]
        first, median, third = statistics.quantiles(ratios, n=4)
        typical = statistics.median(times)
        table.append(
            f"| {name} | {setting.env_steps / typical:,.0f} | {typical * 1e3:.2f} "
            f"| {median:.3g} | {first:.3g} to {third:.3g} |"
        )
    return [*table, "", *(split(stages) if stages else [])]


def iterations_in(seconds: float, worker: Worker) -> int:
    """Number of iterations that a worker runs in some seconds; at least one."""
    return max(1, round(seconds / min(map(sum, worker.run(3)))))


def split(stages: Seconds) -> list[str]:
    """Median seconds of the stages of an iteration, as lines of a table."""
    typical = [statistics.median(column) for column in zip(*stages, strict=True)]
    return [
        f"| stage of {BARE} | ms | share |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {part * 1e3:.2f} | {part / sum(typical):.0%} |"
            for name, part in zip(STAGES, typical, strict=True)
        ),
        "",
    ]


def peers(options: argparse.Namespace) -> list[str]:
    """Tables of all installed contenders, one setting after another."""
    sections: list[str] = []
    for setting in options.settings:
        chosen = [
            name
            for name in CONTENDERS
            if ONLY_IN.get(name, setting) == setting
            and (options.only is None or name == options.ours or name in options.only)
        ]
        names = [name for name in chosen if not CONTENDERS[name].absent]
        sections += [f"## {setting.title}", ""]
        sections += compare(names, setting, options)
        for name in chosen:
            if absent := CONTENDERS[name].absent:
                hint = "pip install '.[bench]'"
                sections += [f"Not measured: {name}: {', '.join(absent)} not installed. {hint}", ""]
    return sections


def scaling(options: argparse.Namespace) -> list[str]:
    """Throughput over the number of environments, 32 steps each."""
    lines = [
        "| environments | env-steps/s | ms an iteration | peak memory of the process, MB |",
        "| --- | --- | --- | --- |",
    ]
    for num_envs in options.scaling:
        few = num_envs * 32 // 4 < 2048
        worker = Worker(options.scales, Setting(num_envs, 32, 1 if few else CORES), {})
        count = max(3, iterations_in(20 * options.turn_s, worker))
        typical = statistics.median(map(sum, worker.run(count)))
        speed, peak_mb = worker.env_steps / typical, worker.peak_mb()
        worker.close()
        lines.append(f"| {num_envs:,} | {speed:,.0f} | {typical * 1e3:.2f} | {peak_mb:,.0f} |")
        print(lines[-1], flush=True)
    return lines


def startup(options: argparse.Namespace) -> list[str]:
    """Seconds from a process's start to its first iteration's end, without and with a cache.

    Medians over the rounds, in which every contender starts twice.
    """
    found: dict[str, list[list[float]]] = defaultdict(list)
    for _ in range(options.starts_rounds):
        for name in options.starts:
            with tempfile.TemporaryDirectory() as cache:
                times: list[float] = []
                for _ in range(2):
                    worker = Worker(name, options.settings[0], {"XDG_CACHE_HOME": cache})
                    times += [worker.start_s, worker.start_cpu_s]
                    worker.close()
            found[name].append(times)
    lines = [
        "| | cache empty, s | CPU s | cache filled, s | CPU s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, rounds in found.items():
        typical = (f"{statistics.median(column):.1f}" for column in zip(*rounds, strict=True))
        lines.append(f"| {name} | {' | '.join(typical)} |")
        print(lines[-1], flush=True)
    return lines


def parser() -> argparse.ArgumentParser:
    smallest = {
        "settings": [TINY],
        "ours": BARE,
        "only": [ARITHMETIC],
        "starts": [ARITHMETIC],
        "starts_rounds": 1,
        "scales": ARITHMETIC,
        "scaling": [1],
        "turn_s": 0.0,
        "rounds": 2,
    }
    parser = benchmark_parser(__doc__, smallest)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--only", nargs="+", choices=list(CONTENDERS), help="contenders to compare with"
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.set_defaults(
        settings=[LARGE, SMALL],
        ours=OURS,
        turn_s=1.0,
        starts=["esper, off", OURS],
        starts_rounds=5,
        scales=OURS,
        scaling=[1, 16, 256, 2048, 16384, 65536],
    )
    return parser


def main() -> None:
    options = parser().parse_args()
    with results(__file__, options, threads="shared with other work", packages=PEERS) as files:
        if "peers" in options.parts:
            files.write(f"Throughput of {TITLE}", peers(options))
        if "startup" in options.parts:
            large = options.settings[0].title
            title = f"From the start to the end of the first iteration: CartPole, {large}"
            files.write(title, startup(options), part="startup")
        if "scaling" in options.parts:
            files.write(f"Scaling of {TITLE}, 32 steps", scaling(options), part="scaling")


if __name__ == "__main__":
    main()
