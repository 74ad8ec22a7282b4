"""What is compared: each contender builds a callable that runs one PPO iteration of CartPole.

Two hidden layers of 64 (tanh), actor and critic; 4 epochs of 4 minibatches. Run as a worker, it
builds, says ``ready``, and then times as many iterations as each line of its input asks for.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))
EPOCHS, MINIBATCHES, HIDDEN, OBS, ACTIONS = 4, 4, 64, 4, 2
Iteration = Callable[[], None]


def ours_in_trainer(
    size: argparse.Namespace, mode: str, *, records: bool = True, profiler: str | None = None
) -> None:
    """``Trainer.fit`` as ``esper fit`` has it: loggers, history, bar, checkpoints, recorder."""
    from lightning.pytorch import Callback, Trainer  # noqa: PLC0415
    from lightning.pytorch.loggers import TensorBoardLogger  # noqa: PLC0415

    from esper_lightning import PPO, PPOConfig  # noqa: PLC0415
    from esper_lightning.callbacks.window_profiler import WindowProfiler  # noqa: PLC0415
    from esper_lightning.envs import CartPole  # noqa: PLC0415
    from esper_lightning.train import run_callbacks  # noqa: PLC0415

    class Clock(Callback):
        """Serves one request after the other, from within the run."""

        def __init__(self) -> None:
            self.left, self.started, self.times = 0, 0.0, list[float]()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            now = time.perf_counter()
            self.times.append(now - self.started)
            self.left -= 1
            if self.left <= 0:
                answer(self.times)
                self.left, self.times = request(), []
                if self.left == 0:
                    trainer.should_stop = True
                now = time.perf_counter()
            self.started = now

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
                compile=mode,  # pyright: ignore[reportArgumentType]
            )
        )


def ours_bare(size: argparse.Namespace, mode: str, marks: list[float] | None = None) -> Iteration:
    """The same computation in a plain loop, without Trainer, history or recorder.

    ``marks`` receives the time after each part of the last iteration.
    """
    import torch  # noqa: PLC0415

    from esper_lightning import MLP, PPOConfig  # noqa: PLC0415
    from esper_lightning.envs import CartPole  # noqa: PLC0415
    from esper_lightning.training.agent import Agent  # noqa: PLC0415
    from esper_lightning.training.learner import Learner  # noqa: PLC0415
    from esper_lightning.training.metrics import to_host  # noqa: PLC0415
    from esper_lightning.training.update import build_optimizer  # noqa: PLC0415

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
        mode=mode,  # pyright: ignore[reportArgumentType]
        device=device,
    )
    learner.start(build_optimizer(policy, config), None)

    def iterate() -> None:
        times = [time.perf_counter()]
        rollout = learner.rollout(size.steps)
        times.append(time.perf_counter())
        prepared = learner.advantages(rollout)
        times.append(time.perf_counter())
        metrics = learner.update(prepared, learning_rate=3e-4)
        times.append(time.perf_counter())
        to_host(prepared.healthy, prepared.episodes, prepared.explained_variance, *metrics)
        times.append(time.perf_counter())
        if marks is not None:
            marks[:] = times

    return iterate


def arithmetic(size: argparse.Namespace) -> Iteration:
    """Matrix products and ``tanh`` of an iteration by the library, and nothing else."""
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
        for _ in range(2 * batch // min(batch, 2048)):  # of both ends of every step
            forward(valuing)
        for _ in range(EPOCHS * MINIBATCHES):
            for net in (actor, critic):
                forward(net)
                backward(net)

    return iterate


def jax(size: argparse.Namespace) -> Iteration:
    """PureJaxRL's way."""
    import jax as library  # noqa: PLC0415
    import purejax  # noqa: PLC0415

    step, state = purejax.build(size.num_envs, size.steps, EPOCHS, MINIBATCHES)
    held = [state]

    def iterate() -> None:
        held[0], figures = step(held[0])
        library.block_until_ready((held[0].params, figures))

    return iterate


def peer(module: str, function: str = "build", **options: Any) -> Callable[..., Iteration]:
    """Another library's trainer, on the same batched environments."""

    def build(size: argparse.Namespace) -> Iteration:
        builder = getattr(__import__(module), function)
        sizes = (size.num_envs, size.steps, EPOCHS, MINIBATCHES)
        return builder(*sizes, threads=size.threads, **options)

    return build


IN_TRAINER: dict[str, dict[str, Any]] = {
    "esper, max": {"mode": "max"},
    "esper, default": {"mode": "default"},
    "esper, off": {"mode": "off"},
    "esper, max, no recorder": {"mode": "max", "records": False},
    "esper, max, profiler waits": {"mode": "max", "profiler": "waiting"},
    "esper, max, profiler records": {"mode": "max", "profiler": "recording"},
}
IN_LOOP: dict[str, Callable[[argparse.Namespace], Iteration]] = {
    "esper, max, bare loop": lambda size: ours_bare(size, "max"),
    "library arithmetic alone": arithmetic,
    "PureJaxRL style (JAX)": jax,
    "stable-baselines3, batched env": peer("sb3"),
    "stable-baselines3, Gymnasium": peer("sb3", "build_gymnasium"),
    "rsl_rl": peer("rsl_rl_peer"),
    "rsl_rl, its compile on": peer("rsl_rl_peer", compile=True),
    "skrl": peer("skrl_peer"),
}


def request() -> int:
    """How many iterations are asked for; 0 for the end."""
    line = sys.stdin.readline().strip()
    return int(line) if line else 0


def answer(times: list[float]) -> None:
    """Tell how long each took."""
    print(json.dumps(times), file=_OUT, flush=True)


_OUT = sys.stdout


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries print; the answers are to stand alone on standard output."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--num-envs", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    size = parser.parse_args()
    import torch  # noqa: PLC0415

    torch.set_num_threads(size.threads)
    with quiet():
        if size.name in IN_TRAINER:
            ours_in_trainer(size, **IN_TRAINER[size.name])
            return
        iterate = IN_LOOP[size.name](size)
        started = time.perf_counter()
        iterate()
        answer([time.perf_counter() - started])
        while count := request():
            times: list[float] = []
            for _ in range(count):
                started = time.perf_counter()
                iterate()
                times.append(time.perf_counter() - started)
            answer(times)


if __name__ == "__main__":
    main()
