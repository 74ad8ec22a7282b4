"""What checkpoints cost: to write, to read, and of a run. Writes ``results/checkpoints_<name>.md``.

CartPole, an actor and a critic of two layers of 64, one thread. Ways to write (and to read) follow
each other in turn within one process; medians over rounds. An epoch of 50 iterations writes
``last.ckpt``, and ``best.ckpt`` where the evaluation was the best so far.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from conditions import ROOT, conditions
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchCheckpointIO

from esper_lightning import PPO, AtomicCheckpointIO, PPOConfig
from esper_lightning.envs import CartPole
from esper_lightning.training.checkpoint_io import read_checkpoint

_EPOCH = 50
# Environments, steps: iterations.
_SIZES = {(4, 128): 200, (64, 32): 200, (2048, 32): 30, (65_536, 8): 12}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", help="of the machine and day, for the results file")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [row(*size, iterations, arguments.rounds) for size, iterations in _SIZES.items()]
    heads = ("environments x steps", "KB", "write, ms", "quartiles", "of which collecting")
    heads += (
        "Lightning's own, ms",
        "read, ms",
        "torch.load, ms",
        "fastest iteration, ms",
        "of an epoch",
    )
    command = f"python benchmarks/checkpoints.py {arguments.name} --rounds {arguments.rounds}"
    text = [
        "# What checkpoints cost",
        "",
        conditions(command, "one thread, shared with other work"),
        "",
        f"Medians of {arguments.rounds} rounds. *Write*: collecting the state from Trainer and",
        "module, serialising, flushing to the disk, renaming. *Read*: with checksums.",
        f"*Of an epoch*: two writes (`last.ckpt` and `best.ckpt`) against {_EPOCH} times the",
        'fastest iteration with `compile="max"`; the evaluation is not counted to the epoch.',
        "",
        f"| {' | '.join(heads)} |",
        "| --- " * len(heads) + "|",
        *lines,
    ]
    path = ROOT / "benchmarks" / "results" / f"checkpoints_{arguments.name}.md"
    path.write_text("\n".join(text) + "\n")
    print("\n".join(text))


def row(num_envs: int, steps: int, iterations: int, rounds: int) -> str:
    """Measure one size."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, iteration_ms = trained(num_envs, steps, iterations, folder)
        ours, theirs = Path(folder) / "ours.ckpt", Path(folder) / "theirs.ckpt"
        ways: dict[str, Callable[[], object]] = {
            "write": lambda: save(trainer, AtomicCheckpointIO(), ours),
            "lightning": lambda: save(trainer, TorchCheckpointIO(), theirs),
            "collect": trainer._checkpoint_connector.dump_checkpoint,
            "read": lambda: read_checkpoint(ours),
            "load": lambda: torch.load(ours, map_location="cpu", weights_only=True),
        }
        times: dict[str, list[float]] = defaultdict(list)
        for number in range(rounds + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                if number > 0:  # the first one warms up
                    times[name].append((time.perf_counter() - started) * 1e3)
        size = ours.stat().st_size
    ms = {name: statistics.median(values) for name, values in times.items()}
    low, _, high = statistics.quantiles(times["write"], n=4)
    share = 2 * ms["write"] / (_EPOCH * iteration_ms)
    cells = (f"{num_envs:,} x {steps}", f"{size / 1e3:,.0f}", f"{ms['write']:.1f}")
    cells += (f"{low:.1f} to {high:.1f}", f"{ms['collect']:.1f}", f"{ms['lightning']:.1f}")
    cells += (f"{ms['read']:.1f}", f"{ms['load']:.1f}", f"{iteration_ms:.1f}", f"{share:.2%}")
    return f"| {' | '.join(cells)} |"


def trained(num_envs: int, steps: int, iterations: int, folder: str) -> tuple[Trainer, float]:
    """A Trainer after some iterations, and the time of the fastest."""
    ppo = PPOConfig(rollout_steps=steps, normalize_obs=True)
    model = PPO(CartPole(num_envs=num_envs), ppo=ppo, compile="max")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=iterations,
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


def save(trainer: Trainer, checkpoint_io: TorchCheckpointIO, path: Path) -> None:
    trainer.strategy.checkpoint_io = checkpoint_io
    trainer.save_checkpoint(path)


if __name__ == "__main__":
    main()
