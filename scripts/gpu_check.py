"""Everything worth knowing from a GPU in nine minutes: tests, equality, speed, memory, faults.

    python scripts/gpu_check.py --out FOLDER

It needs one GPU, Python 3.12, torch 2.11 with triton, lightning, torchmetrics, tensorboard and
pytest, and no network; jax for the comparison. ``jaxtyping``, ``hypothesis`` and ``scikit-learn``
are needed by tests. Wheels to bring where they are missing: ``jsonargparse`` with
``docstring-parser`` and ``typeshed-client``, ``beartype``, ``pytest-timeout``, ``pytest-xdist``.

The most telling steps come first. Steps that measure time run alone, all others side by side. Each
step is a process of its own with a time limit, and ``gpu_check.json`` and ``gpu_check.md`` are
written anew after each of its results, so that what was measured survives whatever comes next.
Those of an earlier run in the same folder are renamed, as are its golden histories; ``log.txt`` is
continued. Neither a full disk nor an output that nobody reads any more ends a step. SIGTERM and
SIGINT end the running steps, as does the death of this process, with all processes that they have
started. The last line names the steps that failed, and the status is 1 if there are any.
``--device cpu`` is the rehearsal: all of it, at sizes that measure nothing.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import itertools
import json
import logging
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(os.environ.get("ESPER_ROOT", Path(__file__).resolve().parent.parent))
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "peers")]
TESTS = (
    "tests/training/test_cuda.py",
    "tests/envs/morphogenesis/test_captured.py",
    "tests/envs/test_autoreset.py",
    "tests/envs/test_check.py",
    "tests/recorder/test_memory_snapshot.py",
    "tests/crash/test_faults.py",
    "tests/training/test_golden.py",
)
MODES = ("max", "off", "default")
TF32 = "max, TF32"  # products of matrices in TF32, as JAX computes them unless it is asked not to
MINIBATCHES = 4
GOAL_STEPS_PER_S = 10e6  # at the first size
INHERITED = "GPU_CHECK_INHERITED"  # variable with the handler of SIGTERM that the check found
NO_TESTS = 5  # status of pytest where no test of a file is selected
ENDED_TESTS = "GPU_CHECK_ENDED_TESTS"  # variable with the pipe for the names of ended tests
GUARD = __file__  # of the processes of steps
SUBREAPER = 36  # of Linux's prctl
WORKER = "PYTEST_XDIST_WORKER"  # environment variable of the processes of pytest-xdist
MOST_DIFFERENT = 1e-5  # weights of two modes after three iterations
LONGEST_CELL, LONGEST_ERROR = 1500, 800  # characters in the table
Found = Iterator[dict[str, Any]]
"""Results of a step by name, each as soon as it is known."""


class Machine(NamedTuple):
    """Where the steps run, and how much they do.

    Attributes:
        device: Kind of the device.
        sizes: Environments and steps of a rollout.
        hosts: Numbers of hosts of Morphogenesis.
        evaluations: Number of evaluations over which memory is watched.
        epochs: Number of passes of an update.
        seconds: Least duration of a measurement.
        tests: Files of tests, or names as pytest has them.
        configs: Configs with golden histories; empty for all.
        out: Folder of the results.
    """

    device: str
    sizes: Sequence[tuple[int, int]]
    hosts: Sequence[int]
    evaluations: int
    epochs: int
    seconds: float
    tests: Sequence[str]
    configs: Sequence[str] = ()
    out: Path = Path()

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def wait(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            import torch  # noqa: PLC0415

            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A mark in the work of the device, after all that has been given to it."""
        import torch  # noqa: PLC0415

        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, first: Any, last: Any) -> float:
        """Milliseconds of the device between two marks that it has reached."""
        return first.elapsed_time(last) if self.on_gpu else 1e3 * (last - first)

    def megabytes(self) -> int:
        """Memory that tensors take on the device; 0 on a CPU."""
        import torch  # noqa: PLC0415

        return torch.cuda.memory_allocated() >> 20 if self.on_gpu else 0


MACHINES = {
    "cuda": Machine(
        device="cuda",
        sizes=[(2048, 32), (4096, 24), (16384, 32), (4, 128)],
        hosts=[1, 16, 64, 256, 1024],
        evaluations=100,
        epochs=4,
        seconds=1.5,
        tests=TESTS,
    ),
    "cpu": Machine(
        device="cpu",
        sizes=[(8, 4), (4, 2)],
        hosts=[2],
        evaluations=2,
        epochs=1,
        seconds=0.0,
        tests=TESTS[:1],
        configs=["cartpole"],
    ),
}


# Steps.


def about(machine: Machine) -> Found:
    """Versions, and the GPU."""
    import torch  # noqa: PLC0415

    yield {"python": sys.version.split()[0], "torch": torch.__version__, "date": f"{date.today()}"}
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    yield {"commit": os.environ.get("COMMIT", git.stdout.strip())}  # of a copy without git
    names = ("lightning", "torchmetrics", "triton", "jax", "jaxtyping", "jsonargparse", "beartype")
    names += ("xdist", "pytest_timeout", "hypothesis", "sklearn", "gymnasium")
    yield {name: importlib.util.find_spec(name) is not None for name in names}
    if machine.on_gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
            yield {"driver": done.stdout.strip()}
        found = torch.cuda.get_device_properties(0)
        yield {
            "gpu": found.name,
            "cuda": torch.version.cuda,
            "multiprocessors": found.multi_processor_count,
            "memory_gb": round(found.total_memory / 1e9),
        }
        header = Path(torch.__file__).parent / "include/ATen/cuda/CUDAContextLight.h"
        # Whether the death of a graph frees the workspaces of its stream.
        yield {"clears_workspaces": "WorkspacesForStream" in header.read_text()}


def tests(machine: Machine) -> Found:
    """The tests that need a GPU: how many passed and failed so far, and which failed."""
    options = ["-m", "gpu", "-q", "-rf", "-p", "gpu_check", "-p", "no:cacheprovider"]
    options += ["-W", "default", "-c", "pyproject.toml", "-o", "addopts=--import-mode=importlib"]
    by_name = all("::" in name for name in machine.tests)  # not worth the start of workers
    runs = [list(machine.tests)]
    if importlib.util.find_spec("xdist") is not None and not by_name:
        options += ["-n", str(min(8, os.cpu_count() or 1))]
    elif not by_name:
        runs = [[name] for name in machine.tests]  # side by side, too
    compiling = {"TORCH_COMPILE_DISABLE": "0", "JAXTYPING_DISABLE": "1"}  # as for users
    compiling["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    outer = {name: value for name, value in os.environ.items() if name != WORKER}
    reads, writes = os.pipe()
    counts, failed = Counter[str](), list[str]()
    with contextlib.ExitStack() as stack:
        outputs = [
            stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in runs
        ]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "pytest", *names, *options],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writes],
                env={**outer, **compiling, "PYTHONPATH": path, ENDED_TESTS: str(writes)},
            )
            for names, output in zip(runs, outputs, strict=True)
        ]
        os.close(writes)
        with os.fdopen(reads) as ended:
            for line in ended:
                outcome, name = line.split(maxsplit=1)
                counts[outcome] += 1
                failed += [name.strip()] if outcome in ("failed", "error") else []
                yield {"counts": dict(counts), "failed": failed}
        errors = ""
        for process, output in zip(processes, outputs, strict=True):
            if process.wait() not in (0, NO_TESTS):
                output.seek(0)
                errors += last_lines(output.read(), 3000 // len(runs)) + "\n"
        if errors or not counts:
            yield {"error": errors or "no tests"}


def pytest_runtest_logreport(report: Any) -> None:
    """Tell ``tests`` of a test that ended; pytest has this file as a plugin."""
    if WORKER in os.environ:  # whose reports come to the first process
        return
    if report.when == "call" or report.outcome != "passed":
        is_error = report.failed and report.when != "call"
        line = f"{'error' if is_error else report.outcome} {report.nodeid}\n"
        os.write(int(os.environ[ENDED_TESTS]), line.encode())


def speed(machine: Machine, *, number: int) -> Found:
    """Environment steps in a second, of whole iterations, in every mode."""
    import torch  # noqa: PLC0415

    num_envs, steps = machine.sizes[number]
    for mode in (*MODES, TF32) if number == 0 else MODES:
        if machine.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        torch.set_float32_matmul_precision("high" if mode == TF32 else "highest")
        iterate, learner, _ = _build(machine, num_envs, steps, "max" if mode == TF32 else mode)
        found = _time(iterate, machine)
        found["steps_per_s"] = num_envs * steps / found["ms"] * 1e3
        yield {mode: found}
        found["stages_ms"] = _stages(learner, steps, machine)
        if machine.on_gpu:
            found["peak_mb"] = torch.cuda.max_memory_allocated() >> 20
        yield {mode: found}
        del iterate, learner
        gc.collect()


def jax(machine: Machine) -> Found:
    """The same iterations in the manner of PureJaxRL."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if not machine.on_gpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if importlib.util.find_spec("jax") is None:
        yield {"not installed": "jax"}
        return
    import jax as library  # noqa: PLC0415
    import purejax  # noqa: PLC0415

    yield {"platform": library.devices()[0].platform}
    first, *others = machine.sizes
    for precision, (num_envs, steps) in [
        ("highest", first),
        *((None, size) for size in (first, *others)),
    ]:
        library.config.update("jax_default_matmul_precision", precision)
        iterate, state = purejax.build(num_envs, steps, machine.epochs, MINIBATCHES)

        def once(iterate: Any = iterate, box: list[Any] = [state]) -> None:  # noqa: B006
            box[0], metrics = iterate(box[0])
            library.block_until_ready((box[0].count, metrics))

        found = _time(once, machine, waits=False)
        found["steps_per_s"] = num_envs * steps / found["ms"] * 1e3
        yield {f"{num_envs} x {steps}{', float32' if precision else ''}": found}


def ahead(machine: Machine) -> Found:
    """Compile what is measured later: seconds of first iterations of all sizes but the first."""

    def first(size: tuple[int, int]) -> float:
        started = time.perf_counter()
        iterate, *_ = _build(machine, *size, "max")
        iterate()
        machine.wait()
        return time.perf_counter() - started

    for size in machine.sizes[1:]:
        yield {f"{size[0]} x {size[1]}": first(size)}


def equal(machine: Machine) -> Found:
    """Three iterations in each mode from the same start: how far weights are from those of off."""
    import torch  # noqa: PLC0415

    num_envs = 64 if machine.on_gpu else 8
    weights: dict[str, list[torch.Tensor]] = {}
    differences: dict[str, list[float]] = {}
    for mode in ("off", "default", "max"):
        iterate, _, policy = _build(machine, num_envs, 16, mode, target_kl=0.05)
        weights[mode] = []
        differences[mode] = []
        for iteration in range(3):
            iterate()
            parts = [parameter.detach().flatten() for parameter in policy.parameters()]
            weights[mode].append(torch.cat(parts).clone())
            difference = weights[mode][iteration] - weights["off"][iteration]
            differences[mode].append(difference.abs().max().item())
            yield {mode: differences[mode]}
    yield from _must({mode: max(found) <= MOST_DIFFERENT for mode, found in differences.items()})


def faults(machine: Machine) -> Found:
    """The death of a graph beside a live one; then a capture that fails, and what follows it."""
    import torch  # noqa: PLC0415

    from esper_lightning.compiling.loops import capture_function  # noqa: PLC0415

    device = torch.device(machine.device)
    # A product that needs a workspace of cuBLAS (pytorch/pytorch#193402).
    rows = torch.randn(32768 if machine.on_gpu else 64, 640 if machine.on_gpu else 8, device=device)
    live, dies = (
        capture_function(name, lambda t, k=k: t.T @ t + k, device=device)
        for k, name in enumerate(("live", "dying"))
    )
    expected = live(rows).clone()
    dies(rows)
    del dies
    gc.collect()
    filled = [torch.full((4 << 20,), float("nan"), device=device) for _ in range(64)]
    seen = {"survives_the_death_of_another_graph": bool(torch.equal(live(rows), expected))}
    yield seen
    del filled
    before = torch.cuda.current_stream().cuda_stream if machine.on_gpu else 0
    x = torch.ones(64, 64, device=device)
    reads = capture_function("reading", lambda t: t @ t * float(t.sum().item()), device=device)
    seen |= {"failed_capture_is_right": bool(torch.equal(reads(x), x @ x * float(x.sum())))}
    yield seen
    after = torch.cuda.current_stream().cuda_stream if machine.on_gpu else 0
    later = capture_function("later", lambda t: t @ t + 1, device=device)
    seen |= {
        "stream_is_restored": before == after,
        "right_afterwards": all(torch.equal(later(x), x @ x + 1) for _ in range(2)),
        "live_graph_still_right": bool(torch.equal(live(rows), expected)),
    }
    yield seen
    seen |= {"still_draws": bool((torch.rand(3, device=device) < 1).all())}
    yield seen
    yield from _must(seen)


def memory(machine: Machine) -> Found:
    """Memory over evaluations of Morphogenesis, and over learners that are built and dropped."""
    import torch  # noqa: PLC0415

    from esper_lightning import MLP  # noqa: PLC0415
    from esper_lightning.envs import Morphogenesis  # noqa: PLC0415
    from esper_lightning.training.evaluation import Evaluation  # noqa: PLC0415
    from esper_lightning.training.settings import PPOSettings  # noqa: PLC0415

    spec = Morphogenesis.synthetic(num_envs=4, epochs=4, **{"train_batches": 2, **_little(machine)})
    device = torch.device(machine.device)
    evaluation = Evaluation(PPOSettings(env=spec, eval_episodes=16 if machine.on_gpu else 2))
    evaluation = evaluation.to(device)
    policy = MLP().build(spec.spaces(), torch.Generator()).to(device)
    held: dict[int, int] = {}
    for count in range(1, machine.evaluations + 1):
        evaluation.play(policy, None, device=device, rank=0)
        evaluation.finish()
        if count in (1, 2, 3, 10, 30, machine.evaluations):
            held[count] = machine.megabytes()
            yield {"mb_after_evaluations": dict(held)}
    del evaluation
    after: list[int] = []
    for _ in range(4 if machine.on_gpu else 2):
        iterate, *_others = _build(machine, 64 if machine.on_gpu else 8, 8, "max")
        iterate()
        del iterate, _others
        after.append(machine.megabytes())
        yield {"mb_after_learners": list(after)}
    gc.collect()
    yield {"mb_after_all": machine.megabytes()}
    yield from _must({"no growth over evaluations": held[machine.evaluations] <= held[2] + 1})


def profiler(machine: Machine) -> Found:
    """Three sessions of a profiler over replayed graphs: each must see kernels."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

    from esper_lightning.recorder.profiling.global_session import global_session  # noqa: PLC0415

    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # as WindowProfiler does
    iterate, *_ = _build(machine, *((256, 8) if machine.on_gpu else (4, 2)), "max")
    iterate()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if machine.on_gpu else [])
    kernels: list[int] = []
    for _ in range(3):
        with profile(activities=kinds, experimental_config=global_session()) as session:
            iterate()
            machine.wait()
        kernels.append(sum(e.device_type.name == "CUDA" for e in session.events() or ()))
        yield {"events_on_the_gpu": list(kernels)}
    yield from _must({"kernels in every session": not machine.on_gpu or min(kernels) > 0})


def growth(machine: Machine, *, compiled: bool = False) -> Found:
    """Seconds of a step of Morphogenesis over numbers of hosts; compiled for the last of them."""
    import torch  # noqa: PLC0415

    from esper_lightning.envs import Morphogenesis  # noqa: PLC0415
    from esper_lightning.envs.morphogenesis.baselines import random_legal  # noqa: PLC0415

    for hosts in machine.hosts[-1:] if compiled else machine.hosts:
        settings = {"compiled": True} if compiled else {}
        spec = Morphogenesis.synthetic(num_envs=hosts, **settings, **_little(machine))
        env = spec.build(torch.device(machine.device), 0)
        env.reset()
        found = _time(lambda env=env: env.step(random_legal(env)), machine)
        yield {str(hosts): found | {"hosts_per_s": hosts / found["ms"] * 1e3}}
        del env
        gc.collect()


def host(machine: Machine) -> Found:
    """Milliseconds of an iteration of a fit in mode max, and whose they are.

    ``gpu`` is the time between the first and the last work of an iteration on the GPU, by events of
    the GPU itself, and ``busy`` that in which kernels run; the rest of an iteration is the share of
    the host. The host needs ``enqueue`` to launch the work, waits for its metrics, and then has the
    GPU idle ``between`` two iterations.
    """
    from esper_lightning import PPO, FlightRecorder, PPOConfig  # noqa: PLC0415
    from esper_lightning.callbacks.history import History  # noqa: PLC0415
    from esper_lightning.envs import CartPole  # noqa: PLC0415
    from esper_lightning.ppo.learner import Learner  # noqa: PLC0415

    rollout, to_host = Learner.rollout, Learner.to_host
    times: list[list[float]] = []  # begun, enqueued, copied; of each iteration
    marks: list[Any] = []  # on the GPU, two of each iteration
    iteration_ms: dict[str, float] = {}

    def begin(self: Any, *args: Any) -> Any:
        times.append([time.perf_counter()])
        marks.append(machine.mark())
        return rollout(self, *args)

    def end(self: Any, *args: Any, **kwargs: Any) -> Any:
        times[-1].append(time.perf_counter())
        marks.append(machine.mark())
        metrics = to_host(self, *args, **kwargs)
        times[-1].append(time.perf_counter())
        return metrics

    Learner.rollout, Learner.to_host = begin, end  # of this process alone
    num_envs, steps = machine.sizes[0]
    ppo = PPOConfig(rollout_steps=steps, epochs=machine.epochs, minibatches=MINIBATCHES)
    env, count = CartPole(num_envs=num_envs), 200 if machine.on_gpu else 8
    for name, records in (("bare", False), ("recorded", True)):
        times.clear(), marks.clear()
        with tempfile.TemporaryDirectory() as folder:
            callbacks = [FlightRecorder(folder), History(folder)] if records else []
            _trainer(machine, callbacks).fit(
                PPO(env, ppo=ppo, total_env_steps=count * num_envs * steps, compile="max")
            )
        machine.wait()
        rows = [
            {
                "iteration": 1e3 * (after[0] - now[0]),
                "enqueue": 1e3 * (now[1] - now[0]),
                "wait": 1e3 * (now[2] - now[1]),
                "between": 1e3 * (after[0] - now[2]),
                "gpu": machine.elapsed(*marks[2 * k : 2 * k + 2]),
            }
            for k, (now, after) in enumerate(itertools.pairwise(times))
        ][count // 4 :]
        found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        iteration_ms[name] = found["iteration"]
        yield {name: found}
    Learner.rollout, Learner.to_host = rollout, to_host
    iterate, *_ = _build(machine, num_envs, steps, "max")
    iterate()
    busy_ms = _busy_ms(iterate, machine)
    yield {"busy": busy_ms}
    yield {"host_share": {name: 1 - busy_ms / whole for name, whole in iteration_ms.items()}}


def _busy_ms(iterate: Callable[[], Any], machine: Machine) -> float:
    """Milliseconds of an iteration in which some kernel runs."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

    kind = ProfilerActivity.CUDA if machine.on_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as session:
        for _ in range(5):
            iterate()
        machine.wait()
    device = "CUDA" if machine.on_gpu else "CPU"
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in session.events() or ()
        if event.device_type.name == device
    )
    busy_us, until = 0.0, float("-inf")
    for start, end in spans:
        busy_us += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy_us / 5e3


def evaluation(machine: Machine) -> Found:
    """Milliseconds of an evaluation: as it is in mode max, and with its stride as a CUDA graph."""
    import torch  # noqa: PLC0415

    from esper_lightning import MLP  # noqa: PLC0415
    from esper_lightning.compiling.loops import compile_loop  # noqa: PLC0415
    from esper_lightning.envs import Pendulum  # noqa: PLC0415
    from esper_lightning.ppo.evaluation import Stride, evaluate_policy  # noqa: PLC0415

    device = torch.device(*(("cuda", 0) if machine.on_gpu else ("cpu",)))
    spec = Pendulum(num_envs=100) if machine.on_gpu else Pendulum(num_envs=2, time_limit=40)
    policy = MLP().build(spec.spaces(), torch.Generator().manual_seed(0)).to(device)
    returns: list[torch.Tensor] = []
    for name in ("as it is", "as a graph"):
        env = spec.build(device, 0)
        stride = Stride(policy, None, env, mode="max", device=device)
        if name == "as a graph":
            stride._loop = compile_loop("evaluation", stride._step, mode="max", device=device)

        def play(env: Any = env, stride: Any = stride) -> Any:
            env.reseed(1)
            return evaluate_policy(policy, lambda obs: obs, env, stride=stride).episode_return

        returns.append(play())
        yield {name: _time(play, machine)}
    # A pendulum multiplies what the last bits of two compilers differ by: the mean must agree.
    worst = ((returns[1] - returns[0]).abs() / returns[0].abs()).max().item()
    means = [returns.mean().item() for returns in returns]
    yield {"difference": worst}
    yield from _must({"the same mean return": abs(means[1] / means[0] - 1) < 1e-3})


def signals(machine: Machine) -> Found:
    """Which library handles SIGTERM in C, after each of the things that a run loads."""
    yield {"inherited": os.environ.get(INHERITED, "")}
    yield {"at the start": c_handler(signal.SIGTERM)}
    import torch  # noqa: PLC0415

    yield {"import torch": c_handler(signal.SIGTERM)}
    torch.zeros(1, device=machine.device)
    yield {"a tensor": c_handler(signal.SIGTERM)}
    import lightning.pytorch  # noqa: F401, PLC0415

    yield {"import lightning": c_handler(signal.SIGTERM)}
    import esper_lightning.recorder.flight_recorder  # noqa: F401, PLC0415

    yield {"import esper_lightning": c_handler(signal.SIGTERM)}
    iterate, *_ = _build(machine, 8, 4, "max")
    iterate()
    yield {"mode max": c_handler(signal.SIGTERM)}
    _busy_ms(iterate, machine)
    yield {"a profile": c_handler(signal.SIGTERM)}
    if importlib.util.find_spec("jax") is not None:
        import jax as library  # noqa: PLC0415

        library.numpy.zeros(1).block_until_ready()
        yield {"jax": c_handler(signal.SIGTERM)}


def c_handler(number: int) -> str:
    """Library and function that the C library calls at a signal."""

    class Info(ctypes.Structure):
        _fields_ = (
            ("file", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("function", ctypes.c_char_p),
            ("address", ctypes.c_void_p),
        )

    libc, action, info = ctypes.CDLL(None), (ctypes.c_void_p * 32)(), Info()
    libc.sigaction(int(number), None, action)
    if (address := action[0] or 0) in (0, 1):
        return ("default", "ignored")[address]
    libc.dladdr(ctypes.c_void_p(address), ctypes.byref(info))
    return f"{(info.file or b'?').decode()}: {(info.function or b'?').decode()}"


def golden(machine: Machine) -> Found:
    """The golden histories of this GPU, as a file to commit; and whether a second run is equal."""
    from importlib.metadata import PackageNotFoundError  # noqa: PLC0415

    from tests.training import golden as histories  # noqa: PLC0415

    device = machine.device
    path = machine.out.resolve() / f"golden-{histories.path_of(device).name}"
    trained: dict[str, object] = {}
    failed = 0
    for config in machine.configs or histories.CONFIGS:
        try:
            versions = histories.versions(config)
            with tempfile.TemporaryDirectory() as folder:
                rows = histories.train(config, device, Path(folder))
            trained[config] = {"versions": versions, "rows": rows}
            histories.write(path, device, trained)
            yield {config: "trained"}
            if len(trained) == 1:
                with tempfile.TemporaryDirectory() as folder:
                    again = histories.train(config, device, Path(folder))
                yield {f"a second run of {config} is equal": again == rows}
        except PackageNotFoundError as error:
            yield {config: f"needs {error.name}"}
        except Exception as error:  # the other configs are worth their time all the same
            failed += 1
            yield {config: last_lines(f"{type(error).__name__}: {error}", 300)}
    yield from _must({"every config trains": failed == 0})


def out_of_memory(machine: Machine) -> Found:
    """A run that dies without memory: its report, its history and its snapshot are on disk."""
    import torch  # noqa: PLC0415
    from lightning.pytorch import Callback  # noqa: PLC0415

    from esper_lightning import PPO, FlightRecorder, PPOConfig  # noqa: PLC0415
    from esper_lightning.callbacks.history import History  # noqa: PLC0415
    from esper_lightning.envs import CartPole  # noqa: PLC0415

    class Takes(Callback):
        """It takes all memory in the third iteration."""

        def on_train_batch_start(self, _: Any, pl_module: Any, *__: Any) -> None:
            if pl_module.iteration == 2:
                if not machine.on_gpu:
                    raise torch.OutOfMemoryError("none left")
                torch.empty(1 << 42, dtype=torch.uint8, device="cuda")

    with tempfile.TemporaryDirectory() as folder:
        died = "nothing"
        try:
            callbacks = [FlightRecorder(folder), History(folder), Takes()]
            _trainer(machine, callbacks).fit(
                PPO(CartPole(num_envs=8), ppo=PPOConfig(rollout_steps=8), compile="max")
            )
        except torch.OutOfMemoryError as error:
            died = type(error).__name__
        rank = Path(folder) / "rank0"
        history = rank / "history.jsonl"
        found = {
            "died_of": died,
            "report": (rank / "crash.json").exists(),
            "rows": len(history.read_text().splitlines()) if history.exists() else 0,
            "snapshot_bytes": sum(path.stat().st_size for path in rank.glob("memory.pickle")),
        }
        yield found
        yield from _must(
            {
                "died_of": died == "OutOfMemoryError",
                "report": found["report"],
                "rows": found["rows"] == 2,
                "snapshot_bytes": found["snapshot_bytes"] > 0 or not machine.on_gpu,
            }
        )


# Measurements.


def _must(holds: dict[str, bool]) -> Found:
    """An error that names what does not hold; nothing if all of it does."""
    if wrong := [name for name, does in holds.items() if not does]:
        yield {"error": f"It must hold, and does not: {', '.join(wrong)}"}


def _little(machine: Machine) -> dict[str, Any]:
    """Settings of small hosts for a rehearsal; none on a GPU."""
    if machine.on_gpu:
        return {}
    layers = {"channels": (8, 8), "kernels": (3, 1), "pools": (4, 1)}
    return {**layers, "train_batches": 1, "batch_size": 8, "validation_size": 16}


def _trainer(machine: Machine, callbacks: list[Any]) -> Any:
    """A Trainer that prints and saves nothing of its own."""
    from lightning.pytorch import Trainer  # noqa: PLC0415

    return Trainer(
        accelerator="gpu" if machine.on_gpu else "cpu",
        devices=1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )


def _build(
    machine: Machine, num_envs: int, steps: int, mode: str, **settings: Any
) -> tuple[Callable[[], Any], Any, Any]:
    """A function that runs an iteration; the learner and the policy."""
    import torch  # noqa: PLC0415

    from esper_lightning import MLP, PPOConfig  # noqa: PLC0415
    from esper_lightning.envs import CartPole  # noqa: PLC0415
    from esper_lightning.ppo.agent import Agent  # noqa: PLC0415
    from esper_lightning.ppo.learner import Learner  # noqa: PLC0415
    from esper_lightning.ppo.optimizer import build_optimizer  # noqa: PLC0415

    device = torch.device(*(("cuda", 0) if machine.on_gpu else ("cpu",)))
    config = PPOConfig(
        rollout_steps=steps, epochs=machine.epochs, minibatches=MINIBATCHES, **settings
    )
    spec = CartPole(num_envs=num_envs)
    policy = MLP().build(spec.spaces(), torch.Generator().manual_seed(0)).to(device)
    acting, order = (torch.Generator(device).manual_seed(seed) for seed in (1, 2))
    learner = Learner(
        spec,
        spec.build(device, 0),
        Agent(policy, None),
        config,
        None,
        exploration=acting,
        sample_order=order,
        mode=mode,  # pyright: ignore[reportArgumentType]
        device=device,
    )
    learner.start(build_optimizer(policy, config), None)

    def iterate() -> dict[str, float]:
        rollout = learner.rollout(steps)
        targets = learner.compute_targets(rollout)
        update = learner.update(targets, learning_rate=3e-4)
        return learner.to_host(rollout, targets, update, iteration=1)

    return iterate, learner, policy


def _time(run: Callable[[], Any], machine: Machine, *, waits: bool = True) -> dict[str, Any]:
    """Milliseconds of a call: the first, the median and the quartiles."""
    wait = machine.wait if waits else lambda: None

    def once() -> float:
        started = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - started

    first = once()
    once()
    seconds: list[float] = []
    end = time.perf_counter() + machine.seconds
    while len(seconds) < 3 or (time.perf_counter() < end and len(seconds) < 500):
        seconds.append(once())
    low, middle, high = statistics.quantiles(seconds, n=4)
    quartiles = [1e3 * low, 1e3 * high]
    return {"first_s": first, "ms": 1e3 * middle, "quartiles_ms": quartiles, "n": len(seconds)}


def _stages(learner: Any, steps: int, machine: Machine) -> dict[str, float]:
    """Milliseconds of each stage, which is waited for."""
    found: list[list[float]] = []
    for _ in range(10 if machine.on_gpu else 2):
        marks = [time.perf_counter()]
        rollout = learner.rollout(steps)
        machine.wait()
        marks.append(time.perf_counter())
        targets = learner.compute_targets(rollout)
        machine.wait()
        marks.append(time.perf_counter())
        learner.update(targets, learning_rate=3e-4)
        machine.wait()
        marks.append(time.perf_counter())
        found.append([1e3 * (end - start) for start, end in itertools.pairwise(marks)])
    names = ("rollout", "advantages", "update")
    return dict(zip(names, map(statistics.median, zip(*found, strict=True)), strict=True))


# The order of the steps, and their processes.


class Step(NamedTuple):
    """A step: its function, its time limit in seconds, and whether it runs alone."""

    run: Callable[[Machine], Found]
    limit_s: float
    alone: bool = True  # because it measures time


def steps_of(machine: Machine) -> dict[str, Step]:
    """All steps by name, the most telling first."""
    names = [f"speed {num_envs} x {steps}" for num_envs, steps in machine.sizes]
    speeds = [Step(partial(speed, number=number), 130) for number in range(len(names))]
    return {
        "about": Step(about, 40),
        names[0]: speeds[0],
        "host": Step(host, 90),
        "jax": Step(jax, 90),
        "tests": Step(tests, 200, alone=False),
        "equal": Step(equal, 150, alone=False),
        "faults": Step(faults, 60, alone=False),
        "signals": Step(signals, 60, alone=False),
        "memory": Step(memory, 200, alone=False),
        "profiler": Step(profiler, 120, alone=False),
        "out of memory": Step(out_of_memory, 120, alone=False),
        "golden": Step(golden, 200, alone=False),
        "ahead": Step(ahead, 200, alone=False),
        **dict(zip(names[1:], speeds[1:], strict=True)),
        "evaluation": Step(evaluation, 60),
        "growth": Step(growth, 90),
        "growth, compiled": Step(partial(growth, compiled=True), 180),
    }


def run_here(name: str, machine: Machine, tell: Callable[[dict[str, Any]], None]) -> None:
    """Run a step in this process; results and warnings are told as soon as they are known."""
    log: list[str] = []

    def note(record: logging.LogRecord) -> None:
        if len(log) < 20:
            log.append(record.getMessage()[:300])
            tell({"log": log})  # a mode that took a slower way measured that way

    handler = logging.Handler(logging.WARNING)
    handler.emit = note
    logging.getLogger("esper_lightning").addHandler(handler)
    for found in steps_of(machine)[name].run(machine):
        tell(found)


def run_apart(
    name: str,
    machine: Machine,
    limit_s: float,
    tell: Callable[[dict[str, Any]], None],
    stop: threading.Event,
) -> None:
    """Run a step in a process of its own; results are told as soon as they are known.

    The process ends at the limit, once ``stop`` is set, or once this process is no more, however it
    ends, with all that it has started: it has a guard.
    """
    command = [sys.executable, GUARD, "--guard"]
    command += [sys.executable, __file__, "--step", name, "--device", machine.device]
    command += ["--out", str(machine.out), "--tests", *machine.tests]
    end = time.monotonic() + limit_s
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        output, errors = folder / "output", folder / "errors"
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stack.enter_context(output.open("w")),
            stderr=stack.enter_context(errors.open("w")),
            start_new_session=True,
        )
        assert process.stdin is not None
        told, rest, ended = stack.enter_context(output.open()), "", ""
        running = True
        while running:
            if not ended and time.monotonic() > end:
                ended = f"no end within {limit_s:.0f} s"
            elif not ended and stop.is_set():
                ended = "ended by a signal"
            if ended:
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
                running = False
            *lines, rest = (rest + told.read()).split("\n")
            for line in lines:
                if line.startswith("RESULT "):
                    tell(json.loads(line.removeprefix("RESULT ")))
        process.stdin.close()
        if ended:
            tell({"error": ended})
        elif process.returncode != 0:
            error = last_lines(errors.read_text(errors="replace"), 3000)
            tell({"status": process.returncode, "error": error})


def guard(command: Sequence[str]) -> int:
    """Run a command until it or standard input ends; then kill everything that it has started.

    Standard input is a pipe, which ends with the process that holds its other end. What has lost
    its parent becomes a child of the guard, and so nothing can leave its family.

    Returns:
        The status of the command.
    """
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    status = None
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while status is None and not select.select([sys.stdin], [], [], 0.05)[0]:
            status = process.poll()
    finally:
        end = time.monotonic() + 10  # the driver of a broken GPU may hold a process for ever
        while (family := descendants(os.getpid())) and time.monotonic() < end:
            for one in family:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(one, signal.SIGKILL)
            time.sleep(0.02)
    if status is None:
        return 128 + signal.SIGKILL
    return status if status >= 0 else 128 - status


def descendants(pid: int) -> list[int]:
    """The living children of a process, their children, and so on."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent = path.read_bytes().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                parents[int(path.parent.name)] = int(parent)
    family = [pid]
    for one in family:  # which grows
        family += [child for child, parent in parents.items() if parent == one]
    return family[1:]


def set_aside(folder: Path) -> None:
    """Rename the results of an earlier run; its log is continued."""
    for path in folder.iterdir():
        if re.fullmatch(r"gpu_check\.(json|md)|golden-\w+-torch-[^-]+\.json", path.name):
            path.rename(path.with_stem(f"{path.stem}-{path.stat().st_mtime_ns}"))


def write(path: Path, text: str) -> None:
    """Write a file in one moment; do nothing where the disk is full: the output has it all."""
    new = path.with_name(f"{path.name}.new")
    with contextlib.suppress(OSError):
        new.write_text(text, encoding="utf-8")
        new.replace(path)


def say(text: str, log: Path) -> None:
    """Print a text, and add it to the log; whichever of the two fails, the other has it."""
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    try:
        print(text, flush=True)
    except OSError:  # whoever read the output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def last_lines(text: str, most: int) -> str:
    """The last whole lines of a text, of at most so many characters; the end of a longer line."""
    lines = text.rstrip().splitlines()
    start = len(lines)
    while start > 0 and sum(len(line) + 1 for line in lines[start - 1 :]) <= most + 1:
        start -= 1
    return "\n".join(lines[start:]) or text.rstrip()[-most:]


def table(results: dict[str, Any], machine: Machine, chosen: Iterable[str] = ()) -> str:
    """The results of the chosen steps as Markdown."""
    sizes = [f"{num_envs} x {steps}" for num_envs, steps in machine.sizes]
    lines = ["# On a GPU" if machine.on_gpu else "# A rehearsal on a CPU, which measures nothing"]
    known = {"gpu": "no GPU", "cuda": "none", **results.get("about", {})}
    if "commit" in known:
        lines += ["", f"- hardware: {known['gpu']}, one of them, {os.cpu_count()} CPU cores"]
        lines += [
            f"- versions: Python {known['python']}, torch {known['torch']}, CUDA {known['cuda']}"
        ]
        lines += [f"- commit: {known['commit']}", "- command: `python scripts/gpu_check.py`"]
        lines += [f"- date: {known['date']}"]
    lines += ["", "Environment steps in a second, of whole iterations.", ""]
    lines += ["| | " + " | ".join(sizes) + " |", "| --- |" + " --- |" * len(sizes)]
    theirs = {f"PureJaxRL style{more}": more for more in (", float32", "")}
    for row in (*sorted((*MODES, TF32)), *theirs):
        cells: list[str] = []
        for size in sizes:
            found = results.get(f"speed {size}", {}).get(row)
            if row in theirs:
                found = results.get("jax", {}).get(f"{size}{theirs[row]}")
            cells.append("-" if found is None else _cell(found))
        lines.append(f"| {row} | {' | '.join(cells)} |")
    goal = f"goal: {GOAL_STEPS_PER_S / 1e6:.0f} M/s"
    for mode, more in (("max", ", float32"), (TF32, "")):
        ours = results.get(f"speed {sizes[0]}", {}).get(mode, {}).get("steps_per_s")
        jax_s = results.get("jax", {}).get(f"{sizes[0]}{more}", {}).get("steps_per_s")
        if ours is not None:
            times = (
                "" if jax_s is None else f"; {ours / jax_s:.2f} x JAX in that precision (goal: 1)"
            )
            lines += ["", f"{sizes[0]}, {mode}: {ours / 1e6:.2f} M/s ({goal}){times}."]
    lines += ["", "| step | result |", "| --- | --- |"]
    for name, found in results.items():
        measures = name.startswith("speed") or (name == "jax" and "not installed" not in found)
        if "error" in found or not measures:
            lines.append(f"| {name} | {_result(found)} |")
    lines += ["", f"Steps that failed: {', '.join(failures(results)) or 'none'}."]
    if waiting := [name for name in chosen if "took_s" not in results.get(name, {})]:
        lines += ["", f"Steps that have not ended: {', '.join(waiting)}."]
    logs = {name: found["log"] for name, found in results.items() if "log" in found}
    lines += ["", "Warnings, such as those of a slower way:", ""]
    lines += [f"* {name}: {log}" for name, log in logs.items()] or ["* none"]
    return "\n".join(lines) + "\n"


def failures(results: dict[str, Any]) -> list[str]:
    """Names of the steps that failed."""
    return [name for name, found in results.items() if "error" in found]


def _result(found: dict[str, Any]) -> str:
    """The results of a step in one cell, the last lines of its error below them."""
    shown = json.dumps({name: value for name, value in found.items() if name != "error"})
    if len(shown) > LONGEST_CELL:
        shown = shown[: shown.rindex(", ", 0, LONGEST_CELL)] + ", ..."
    error = last_lines(found.get("error", ""), LONGEST_ERROR).splitlines()
    error = [line.strip() for line in error if line.strip(" ^~")]
    return "<br>".join(f"`{line}`" for line in (shown, *error)).replace("|", "\\|")


def _cell(found: dict[str, Any]) -> str:
    return f"{found['steps_per_s']:,.0f} ({found['ms']:.2f} ms; first {found['first_s']:.1f} s)"


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--out", type=Path, default=Path(), help="folder of the results")
    options.add_argument("--seconds", type=float, default=550.0, help="time of all steps")
    options.add_argument("--device", choices=list(MACHINES), default="cuda")
    options.add_argument("--patience", type=float, default=1.0, help="factor on limits of steps")
    options.add_argument("--only", nargs="+", default=[""], help="beginnings of names of steps")
    options.add_argument("--skip", nargs="+", default=[], help="names of steps to leave out")
    options.add_argument("--tests", nargs="+", help="tests in place of those that need a GPU")
    options.add_argument("--step", help="run one step, and print its results as JSON")
    options.add_argument("--guard", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps within the time, and write the results as they come; the exit status."""
    given = parser().parse_args(arguments)
    if given.guard is not None:
        return guard(given.guard)
    machine = MACHINES[given.device]._replace(out=given.out)
    if given.tests is not None:
        machine = machine._replace(tests=given.tests)
    if given.step is not None:
        run_here(given.step, machine, lambda one: print("RESULT", json.dumps(one), flush=True))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    end, results, lock = time.monotonic() + given.seconds, dict[str, Any](), threading.Lock()
    log, stop, signals = given.out / "log.txt", threading.Event(), list[int]()
    signal.alarm(int(given.seconds) + 30)  # which ends this process even where Python is stuck
    set_aside(given.out)

    def end_steps(number: int, _: object) -> None:
        signals.append(number)
        stop.set()

    os.environ[INHERITED] = c_handler(signal.SIGTERM)  # such as "ignored", which children inherit
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_steps)

    def shown() -> str:
        try:
            return table(results, machine, chosen)
        except Exception as error:  # which must not cost a measurement
            return f"There is no table: {type(error).__name__}: {error}\n"

    def keep(name: str, found: dict[str, Any]) -> None:
        with lock:
            results.setdefault(name, {}).update(found)
            write(given.out / "gpu_check.json", json.dumps(results, indent=1))
            write(given.out / "gpu_check.md", shown())

    def run(name: str, step: Step) -> None:
        started = time.monotonic()
        limit_s = min(step.limit_s * given.patience, end - started)
        if stop.is_set():
            return
        if limit_s < 10:
            keep(name, {"error": "no time left"})
        else:
            try:
                run_apart(name, machine, limit_s, partial(keep, name), stop)
            except Exception as error:  # the other steps are worth their time all the same
                keep(name, {"error": f"{type(error).__name__}: {error}"})
        keep(name, {"took_s": round(time.monotonic() - started, 1)})
        say(f"{name} {_result(results[name])}", log)

    chosen = {
        name: step
        for name, step in steps_of(machine).items()
        if name not in given.skip and name.startswith(tuple(given.only))
    }
    for alone, group in itertools.groupby(chosen.items(), lambda one: one[1].alone):
        with ThreadPoolExecutor(1 if alone else len(chosen)) as pool:
            list(pool.map(lambda one: run(*one), group))
    say(shown(), log)
    failed = failures(results)
    say(f"failed: {', '.join(failed) or 'nothing'}", log)
    return 128 + signals[0] if signals else int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
