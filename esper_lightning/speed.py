"""How fast a task trains on this machine: the stages of an iteration, in two compile modes.

Every measurement is a run of its own in a temporary folder, with everything that ``esper fit`` has
except for evaluations. The first iterations compile and warm up, and do not count.
"""

import dataclasses
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import Profiler
from typing_extensions import override

from esper_lightning.callbacks.lightning_internals import calm
from esper_lightning.compiling.loops import CompileMode, autocast_without_cache, few_cpu_threads
from esper_lightning.core.errors import at_least, positive, require
from esper_lightning.envs.base import EnvSpec, spec_name, takes_num_envs
from esper_lightning.train import run_callbacks, run_plugins
from esper_lightning.training.module import PPO
from esper_lightning.training.settings import PPOSettings

__all__ = ["Speed", "measure_speed", "other_sizes", "speed_as_data", "speed_table"]

_STAGES = ("rollout", "advantages", "update", "logging")
_WARM_UP = 2  # iterations, of which the first compiles
_FEWEST = 3  # iterations that are measured, however long they take
_MOST_ENVS = 65536  # environments of a number that was not asked for
_POLICY_S = 0.2  # seconds in which the policy acts alone
_POLICY_ALONE = (
    "policy alone: it acts for the steps of a rollout without environments, beside the run."
)


class Speed(NamedTuple):
    """The speed of training, as medians over iterations.

    Attributes:
        compile: Compile mode.
        num_envs: Number of environments.
        env_steps: Environment steps of an iteration.
        start_s: Seconds from the start of the run to the end of the first iteration.
        iteration_ms: Milliseconds of an iteration.
        stages_ms: Milliseconds of each stage; ``environment`` is a part of ``rollout``, and is
            missing where acting and environments are one program.
        policy_ms: Milliseconds in which the policy acts for the steps of a rollout, without
            environments; measured beside the run, since both may be one program in it.
    """

    compile: CompileMode
    num_envs: int
    env_steps: int
    start_s: float
    iteration_ms: float
    stages_ms: Mapping[str, float]
    policy_ms: float

    @property
    def env_steps_per_s(self) -> float:
        """Environment steps in a second."""
        return self.env_steps / self.iteration_ms * 1e3

    @property
    def trainer_ms(self) -> float:
        """Milliseconds of an iteration outside its stages: Trainer, callbacks and loggers."""
        return max(0.0, self.iteration_ms - sum(self.stages_ms[name] for name in _STAGES))


def measure_speed(
    settings: PPOSettings,
    *,
    accelerator: str = "auto",
    num_envs: int | Sequence[int] | None = None,
    seconds: float = 3.0,
) -> list[Speed]:
    """Measure ``compile="off"``, then ``settings.compile`` at several numbers of environments.

    Args:
        settings: Settings of the run.
        accelerator: Accelerator of the Trainer.
        num_envs: Numbers of environments to try, as for ``other_sizes``.
        seconds: Seconds of each measurement, compilation not counted.

    Returns:
        The speed with ``off``, the speed with the mode of the settings, and then that mode at the
        other numbers of environments, in increasing order.

    Raises:
        ValueError: If ``seconds`` is not positive, or as for ``other_sizes``.
    """
    positive("seconds", seconds)
    others = other_sizes(settings, num_envs)
    with calm():
        eager = _measure(settings, "off", accelerator, seconds)
        measured = [settings, *others]
        return [eager, *(_measure(one, one.compile, accelerator, seconds) for one in measured)]


def other_sizes(
    settings: PPOSettings, num_envs: int | Sequence[int] | None = None
) -> list[PPOSettings]:
    """The settings with other numbers of environments, in increasing order.

    Args:
        settings: Settings of the run.
        num_envs: Numbers of environments beside that of the settings. ``None`` chooses some, within
            the step budget, if the spec can be copied with another number. Numbers with which
            minibatches would have no samples are skipped.

    Raises:
        ValueError: If a number is not positive, is above the step budget, or is not that of a spec
            with a fixed number of environments.
    """
    own, budget = settings.env.num_envs, settings.total_env_steps
    fixed = not takes_num_envs(type(settings.env))
    if num_envs is None:
        some = [own // 16, own // 4, own * 4, own * 16]
        most = min(_MOST_ENVS, budget or _MOST_ENVS)
        num_envs = [] if fixed else [number for number in some if 1 <= number <= most]
    found: list[PPOSettings] = []
    for number in sorted({*([num_envs] if isinstance(num_envs, int) else num_envs)}):
        at_least("num_envs", number, 1)
        rule = f"be {own}, the number of the environments, which is fixed"
        require(not fixed or number == own, "num_envs", rule, number)
        if number == own:
            continue
        env = cast(EnvSpec, dataclasses.replace(cast(Any, settings.env), num_envs=number))
        other = dataclasses.replace(settings, env=env)
        with suppress(ValueError):  # the minibatches do not divide so few environments
            PPO(**other.arguments())
            found.append(other)
    return found


def speed_table(found: Sequence[Speed], settings: PPOSettings) -> str:
    """The results of ``measure_speed`` as text, with a suggestion at the end."""
    off, own, *others = found
    heads = ["", *dict.fromkeys((off.compile, own.compile))]
    columns = [off] if off.compile == own.compile else [off, own]
    parts: list[tuple[str, Callable[[Speed], float | None]]] = [
        ("rollout, ms", lambda speed: speed.stages_ms["rollout"]),
        ("  of which environment", lambda speed: speed.stages_ms.get("environment")),
        ("  policy alone", lambda speed: speed.policy_ms),
        ("advantages, ms", lambda speed: speed.stages_ms["advantages"]),
        ("update, ms", lambda speed: speed.stages_ms["update"]),
        ("metrics, ms", lambda speed: speed.stages_ms["logging"]),
        ("Trainer and callbacks, ms", lambda speed: speed.trainer_ms),
        ("iteration, ms", lambda speed: speed.iteration_ms),
        ("env-steps/s", lambda speed: speed.env_steps_per_s),
        ("start and first iteration, s", lambda speed: speed.start_s),
    ]
    rows = [[name, *(_number(part(speed)) for speed in columns)] for name, part in parts]
    lines = [_machine(settings, own), "", *_aligned([heads, *rows]), "", _POLICY_ALONE]
    if others:
        scaled = sorted([own, *others], key=lambda speed: speed.num_envs)
        heads = ["environments", "env-steps/s", "iteration, ms", "Trainer and callbacks"]
        cells = [
            [
                f"{speed.num_envs:,}",
                _number(speed.env_steps_per_s),
                _number(speed.iteration_ms),
                f"{speed.trainer_ms / speed.iteration_ms:.0%}",
            ]
            for speed in scaled
        ]
        lines += ["", *_aligned([heads, *cells])]
    return "\n".join([*lines, "", *_suggestions(found)])


def speed_as_data(found: Sequence[Speed], settings: PPOSettings) -> dict[str, Any]:
    """The results of ``measure_speed`` as plain data, with the settings and the machine."""
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "model": settings.to_data(),
        "speeds": [
            {
                **speed._asdict(),
                "stages_ms": dict(speed.stages_ms),
                "trainer_ms": speed.trainer_ms,
                "env_steps_per_s": speed.env_steps_per_s,
            }
            for speed in found
        ],
    }


class _Stages(Profiler):
    """A profiler that keeps the seconds of the stages of each iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._started: dict[str, float] = {}

    @override
    def start(self, action_name: str) -> None:
        if action_name in _STAGES:
            self._started[action_name] = time.perf_counter()

    @override
    def stop(self, action_name: str) -> None:
        if action_name in _STAGES:
            seconds = time.perf_counter() - self._started[action_name]
            self.seconds[action_name].append(seconds)


class _Clock(Callback):
    """A callback that ends a run after some seconds, not counting the first iterations."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._begun = seconds, time.perf_counter()
        self.ends: list[float] = []
        self.env_seconds: list[float] = []  # of each iteration
        self.policy_seconds: list[float] = []  # of each rollout of the policy alone

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.time_environment(self._add)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.policy_seconds = pl_module.time_policy()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int):
        self.env_seconds.append(0.0)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ends.append(time.perf_counter())
        counted = self.ends[_WARM_UP:]
        if len(counted) >= _FEWEST and counted[-1] - counted[0] >= self._seconds:
            trainer.should_stop = True

    @property
    def start_s(self) -> float:
        """Seconds to the end of the first iteration."""
        return self.ends[0] - self._begun

    def _add(self, seconds: float) -> None:
        self.env_seconds[-1] += seconds


class _Measured(PPO):
    """PPO that measures how long its environments and its policy take."""

    def time_environment(self, add: Callable[[float], None]) -> None:
        self._learner.collector.time_environment(add)

    def time_policy(self) -> list[float]:
        """Seconds in which the policy acts for the steps of a rollout, several times."""
        act, seconds = self._learner.acting_alone(), list[float]()
        rows = self.env.num_envs * self.ppo.rollout_steps // self.ppo.minibatches
        with autocast_without_cache(self.device), few_cpu_threads(rows):  # as in an iteration
            act()  # which may compile
            while len(seconds) < _FEWEST or sum(seconds) < _POLICY_S:
                started = time.perf_counter()
                act()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                seconds.append(time.perf_counter() - started)
        return seconds


def _measure(settings: PPOSettings, mode: CompileMode, accelerator: str, seconds: float) -> Speed:
    ppo = settings.ppo
    if ppo.learning_rate_schedule == "linear":  # which needs an end; the clock ends this run
        ppo = dataclasses.replace(ppo, learning_rate_schedule="constant")
    chosen = dataclasses.replace(settings, compile=mode, ppo=ppo, total_env_steps=None)
    clock, stages = _Clock(seconds), _Stages()
    model = _Measured(**chosen.arguments())
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator=accelerator,
            devices=1,
            max_epochs=-1,
            logger=TensorBoardLogger(folder, name="", version=""),
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            profiler=stages,
            callbacks=[*run_callbacks(evaluates=False, shows_progress=False), clock],
            plugins=run_plugins(),
        ).fit(model)
    ends = clock.ends[_WARM_UP - 1 :]
    times = [after - before for before, after in itertools.pairwise(ends)]
    ms = {name: 1e3 * statistics.median(stages.seconds[name][_WARM_UP:]) for name in _STAGES}
    env_ms = 1e3 * statistics.median(clock.env_seconds[_WARM_UP:])
    if env_ms > 0.0:
        ms["environment"] = env_ms
    return Speed(
        compile=mode,
        num_envs=settings.env.num_envs,
        env_steps=settings.env.num_envs * settings.ppo.rollout_steps,
        start_s=clock.start_s,
        iteration_ms=1e3 * statistics.median(times),
        stages_ms=ms,
        policy_ms=1e3 * statistics.median(clock.policy_seconds),
    )


def _machine(settings: PPOSettings, speed: Speed) -> str:
    threads = torch.get_num_threads()
    return (
        f"{spec_name(settings.env)}: {speed.num_envs:,} environments x "
        f"{settings.ppo.rollout_steps} steps, {os.cpu_count()} cores, {threads} threads, "
        f"torch {torch.__version__}"
    )


def _suggestions(found: Sequence[Speed]) -> list[str]:
    """What the figures say to a user, most important first."""
    off, own, *others = found
    lines: list[str] = []
    if own.compile != off.compile:
        ratio = own.env_steps_per_s / off.env_steps_per_s
        lines.append(f"compile={own.compile!r} is {ratio:.1f} times as fast as off.")
    environment = own.stages_ms.get("environment", 0.0) / own.iteration_ms
    if environment > 0.5:
        lines.append(
            f"The environments take {environment:.0%} of an iteration: faster ones, or more "
            "workers, would help most."
        )
    elif own.trainer_ms > 0.3 * own.iteration_ms:
        lines.append(
            f"Trainer and callbacks take {own.trainer_ms / own.iteration_ms:.0%} of an iteration: "
            "more environments or longer rollouts would help most."
        )
    if others:
        best = max(others, key=lambda speed: speed.env_steps_per_s)
        ratio = best.env_steps_per_s / own.env_steps_per_s
        if ratio > 1.2:
            lines.append(
                f"num_envs={best.num_envs} gives {ratio:.1f} times the env-steps/s, with "
                f"{best.env_steps:,} instead of {own.env_steps:,} samples for each update."
            )
        else:
            lines.append("Other numbers of environments are not much faster.")
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
