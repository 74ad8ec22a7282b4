"""Contenders of the throughput benchmark: each runs one PPO iteration of CartPole after the other.

Actor and critic have two hidden layers of 64 (tanh); an update has 4 epochs of 4 minibatches. Run
as a worker, a contender is built, runs one iteration, and then as many as each line of the standard
input asks for. A worker answers with a JSON line: for each iteration the seconds of its stages, or
of the whole.
``--smallest`` runs an iteration of every contender in one process instead.
"""

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "peers"))
EPOCHS, MINIBATCHES, HIDDEN, OBS, ACTIONS = 4, 4, 64, 4, 2
STAGES = ("rollout", "advantages", "update", "copy to the host")
Seconds = list[list[float]]
"""For each iteration those of its stages, or of the whole."""
Iteration = Callable[[], Sequence[float] | None]
"""A function that runs an iteration, and returns the seconds of its stages if these are known."""


class Caller(NamedTuple):
    """The source of requests for iterations, and the function that reports their seconds."""

    counts: Iterator[int]
    answer: Callable[[Seconds], None]


def in_trainer(
    size: argparse.Namespace,
    caller: Caller,
    *,
    mode: str = "auto",
    records: bool = True,
    profiler: str | None = None,
) -> None:
    """Run ``Trainer.fit`` as ``esper fit`` does: loggers, history, bar, checkpoints, recorder."""
    from lightning.pytorch import Callback, Trainer  # noqa: PLC0415
    from lightning.pytorch.loggers import TensorBoardLogger  # noqa: PLC0415

    from esper_lightning import PPO, PPOConfig  # noqa: PLC0415
    from esper_lightning.envs import CartPole  # noqa: PLC0415
    from esper_lightning.recorder.profiling.window_profiler import WindowProfiler  # noqa: PLC0415
    from esper_lightning.train import run_callbacks  # noqa: PLC0415

    class Clock(Callback):
        """A callback that serves one request after the other, from within the run."""

        def __init__(self) -> None:
            self.left, self.started, self.seconds = 1, time.perf_counter(), Seconds()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.seconds.append([time.perf_counter() - self.started])
            self.left -= 1
            if self.left == 0:
                caller.answer(self.seconds)
                self.left, self.seconds = next(caller.counts, 0), []
                if self.left == 0:
                    trainer.should_stop = True
            self.started = time.perf_counter()

    windows = {
        None: lambda: None,
        "waiting": lambda: WindowProfiler(wait=10**9),
        "recording": lambda: WindowProfiler(wait=0, warmup=0, active=1, repeat=0, keep=2),
    }
    with tempfile.TemporaryDirectory() as directory:
        Trainer(
            accelerator="cpu",
            max_epochs=-1,
            logger=TensorBoardLogger(directory, name="", version=""),
            enable_model_summary=False,
            limit_val_batches=0,
            profiler=windows[profiler](),
            callbacks=[*run_callbacks(evaluates=False, records=records), Clock()],
        ).fit(
            PPO(
                CartPole(num_envs=size.num_envs),
                ppo=PPOConfig(rollout_steps=size.steps, epochs=EPOCHS, minibatches=MINIBATCHES),
                compile="off" if size.eager else mode,  # pyright: ignore[reportArgumentType]
            )
        )


def in_loop(
    size: argparse.Namespace,
    caller: Caller,
    *,
    build: Callable[[argparse.Namespace], Iteration],
) -> None:
    """Run iterations in a plain loop."""
    iterate = build(size)
    count = 1
    while count:
        seconds = Seconds()
        for _ in range(count):
            started = time.perf_counter()
            stages = iterate()
            seconds.append(list(stages or [time.perf_counter() - started]))
        caller.answer(seconds)
        count = next(caller.counts, 0)


def bare(size: argparse.Namespace) -> Iteration:
    """The computation of this package in a plain loop, without Trainer, history or recorder."""
    import torch  # noqa: PLC0415

    from esper_lightning import MLP, PPOConfig  # noqa: PLC0415
    from esper_lightning.envs import CartPole  # noqa: PLC0415
    from esper_lightning.ppo.agent import Agent  # noqa: PLC0415
    from esper_lightning.ppo.learner import Learner  # noqa: PLC0415
    from esper_lightning.ppo.metrics import to_host  # noqa: PLC0415
    from esper_lightning.ppo.optimizer import build_optimizer  # noqa: PLC0415

    device = torch.device("cpu")
    spec = CartPole(num_envs=size.num_envs)
    config = PPOConfig(rollout_steps=size.steps, epochs=EPOCHS, minibatches=MINIBATCHES)
    policy = MLP().build(spec.spaces(), torch.Generator().manual_seed(0))
    learner = Learner(
        spec,
        spec.build(device, 0),
        Agent(policy, None),
        config,
        None,
        exploration=torch.Generator().manual_seed(1),
        sample_order=torch.Generator().manual_seed(2),
        mode="off" if size.eager else "auto",
        device=device,
    )
    learner.start(build_optimizer(policy, config), None)

    def iterate() -> list[float]:
        marks = [time.perf_counter()]
        rollout = learner.rollout(size.steps)
        marks.append(time.perf_counter())
        targets = learner.compute_targets(rollout)
        marks.append(time.perf_counter())
        metrics = learner.update(targets, learning_rate=3e-4)
        marks.append(time.perf_counter())
        to_host(learner.metrics(targets, metrics))
        marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]

    return iterate


def arithmetic(size: argparse.Namespace) -> Iteration:
    """Only the matrix products and ``tanh`` of an iteration, computed by torch."""
    import torch  # noqa: PLC0415

    batch = size.num_envs * size.steps
    minibatch = batch // MINIBATCHES

    def layers(rows: int, outputs: int) -> Any:
        shapes = [(OBS, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, outputs)]
        return [(torch.randn(rows, i), torch.randn(i, o), torch.empty(rows, o)) for i, o in shapes]

    def forward(net: Any) -> None:
        for number, (x, weight, out) in enumerate(net):
            torch.mm(x, weight, out=out)
            if number < 2:
                torch.tanh(out, out=out)

    def backward(net: Any) -> None:
        for number, (x, weight, out) in reversed(list(enumerate(net))):
            torch.mm(x.t(), out)
            if number > 0:
                torch.mm(out, weight.t())

    acting, valuing = layers(size.num_envs, ACTIONS), layers(min(batch, 2048), 1)
    actor, critic = layers(minibatch, ACTIONS), layers(minibatch, 1)

    def iterate() -> None:
        for _ in range(size.steps):
            forward(acting)
        for _ in range(2 * batch // min(batch, 2048)):  # values of both ends of every step
            forward(valuing)
        for _ in range(EPOCHS * MINIBATCHES):
            for net in (actor, critic):
                forward(net)
                backward(net)

    return iterate


def jax(size: argparse.Namespace) -> Iteration:
    """An iteration in JAX, in the manner of PureJaxRL."""
    import jax as library  # noqa: PLC0415
    import purejax  # noqa: PLC0415

    step, state = purejax.build(size.num_envs, size.steps, EPOCHS, MINIBATCHES)
    held = [state]

    def iterate() -> None:
        held[0], metrics = step(held[0])
        library.block_until_ready((held[0].params, metrics))

    return iterate


def peer(
    size: argparse.Namespace, *, module: str, function: str = "build", compiles: bool = False
) -> Iteration:
    """Another library's trainer, on the same batched environments."""
    build = getattr(importlib.import_module(module), function)
    compiling = {"compile": True} if compiles and not size.eager else {}
    sizes = (size.num_envs, size.steps, EPOCHS, MINIBATCHES)
    return build(*sizes, threads=size.threads, **compiling)


class Contender(NamedTuple):
    """A function that runs a contender, and the names of packages that the contender imports."""

    run: Callable[[argparse.Namespace, Caller], None]
    needs: tuple[str, ...] = ()

    @property
    def absent(self) -> list[str]:
        """Packages of a contender that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def _peer(*needs: str, **settings: Any) -> Contender:
    return Contender(partial(in_loop, build=partial(peer, **settings)), needs)


CONTENDERS: dict[str, Contender] = {
    "esper": Contender(in_trainer),
    "esper, off": Contender(partial(in_trainer, mode="off")),
    "esper, no recorder": Contender(partial(in_trainer, records=False)),
    "esper, profiler waits": Contender(partial(in_trainer, profiler="waiting")),
    "esper, profiler records": Contender(partial(in_trainer, profiler="recording")),
    "esper, bare loop": Contender(partial(in_loop, build=bare)),
    "library arithmetic alone": Contender(partial(in_loop, build=arithmetic)),
    "PureJaxRL style (JAX)": Contender(partial(in_loop, build=jax), ("jax",)),
    "stable-baselines3, batched env": _peer("stable_baselines3", module="sb3"),
    "stable-baselines3, Gymnasium": _peer(
        "stable_baselines3", "gymnasium", module="sb3", function="build_gymnasium"
    ),
    "rsl_rl": _peer("rsl_rl", "tensordict", module="rsl_rl_peer"),
    "rsl_rl, its compile on": _peer("rsl_rl", "tensordict", module="rsl_rl_peer", compiles=True),
    "skrl": _peer("skrl", "gymnasium", module="skrl_peer"),
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("name", nargs="?", choices=list(CONTENDERS))
    parser.add_argument("--num-envs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--smallest", action="store_true", help="an iteration of every contender")
    return parser


def run_each(size: argparse.Namespace) -> None:
    """Run an iteration of every installed contender, and one more by a request."""
    size.eager = True
    for name, contender in CONTENDERS.items():
        if contender.absent:
            print(f"{name}: not installed: {', '.join(contender.absent)}", flush=True)
            continue
        heard: list[Seconds] = []
        with contextlib.redirect_stdout(sys.stderr):
            contender.run(size, Caller(iter((1,)), heard.append))
        assert [len(seconds) for seconds in heard] == [1, 1], name
        print(f"{name}: {sum(heard[1][0]) * 1e3:.1f} ms", flush=True)


def main() -> None:
    options = parser().parse_args()
    import torch  # noqa: PLC0415

    torch.set_num_threads(options.threads)
    if options.smallest:
        run_each(options)
        return
    answers = sys.stdout
    counts = iter(lambda: int(sys.stdin.readline().strip() or 0), 0)
    answer = lambda seconds: print(json.dumps(seconds), file=answers, flush=True)  # noqa: E731
    with contextlib.redirect_stdout(sys.stderr):  # libraries print
        CONTENDERS[options.name].run(options, Caller(counts, answer))


if __name__ == "__main__":
    main()
