"""Env-steps/s of the whole training loop, against the peers: one session, in turn, as ratios.

Every contender is a process of its own that waits for its turn; in a round each runs for about a
second, in an order that moves on with every round. Ratios are within rounds; medians and quartiles
over rounds. Also start-up times, and speed and memory over the number of environments. Writes
``results/throughput_<hardware>_<date>.md``.
"""

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conditions import ROOT, conditions
from contenders import IN_LOOP, IN_TRAINER

OURS = "esper, max"
SETTINGS = {
    "2048 environments x 32 steps": {"num_envs": 2048, "steps": 32, "threads": os.cpu_count()},
    "4 environments x 128 steps": {"num_envs": 4, "steps": 128, "threads": 1},
}
SMALL_ONLY, LARGE_ONLY = {"stable-baselines3, Gymnasium"}, {"stable-baselines3, batched env"}
SCALING = (1, 16, 256, 2048, 16384, 65536)
PARTS = ("peers", "startup", "scaling")
PROGRAM = Path(__file__).with_name("contenders.py")


class Contender:
    """A process that runs iterations when it is asked to."""

    def __init__(self, name: str, setting: dict[str, Any], environment: dict[str, str]) -> None:
        options = [f"--{k.replace('_', '-')}={v}" for k, v in setting.items()]
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), name, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        )
        self._read()
        self.start_s = time.perf_counter() - started
        self.run(2)

    def run(self, count: int) -> list[float]:
        """Seconds of each of so many iterations."""
        assert self._process.stdin is not None
        print(count, file=self._process.stdin, flush=True)
        return self._read()

    def peak_mb(self) -> float:
        """Most memory that the process had resident."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # pyright: ignore[reportOptionalSubscript]

    def close(self) -> str:
        """Let it end; returns what it wrote about itself."""
        self._process.communicate("0\n")
        self._log.seek(0)
        return self._log.read()

    def _read(self) -> list[float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} failed:\n{self.close()[-2000:]}")
        return json.loads(line)


def compare(names: list[str], setting: dict[str, Any], rounds: int) -> list[str]:
    """A table of speeds and ratios."""
    contenders: list[Contender] = []
    lines: list[str] = []
    for name in names:
        try:
            contenders.append(Contender(name, setting, {}))
        except RuntimeError as error:
            lines.append(f"Not measured: {str(error).splitlines()[0]} {str(error)[-200:]}")
            print(lines[-1], flush=True)
    counts = {c.name: max(1, round(1.0 / min(c.run(3)))) for c in contenders}
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for number in range(rounds):
        turn = number % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            times = contender.run(counts[contender.name])
            seconds[contender.name].append(statistics.median(times))
        print(f"round {number + 1} of {rounds}", flush=True)
    lines += [
        f"Fell back to a slower way: {contender.name}"
        for contender in contenders
        if "slower way" in contender.close()
    ]
    env_steps = setting["num_envs"] * setting["steps"]
    table = [
        f"| | env-steps/s | ms an iteration | {OURS}: times as fast | quartiles |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, times in seconds.items():
        ratios = [t / ours for t, ours in zip(times, seconds[OURS], strict=True)]
        first, median, third = statistics.quantiles(ratios, n=4)
        typical = statistics.median(times)
        table.append(
            f"| {name} | {env_steps / typical:,.0f} | {typical * 1e3:.2f} "
            f"| {median:.3g} | {first:.3g} to {third:.3g} |"
        )
    return [*table, "", *lines]


def scaling(threads: int) -> list[str]:
    """Throughput over the number of environments, 32 steps each."""
    lines = [
        "| environments | env-steps/s | ms an iteration | peak memory of the process, MB |",
        "| --- | --- | --- | --- |",
    ]
    for num_envs in SCALING:
        few = num_envs * 32 // 4 < 2048
        setting = {"num_envs": num_envs, "steps": 32, "threads": 1 if few else threads}
        contender = Contender(OURS, setting, {})
        typical = statistics.median(contender.run(max(3, 20000 // num_envs // 4 + 1)))
        speed, peak_mb = num_envs * 32 / typical, contender.peak_mb()
        contender.close()
        lines.append(f"| {num_envs:,} | {speed:,.0f} | {typical * 1e3:.2f} | {peak_mb:,.0f} |")
        print(lines[-1], flush=True)
    return lines


def startup(setting: dict[str, Any]) -> list[str]:
    """From the start of the process to the end of the first iteration, without and with caches."""
    lines = ["| | caches empty, s | caches filled, s |", "| --- | --- | --- |"]
    for mode in ("off", "default", "max"):
        with tempfile.TemporaryDirectory() as cache:
            times: list[float] = []
            for _ in range(2):
                contender = Contender(f"esper, {mode}", setting, {"TORCHINDUCTOR_CACHE_DIR": cache})
                times.append(contender.start_s)
                contender.close()
        lines.append(f"| {mode} | {times[0]:.1f} | {times[1]:.1f} |")
        print(lines[-1], flush=True)
    return lines


SPLIT = """
import json, statistics, sys, argparse
sys.path.insert(0, {folder!r})
import torch
from contenders import ours_bare
torch.set_num_threads({threads})
marks, parts = [], []
iterate = ours_bare(argparse.Namespace(num_envs={num_envs}, steps={steps}), "max", marks)
for _ in range({rounds}):
    iterate()
    parts.append([b - a for a, b in zip(marks, marks[1:])])
print(json.dumps([statistics.median(column) for column in zip(*parts[3:])]))
"""


def split(setting: dict[str, Any]) -> list[str]:
    """Where the time of an iteration goes."""
    code = SPLIT.format(folder=str(Path(__file__).parent), rounds=20, **setting)
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    parts = json.loads(out.splitlines()[-1])
    names = ("rollout", "advantages", "update", "copy to the host")
    return [
        "| part | ms | share |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {part * 1e3:.2f} | {part / sum(parts):.0%} |"
            for name, part in zip(names, parts, strict=True)
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", help="contenders to compare with")
    parser.add_argument("--settings", nargs="+", default=["2048", "4"], choices=["2048", "4"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sections: list[str] = []
    for title, setting in SETTINGS.items():
        if "peers" not in arguments.parts or title.split()[0] not in arguments.settings:
            continue
        small = setting["num_envs"] == 4
        names = [
            name
            for name in (*IN_TRAINER, *IN_LOOP)
            if name not in (LARGE_ONLY if small else SMALL_ONLY)
            and (arguments.only is None or name == OURS or name in arguments.only)
        ]
        sections += [f"## {title}, {setting['threads']} threads", ""]
        sections += [*compare(names, setting, arguments.rounds), "", *split(setting), ""]
    large = SETTINGS["2048 environments x 32 steps"]
    if "startup" in arguments.parts:
        sections += ["## From the start to the end of the first iteration, 2048 x 32", ""]
        sections += [*startup(large), ""]
    if "scaling" in arguments.parts:
        sections += ["## Scaling, 32 steps", "", *scaling(large["threads"]), ""]
    command = " ".join(["python", "benchmarks/throughput.py", *sys.argv[1:]])
    hardware = re.sub(r"\W+", "-", f"{os.cpu_count()}-core-cpu").lower()
    date = datetime.datetime.now(tz=datetime.UTC).date()
    what = "throughput" if "peers" in arguments.parts else "_".join(arguments.parts)
    output = arguments.output or ROOT / f"benchmarks/results/{what}_{hardware}_{date}.md"
    text = "\n".join(
        [
            "# Throughput of the whole training loop: CartPole, two hidden layers of 64\n",
            conditions(command, "shared with other work"),
            "",
            *sections,
        ]
    )
    output.write_text(text.rstrip() + "\n")
    print(text)


if __name__ == "__main__":
    main()
