"""The cost of the flight recorder: in a healthy run, and from a fault to the exit.

The task is CartPole with 2048 environments on one thread. Ratios are between fits that follow each
other in one process, in an order that rotates with every round: of the fastest iteration, to which
other work on the machine added least, and of the processor time of all iterations and threads.
Results are medians over rounds. Writes ``results/recorder_cost.md``.

The table ``small`` measures the cost in microseconds, which does not depend on the size of an
iteration, on iterations of a few milliseconds, where the cost is larger than the noise. Writes
``results/recorder_cost_small.md``.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from conditions import benchmark_parser, results
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import PyTorchProfiler

from esper_lightning import PPO, FlightRecorder, History, PPOConfig
from esper_lightning.envs import CartPole
from esper_lightning.recorder.profiling.window_profiler import WindowProfiler

_SETTLING = 2
_RECORDED = 10
PARTS = ("small", "large")


def _stock(**settings: int) -> PyTorchProfiler:
    return PyTorchProfiler(schedule=torch.profiler.schedule(**settings))


VARIANTS: dict[str, tuple[bool, Any]] = {
    "recorder off, no profiler": (False, lambda: None),
    "recorder on, no profiler": (True, lambda: None),
    "recorder off, debug_profile.yaml waiting": (False, lambda: WindowProfiler(wait=1000)),
    "recorder on, debug_profile.yaml waiting": (True, lambda: WindowProfiler(wait=1000)),
    "recorder off, stock profiler waiting": (False, lambda: _stock(wait=999, warmup=1, active=1)),
    "recorder on, stock profiler waiting": (True, lambda: _stock(wait=999, warmup=1, active=1)),
}
PAIRS = [
    ("recorder on, no profiler", "recorder off, no profiler"),
    ("recorder on, debug_profile.yaml waiting", "recorder off, debug_profile.yaml waiting"),
    ("recorder on, stock profiler waiting", "recorder off, stock profiler waiting"),
    ("recorder on, debug_profile.yaml waiting", "recorder off, no profiler"),
    ("recorder off, stock profiler waiting", "recorder off, no profiler"),
]


def trainer(
    directory: str, *, recorder: bool, profiler: Any, steps: int, more: Any = ()
) -> Trainer:
    callbacks: list[Callback] = [History(), *more]
    if recorder:
        callbacks.insert(0, FlightRecorder())
    return Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=directory,
        callbacks=callbacks,
        profiler=profiler,
    )


def module(num_envs: int) -> PPO:
    return PPO(CartPole(num_envs=num_envs), ppo=PPOConfig(rollout_steps=32))


def variants_of(pairs: list[tuple[str, str]]) -> list[str]:
    """Names of the variants that appear in pairs, in the order of ``VARIANTS``."""
    return [name for name in VARIANTS if any(name in pair for pair in pairs)]


class _Clock(Callback):
    """A callback that notes wall-clock and processor time at the end of each iteration."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append((time.perf_counter(), time.process_time()))


def fit(model: PPO, *, recorder: bool, profiler: Any, steps: int) -> list[tuple[float, float]]:
    """Wall-clock and processor time at the end of each iteration of a fit."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as directory:
        run = trainer(directory, recorder=recorder, profiler=profiler(), steps=steps, more=[clock])
        # Without the recorder, Lightning fails a healthy run whose profiler is still waiting.
        with contextlib.suppress(*(() if recorder else (AssertionError,))):
            run.fit(model)
    return clock.times


def seconds_of_iteration(
    recorder: bool, profiler: Any, options: argparse.Namespace
) -> tuple[float, float]:
    """Seconds of the fastest iteration, and mean processor seconds; without the first ones."""
    model, steps = module(options.num_envs), _SETTLING + options.iterations
    times = fit(model, recorder=recorder, profiler=profiler, steps=steps)[_SETTLING:]
    fastest = min(after[0] - before[0] for before, after in itertools.pairwise(times))
    return fastest, (times[-1][1] - times[0][1]) / (len(times) - 1)


def measure_iterations(options: argparse.Namespace) -> list[str]:
    """Lines of the table of ratios."""
    torch.set_num_threads(1)
    names = variants_of(options.pairs)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(options.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(seconds_of_iteration(*VARIANTS[name], options))
        print(f"round {number + 1} of {options.rounds}", flush=True)
    lines = [
        "| iteration of | over | fastest, ratio | quartiles | processor time, ratio | quartiles |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, base in options.pairs:
        cells: list[str] = []
        for kind in range(2):
            pairs = zip(seconds[name], seconds[base], strict=True)
            low, middle, high = statistics.quantiles((a[kind] / b[kind] for a, b in pairs), n=4)
            cells += [f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        lines.append(f"| {name} | {base} | {' | '.join(cells)} |")
    milliseconds = statistics.median(pair[0] for pair in seconds[names[0]]) * 1e3
    return [*lines, "", f"The fastest iteration of a fit without recorder: {milliseconds:.0f} ms."]


def measure_small(options: argparse.Namespace) -> list[str]:
    """Lines of the table of microseconds."""
    iterations = options.small_iterations
    torch.set_num_threads(1)
    names = variants_of(options.pairs)
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            recorder, profiler = VARIANTS[name]
            ppo = PPOConfig(rollout_steps=1, epochs=1, minibatches=1)
            model = PPO(CartPole(num_envs=8), ppo=ppo)
            ends = fit(model, recorder=recorder, profiler=profiler, steps=iterations)
            pairs = itertools.pairwise(ends[iterations // 15 :])
            each = [after[0] - before[0] for before, after in pairs]
            milliseconds[name].append(statistics.median(each) * 1e3)
    lines = [
        "| iteration of | over | microseconds more | quartiles | ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, base in options.pairs:
        pairs = zip(milliseconds[name], milliseconds[base], strict=True)
        low, middle, high = statistics.quantiles(((a - b) * 1e3 for a, b in pairs), n=4)
        whole = statistics.median(milliseconds[name])
        lines.append(f"| {name} | {base} | {middle:.0f} | {low:.0f} to {high:.0f} | {whole:.2f} |")
    return lines


class _Fault(Callback):
    """A callback that raises, or ends the run, after ten recorded iterations."""

    def __init__(self, notes: Path, *, raises: bool) -> None:
        self.notes, self.raises = notes, raises

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == _RECORDED + 2:
            peak = _status_kb("VmHWM")
            self.notes.write_text(json.dumps({"time_s": time.time(), "peak_kb": peak}))
            if self.raises:
                raise RuntimeError("injected")


def _status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


DEATHS: dict[str, tuple[bool, bool, Any]] = {
    "fault, recorder, WindowProfiler": (
        True,
        True,
        lambda: WindowProfiler(wait=1, warmup=1, active=50, max_events=10**9),
    ),
    "fault, recorder, stock profiler": (True, True, lambda: _stock(wait=1, warmup=1, active=50)),
    "no fault, no recorder, stock profiler": (
        False,
        False,
        lambda: _stock(wait=1, warmup=1, active=50),
    ),
}


def die(name: str, directory: str, num_envs: int) -> None:
    """Train until the fault; to be called in a process of its own."""
    recorder, raises, profiler = DEATHS[name]
    fault = _Fault(Path(directory) / "fault.json", raises=raises)
    steps = _RECORDED + 2 + raises
    run = trainer(directory, recorder=recorder, profiler=profiler(), steps=steps, more=[fault])
    run.fit(module(num_envs))


def measure_deaths(options: argparse.Namespace) -> list[str]:
    """Lines of the table of exits."""
    lines = [
        "| 10 recorded iterations, then | s to the exit | MB above the peak before "
        "| trace, KB an iteration |",
        "| --- | --- | --- | --- |",
    ]
    for name in options.deaths:
        found = [measure_death(name, options) for _ in range(options.times)]
        seconds, memory, size = (statistics.median(column) for column in zip(*found, strict=True))
        lines.append(f"| {name} | {seconds:.1f} | {memory:.0f} | {size:.0f} |")
        print(lines[-1], flush=True)
    return lines


def measure_death(name: str, options: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds to the exit, MB above the peak before, KB of trace for each recorded iteration."""
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                *["--smallest"] * options.smallest,
                "--die",
                name,
                directory,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, _, usage = os.wait4(process.pid, 0)
        ended = time.time()
        fault = json.loads((Path(directory) / "fault.json").read_text())
        traces = [path.stat().st_size for path in Path(directory).rglob("*.pt.trace.json*")]
    return (
        ended - fault["time_s"],
        (usage.ru_maxrss - fault["peak_kb"]) / 1024,
        sum(traces) / 1024 / _RECORDED,
    )


def parser() -> argparse.ArgumentParser:
    sizes = {"num_envs": 8, "iterations": 2, "small_iterations": 15, "rounds": 2}
    chosen = {"pairs": PAIRS[3:4], "deaths": list(DEATHS)[1:2], "times": 1}  # both profilers
    parser = benchmark_parser(__doc__, {**chosen, **sizes})
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--die", nargs=2, help=argparse.SUPPRESS)
    parser.set_defaults(num_envs=2048, iterations=12, small_iterations=300)
    parser.set_defaults(pairs=PAIRS, deaths=list(DEATHS), times=3)
    return parser


def main() -> None:
    options = parser().parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if options.die:
        die(*options.die, options.num_envs)
        return
    threads = "one thread (from fault to exit: two), shared with other work"
    with results(__file__, options, threads=threads) as files:
        if "small" in options.parts:
            files.write(
                "What the flight recorder costs in an iteration: CartPole, 8 environments, 1 step",
                [
                    f"Median iteration of {options.small_iterations} in a fit; "
                    f"{options.rounds} rounds.",
                    "",
                    *measure_small(options),
                ],
                part="small",
            )
        if "large" in options.parts:
            deaths = measure_deaths(options)
            files.write(
                "What the flight recorder costs: CartPole, 2048 environments, 32 steps",
                [
                    f"## While a run goes well: {options.rounds} rounds",
                    "",
                    *measure_iterations(options),
                    "",
                    f"## From a fault to the exit of the process: medians of {options.times}",
                    "",
                    *deaths,
                ],
            )


if __name__ == "__main__":
    main()
