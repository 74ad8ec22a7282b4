"""``esper fit --dry_run``: what a run would do and take, without beginning it."""

import math
from pathlib import Path

from lightning.pytorch import Trainer

from esper_lightning.callbacks.logger_folders import numbered_logger
from esper_lightning.callbacks.mirror import place_of
from esper_lightning.core.buffer import rollout_bytes
from esper_lightning.envs.base import spec_name
from esper_lightning.training.module import PPO

__all__ = ["plan"]

_STATES_OF_ADAM = 2  # tensors of the optimizer for each parameter


def plan(
    model: PPO, trainer: Trainer, *, resumes_from: int, run_dir: str | Path | None
) -> list[str]:
    """The lines that describe a run.

    Args:
        model: Model of the run.
        trainer: Trainer of the run.
        resumes_from: Iterations in the checkpoint that the run resumes from; 0 for a new run.
        run_dir: The run directory, if it is known; otherwise the folder of a logger may be.
    """
    settings, ppo, ranks = model.settings, model.settings.ppo, trainer.world_size
    batch = ppo.rollout_steps * settings.env.num_envs
    each = f"{settings.env.num_envs:,} environments x {ppo.rollout_steps:,} steps"
    budget, iterations = settings.total_env_steps, "iterations until the Trainer stops"
    if budget is not None:
        iterations = f"{math.ceil(budget / (batch * ranks)):,} iterations to {budget:,} env steps"
    parameters = [p for p in model.parameters() if p.requires_grad]
    count, size = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
    taken = rollout_bytes(model.env_spaces, ppo.rollout_steps, settings.env.num_envs)
    facts = {
        "Task": spec_name(settings.env),
        "Ranks": f"{ranks} on {trainer.strategy.root_device.type}, compile {settings.compile}",
        "Iteration": f"{each} = {batch:,} env steps on each rank",
        "Update": f"{ppo.epochs} epochs of {ppo.minibatches} minibatches "
        f"of {batch // ppo.minibatches:,} samples",
        "Length": iterations,
        "Policy": f"{count:,} parameters, {_size(size * (1 + _STATES_OF_ADAM))} with Adam's state",
        "Rollout": f"{_size(taken)} on each rank, simulator and activations not counted",
        "Begins": f"after iteration {resumes_from:,}" if resumes_from else "anew",
        "Directory": _directory(trainer, run_dir),
    }
    return [f"{name + ':':<11}{text}" for name, text in facts.items()]


def _directory(trainer: Trainer, run_dir: str | Path | None) -> str:
    logger = numbered_logger(trainer)
    path = run_dir if run_dir is not None or logger is None else logger.log_dir
    if path is None:
        return "chosen when the run begins"
    state = "exists" if place_of(path)[0].exists() else "new"
    return f"{path} ({state})"


def _size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
