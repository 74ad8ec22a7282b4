"""Everything that PPO needs of Lightning's Trainer beyond its hooks.

This file refuses Trainer settings that do not work, and counts iterations as the Trainer's steps.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from esper_lightning.callbacks.lightning_internals import (
    batches_in_epoch,
    cluster_environment,
    monitors_cpu,
    spawns_processes,
    summary_depth,
    time_between_evaluations,
    train_time_interval,
)
from esper_lightning.callbacks.mirror import require_writable
from esper_lightning.callbacks.profiler_internals import record_no_module_names
from esper_lightning.compiling.loops import CompileMode
from esper_lightning.core.buffer import memory_bytes, rollout_bytes
from esper_lightning.core.errors import Words, at_least, one_of, require, require_name
from esper_lightning.core.paths import require_output_folder
from esper_lightning.core.seeding import require_torch_defaults
from esper_lightning.training.monitors import refuse_monitors
from esper_lightning.training.progress import Progress
from esper_lightning.training.settings import PPOSettings
from esper_lightning.training.specs import evaluation_spec

__all__ = [
    "count_step",
    "keep_lightning_from_requeueing",
    "keep_profilers_from_slowing",
    "planned_env_steps",
    "refuse_trainer",
    "silence_lightning",
]

_log = logging.getLogger(__name__)
_PRECISIONS = ("32-true", "bf16-mixed")
_DEVICES = ("cpu", "cuda")
_LONGEST_NAME = 200  # bytes of the name of a checkpoint, which is longer while it is written
_LOG_ONLY = (DeviceStatsMonitor, LearningRateMonitor)


def refuse_trainer(
    trainer: Trainer, settings: PPOSettings, *, fits: bool = True, logs_more: bool = False
) -> None:
    """Refuse a Trainer with which PPO would give wrong results, or could not start.

    Args:
        trainer: The Trainer before it runs.
        settings: Settings of the module.
        fits: Whether the module will be trained; False if it will only be evaluated.
        logs_more: Whether the module may log metrics of its own.

    Raises:
        ValueError: If a setting does not work. The error names the setting and what to use instead.
        MisconfigurationException: If a share of an epoch is less than one batch.
    """
    require_torch_defaults("PPO")
    _refuse_settings(trainer, settings.total_env_steps)
    for callback in trainer.callbacks:
        _refuse_callback(callback)
    _refuse_strategy(trainer)
    hint = "PPO sums in float64, which other devices lack: set Trainer(accelerator='cpu')."
    one_of("Trainer.accelerator", trainer.strategy.root_device.type, _DEVICES, hint)
    _refuse_too_large(trainer, settings)
    if fits:
        _refuse_unfit(trainer, settings)
        refuse_monitors(trainer, settings, logs_more=logs_more)


def _refuse_settings(trainer: Trainer, budget: int | None) -> None:
    """Refuse settings of the Trainer that work neither for training nor for evaluations."""
    clip = trainer.gradient_clip_val
    hint = "PPO clips gradients itself: set PPOConfig.max_grad_norm."
    require(not clip, "Trainer.gradient_clip_val", "be None", clip, hint)
    batches = trainer.accumulate_grad_batches
    hint = "PPO takes several optimizer steps in an iteration: set PPOConfig.minibatches."
    require(batches == 1, "Trainer.accumulate_grad_batches", "be 1", batches, hint)
    hint = "float16 needs loss scaling, and running statistics need float32."
    one_of("Trainer.precision", trainer.precision, _PRECISIONS, hint)
    for name, least in (("min_steps", trainer.min_steps), ("min_epochs", trainer.min_epochs)):
        hint = "The budget could end the run before it."
        ok = budget is None or not least
        require(ok, f"Trainer.{name}", f"be None with PPO.total_env_steps={budget}", least, hint)
        at_least(f"Trainer.{name}", least, 0)
    share = trainer.overfit_batches
    hint = "PPO has no data set: every iteration plays new steps."
    require(not share, "Trainer.overfit_batches", "be 0", share, hint)
    at_least("Trainer.log_every_n_steps", trainer.log_every_n_steps, 0)
    steps = trainer.num_sanity_val_steps  # infinite where the user wrote -1
    rule = "be at least 0, or -1 for all of an evaluation"
    require(steps >= 0, "Trainer.num_sanity_val_steps", rule, steps)
    epochs = trainer.check_val_every_n_epoch
    hint = "Switch evaluation off with Trainer(limit_val_batches=0)."
    ok = epochs is None or epochs >= 1
    require(ok, "Trainer.check_val_every_n_epoch", "be at least 1, or None", epochs, hint)
    share = trainer.limit_val_batches
    hint = "An evaluation is one batch: set PPO.eval_episodes."
    ok = share == 0 or share >= 1
    require(ok, "Trainer.limit_val_batches", "be 0, or at least 1", share, hint)


def _refuse_too_large(trainer: Trainer, settings: PPOSettings) -> None:
    """Refuse environments that are too many for the step budget or for the memory."""
    env, budget = settings.env, settings.total_env_steps
    least = env.num_envs * trainer.world_size
    rule = f"be at least env.num_envs * Trainer.world_size = {least}"
    require(budget is None or budget >= least, "PPO.total_env_steps", rule, budget)
    memory, spaces = memory_bytes(trainer.strategy.root_device), env.spaces()
    episodes = evaluation_spec(env, settings.eval_episodes).num_envs
    rollout = rollout_bytes(spaces, settings.ppo.rollout_steps, env.num_envs)
    for field, what, taken in (
        ("PPOConfig.rollout_steps * env.num_envs", "a rollout", rollout),
        ("PPO.eval_episodes", "an evaluation", rollout_bytes(spaces, 1, episodes)),
    ):
        rule = f"give {what} that fits into the memory, {memory / 1e9:.0f} GB"
        require(taken <= memory, field, rule, Words(f"one of {taken / 1e9:,.0f} GB"))


def _refuse_unfit(trainer: Trainer, settings: PPOSettings) -> None:
    """Refuse settings with which PPO could not train, but could be evaluated."""
    length, share = settings.iterations_per_epoch, trainer.limit_train_batches
    most = batches_in_epoch(length, share)
    hint = "With 0, nothing is trained: esper evaluate plays the episodes of an evaluation."
    require(most >= 1, "Trainer.limit_train_batches", "leave an iteration", share, hint)
    time_s = time_between_evaluations(trainer)
    rule = "be a number of iterations, or a share of an epoch"
    require(time_s is None, "Trainer.val_check_interval", rule, Words(f"{time_s} s"))
    every = trainer.val_check_interval
    rule = "be at least 1 iteration, or a share of an epoch above 0"
    ok = every > 0 or not trainer.limit_val_batches
    require(ok, "Trainer.val_check_interval", rule, every)
    if isinstance(every, int) and trainer.limit_val_batches:
        hint = "Trainer(check_val_every_n_epoch=None) counts iterations of all epochs."
        ok = trainer.check_val_every_n_epoch is None or every <= most
        rule = f"be at most {most}, the iterations of an epoch"
        require(ok, "Trainer.val_check_interval", rule, every, hint)
    for callback in trainer.callbacks if trainer.is_global_zero else ():
        if isinstance(callback, ModelCheckpoint | OnExceptionCheckpoint):
            _refuse_no_place(callback)
    monitors = [each for each in trainer.callbacks if isinstance(each, _LOG_ONLY)]
    ok = bool(trainer.loggers) or not monitors
    got = Words(f"none for {type(monitors[0]).__name__}" if monitors else "")
    require(ok, "Trainer.logger", "be there for what callbacks log", got)
    device = trainer.strategy.root_device.type
    reads = any(monitors_cpu(each, device) for each in monitors)
    ok = not reads or find_spec("psutil") is not None
    hint = "Install psutil, or set it to False."
    got = Words("one that reads the CPU")
    require(ok, "DeviceStatsMonitor.cpu_stats", "be False without psutil", got, hint)
    epochs = trainer.max_epochs
    if epochs is None:  # Lightning's default is 1000, unless something else ends the run
        epochs = -1 if any(isinstance(each, Timer) for each in trainer.callbacks) else 1000
    budget, schedule = settings.total_env_steps, settings.ppo.learning_rate_schedule
    endless = budget is None and epochs < 0 and trainer.max_steps < 0
    rule = "be known for PPOConfig.learning_rate_schedule='linear'"
    ok = schedule != "linear" or not endless
    require(ok, "PPO.total_env_steps", rule, budget)


def _refuse_callback(callback: Callback) -> None:
    """Refuse callbacks of Lightning that have no effect, or a harmful one, with PPO.

    The cause is that PPO optimises manually. Some of these callbacks would raise errors themselves,
    but only after the run has started.
    """
    name = type(callback).__name__
    hint = "It does nothing. In a config, class_path names the class of a callback."
    derived = type(callback) is not Callback
    require(derived, "Trainer.callbacks", "be of classes derived from Callback", name, hint)
    hint = "PPO schedules its learning rate and sizes its minibatches itself: see PPOConfig."
    tunes = isinstance(callback, LearningRateFinder | BatchSizeFinder)
    require(not tunes, "Trainer.callbacks", "tune nothing", name, hint)
    hint = "PPO takes several optimizer steps in an iteration: set PPOConfig.minibatches."
    accumulates = (
        isinstance(callback, GradientAccumulationScheduler)
        and callback.going_to_accumulate_grad_batches()
    )
    require(not accumulates, "Trainer.callbacks", "accumulate no gradients", name, hint)
    hint = "It needs Lightning's automatic optimisation."
    averages = isinstance(callback, StochasticWeightAveraging)
    require(not averages, "Trainer.callbacks", "average no weights", name, hint)
    hint = "PPO steps all weights as one vector."
    freezes = isinstance(callback, BaseFinetuning)
    require(not freezes, "Trainer.callbacks", "freeze no weights", name, hint)
    prunes = isinstance(callback, ModelPruning)
    require(not prunes, "Trainer.callbacks", "prune no weights", name, hint)
    hint = "PPO has a loss for each minibatch, and none for an iteration."
    watches = isinstance(callback, SpikeDetection)
    require(not watches, "Trainer.callbacks", "watch no loss of a step", name, hint)
    interval = train_time_interval(callback)
    hint = "Lightning ignores it with manual optimisation: set every_n_train_steps."
    require(interval is None, "ModelCheckpoint.train_time_interval", "be None", interval, hint)
    if isinstance(callback, ModelSummary):
        depth = summary_depth(callback)
        at_least(f"{name}.max_depth", depth, -1)
    if isinstance(callback, EarlyStopping | ModelCheckpoint):
        require_name(f"{name}.monitor", callback.monitor, "a metric")
    if isinstance(callback, EarlyStopping):
        at_least(f"{name}.patience", callback.patience, 0)


def _refuse_no_place(callback: ModelCheckpoint | OnExceptionCheckpoint) -> None:
    """Refuse a folder or a file name of checkpoints with which no file could be saved.

    Lightning would find out when it first saves.
    """
    owner, filename = type(callback).__name__, callback.filename or ""
    folder = str(callback.dirpath or "")
    require_writable(f"{owner}.dirpath", folder)
    require("\0" not in filename, f"{owner}.filename", "name a file", filename)
    try:
        saves = callback.format_checkpoint_name({}) if isinstance(callback, ModelCheckpoint) else ""
        path = Path(saves or cast(OnExceptionCheckpoint, callback).ckpt_path)
        length = len(os.fsencode(path.name))
    except Exception as error:  # whatever is wrong with a format
        rule = f"be a name with formats ({error})"
        hint = "'{epoch}-{step}', for example."
        require(False, f"{owner}.filename", rule, filename, hint)
        return
    rule = f"give names of at most {_LONGEST_NAME} bytes"
    require(length <= _LONGEST_NAME, f"{owner}.filename", rule, filename)
    if "://" not in folder and (folder or path.is_absolute()):
        require_output_folder(f"{owner}.dirpath", path.parent)


def _refuse_strategy(trainer: Trainer) -> None:
    """Refuse strategies that shard weights or lose the state of a run."""
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    reason = "PPO steps all weights as one vector, of which every rank needs the whole."
    ok = known and not isinstance(strategy, DeepSpeedStrategy)
    rule = "be 'ddp', or 'auto' with one device"
    require(ok, "Trainer.strategy", rule, name, reason)
    launcher = strategy.launcher
    reason = "Its child processes hand back weights and nothing else."
    ok = not spawns_processes(trainer)
    require(ok, "Trainer.strategy", rule, f"{name} by {type(launcher).__name__}", reason)
    backend = strategy.process_group_backend if isinstance(strategy, DDPStrategy) else None
    if backend is not None:
        kinds = [each.rpartition(":")[2] for each in backend.split(",")]
        rule = "be one that torch has here: 'gloo', or 'nccl' on CUDA, for example"
        ok = all(map(torch.distributed.is_backend_available, kinds))
        require(ok, f"{name}.process_group_backend", rule, backend)


def keep_lightning_from_requeueing(trainer: Trainer) -> None:
    """Switch off Lightning's own requeueing of SLURM jobs of several ranks.

    On a signal, Lightning saves a checkpoint from within the signal handler, in the middle of
    whatever the rank is doing. Ranks that meet in different collectives would then wait for ever.
    """
    environment = cluster_environment(trainer)
    if (
        trainer.world_size > 1
        and isinstance(environment, SLURMEnvironment)
        and environment.auto_requeue
    ):
        environment.auto_requeue = False
        hangs = "Lightning's requeueing is off: with several ranks it hangs"
        _log.info("%s. scripts/slurm.sh requeues the job instead.", hangs)


def keep_profilers_from_slowing(trainer: Trainer, mode: CompileMode) -> None:
    """Let a stock ``PyTorchProfiler`` record no names of modules where training is compiled.

    It names modules by hooks, with which training would be eager, in all steps: the trace would
    show another program, several times slower.

    Args:
        trainer: Trainer of the run.
        mode: Compile mode of the module.
    """
    eager = ("off", "auto") if trainer.strategy.root_device.type == "cuda" else ("off",)
    profiler = trainer.profiler
    if mode in eager or not isinstance(profiler, PyTorchProfiler):
        return
    if record_no_module_names(profiler):
        text = "The profiler records no names of modules, which only PPO(compile='off') has."
        _log.info(text)


def silence_lightning() -> None:
    """Silence warnings of Lightning about which users of PPO can do nothing.

    ``ModelCheckpoint`` advises every module with manual optimisation to save the weights before a
    step, but a checkpoint of PPO must hold the finished iteration. Lightning also uses internals of
    torch in a deprecated way.
    """
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)


def count_step(trainer: Trainer) -> None:
    """Count one iteration as one step of ``trainer.global_step``.

    An iteration takes many gradient steps. If each of them counted, ``max_steps`` and
    ``ModelCheckpoint(every_n_train_steps=...)`` would depend on the number of minibatches, and each
    step would cost a call of Lightning's wrapper.
    """
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()


def planned_env_steps(trainer: Trainer, progress: Progress, *, ranks: int) -> int | None:
    """Number of environment steps after which the first limit of a run is reached.

    The result is ``None`` if there is no limit. A warning is logged where the Trainer will end the
    run before its budget is used.

    Args:
        trainer: The Trainer at the start of training.
        progress: Progress of the run so far, with the budget of the run.
        ranks: Number of ranks that train together.
    """
    budget = progress.budget
    iterations: list[float] = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        epochs = trainer.max_epochs - trainer.fit_loop.epoch_progress.current.processed
        iterations.append(epochs * trainer.num_training_batches)
    if trainer.max_steps >= 0:
        iterations.append(trainer.max_steps - trainer.global_step)
    limit = None
    if iterations:
        limit = progress.env_steps_after(int(min(iterations)), ranks=ranks)
    if budget is None or limit is None:
        return budget if limit is None else limit
    if limit < budget and not trainer.fast_dev_run:
        _log.warning(
            "The Trainer's max_epochs=%s, max_steps=%s end the run after %d env steps, before "
            "PPO.total_env_steps=%d. Set Trainer(max_epochs=-1) to use the budget.",
            trainer.max_epochs,
            trainer.max_steps,
            limit,
            budget,
        )
    return min(limit, budget)
