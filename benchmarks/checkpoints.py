"""The cost of checkpoints: to write, to read, and as a share of a run.

The task is CartPole, with an actor and a critic of two layers of 64, on one thread. Ways to write
(and to read) are measured in turn within one process; results are medians over rounds. An epoch of
50 iterations writes ``last.ckpt``, and ``best.ckpt`` where the evaluation was the best so far.
Writes ``results/checkpoints.md``.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conditions import benchmark_parser, results
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import CheckpointIO, TorchCheckpointIO
from typing_extensions import override

from esper_lightning import PPO, AtomicCheckpointIO, PPOConfig
from esper_lightning.envs import CartPole
from esper_lightning.training.checkpoint.files import read_checkpoint

EPOCH = 50


class Size(NamedTuple):
    """The size of a run whose checkpoint is measured, and the number of timed iterations."""

    num_envs: int
    steps: int
    iterations: int


SIZES = [Size(4, 128, 200), Size(64, 32, 200), Size(2048, 32, 30), Size(65_536, 8, 12)]


class Nowhere(TorchCheckpointIO):
    """A way to save that writes nothing, so that only collecting the state takes time."""

    @override
    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        pass


def row(size: Size, options: argparse.Namespace) -> str:
    """Measure one size, and return its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, iteration_ms = trained(size, folder)
        ours, theirs = Path(folder) / "ours.ckpt", Path(folder) / "theirs.ckpt"
        ways: dict[str, Callable[[], object]] = {
            "write": lambda: save(trainer, AtomicCheckpointIO(), ours),
            "lightning": lambda: save(trainer, TorchCheckpointIO(), theirs),
            "collect": lambda: save(trainer, Nowhere(), theirs),
            "read": lambda: read_checkpoint(ours),
            "load": lambda: torch.load(ours, map_location="cpu", weights_only=True),
        }
        times: dict[str, list[float]] = defaultdict(list)
        for number in range(options.rounds + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                if number > 0:  # the first one warms up
                    times[name].append((time.perf_counter() - started) * 1e3)
        kilobytes = ours.stat().st_size / 1e3
    ms = {name: statistics.median(values) for name, values in times.items()}
    low, _, high = statistics.quantiles(times["write"], n=4)
    share = 2 * ms["write"] / (EPOCH * iteration_ms)
    cells = (f"{size.num_envs:,} x {size.steps}", f"{kilobytes:,.0f}", f"{ms['write']:.1f}")
    cells += (f"{low:.1f} to {high:.1f}", f"{ms['collect']:.1f}", f"{ms['lightning']:.1f}")
    cells += (f"{ms['read']:.1f}", f"{ms['load']:.1f}", f"{iteration_ms:.1f}", f"{share:.2%}")
    return f"| {' | '.join(cells)} |"


def trained(size: Size, folder: str) -> tuple[Trainer, float]:
    """A Trainer after some iterations, and the time of the fastest."""
    ppo = PPOConfig(rollout_steps=size.steps, normalize_obs=True)
    model = PPO(CartPole(num_envs=size.num_envs), ppo=ppo)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=size.iterations,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    times: list[float] = []
    training_step = model.training_step

    def timed(batch: int, batch_idx: int) -> object:
        started = time.perf_counter()
        output = training_step(batch, batch_idx)
        times.append((time.perf_counter() - started) * 1e3)
        return output

    model.training_step = timed
    trainer.fit(model)
    return trainer, min(times)


def save(trainer: Trainer, checkpoint_io: CheckpointIO, path: Path) -> None:
    trainer.strategy.checkpoint_io = checkpoint_io
    trainer.save_checkpoint(path)


def parser() -> argparse.ArgumentParser:
    smallest = {"rounds": 2, "sizes": [Size(4, 8, 2)]}
    parser = benchmark_parser(__doc__, smallest)
    parser.add_argument("--rounds", type=int, default=30)
    parser.set_defaults(sizes=SIZES)
    return parser


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(1)
    heads = ("environments x steps", "KB", "write, ms", "quartiles", "of which collecting")
    heads += ("Lightning's own, ms", "read, ms", "torch.load, ms", "fastest iteration, ms")
    heads += ("of an epoch",)
    with results(__file__, options, threads="one thread, shared with other work") as files:
        lines = [row(size, options) for size in options.sizes]
        files.write(
            "What checkpoints cost",
            [
                f"Medians of {options.rounds} rounds. *Write*: collecting the state from Trainer",
                "and module, serialising, flushing to the disk, renaming. *Read*: with checksums.",
                f"*Of an epoch*: two writes (`last.ckpt` and `best.ckpt`) against {EPOCH} times",
                "the fastest iteration; the evaluation is not counted to the epoch.",
                "",
                f"| {' | '.join(heads)} |",
                "| --- " * len(heads) + "|",
                *lines,
            ],
        )


if __name__ == "__main__":
    main()
