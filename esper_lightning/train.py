"""A whole run in one call.

``train_ppo_vectorized`` makes a Trainer with callbacks, logger, profiler and run directory. The
module in ``training`` works with any Trainer and makes none, and the command line takes its default
callbacks and its logger from here.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO

from esper_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from esper_lightning.callbacks.directory_choice import claim_new, given_directory
from esper_lightning.callbacks.history import History
from esper_lightning.callbacks.lightning_internals import calm, checkpoint_io_of
from esper_lightning.callbacks.mirror import Mirror, place_of
from esper_lightning.callbacks.progress import RunProgressBar
from esper_lightning.callbacks.run_directory import assign_run_directory, end_run, run_directory
from esper_lightning.compiling.loops import CompileMode
from esper_lightning.core.errors import at_least, check_arguments, one_of, require, require_name
from esper_lightning.core.paths import expand_home, require_output, require_output_folder
from esper_lightning.envs.base import EnvSpec, spec_name
from esper_lightning.forensics.claims import claim
from esper_lightning.forensics.files import read_json_lines, write_atomically
from esper_lightning.forensics.layout import OF_A_RUN, RankLayout, RunLayout
from esper_lightning.policies.base import PolicySpec
from esper_lightning.ppo.config import PPOConfig
from esper_lightning.ppo.extension import ExtensionSpec
from esper_lightning.ppo.metrics import EVAL_RETURN
from esper_lightning.recorder.flight_recorder import FlightRecorder
from esper_lightning.recorder.profiling.window_profiler import WindowProfiler
from esper_lightning.training.checkpoint.files import CHECKPOINT_BEGINS, AtomicCheckpointIO
from esper_lightning.training.checkpoint.meeting import tells_other_ranks
from esper_lightning.training.checkpoint.start import begin_or_resume
from esper_lightning.training.checkpoint.states import load_checkpoint
from esper_lightning.training.module import PPO
from esper_lightning.training.settings import PPOSettings
from esper_lightning.training.specs import require_specs
from esper_lightning.training.trainer_rules import refuse_trainer

_FETCH_S = 30.0  # wait for a remote place that sends no byte, before the run starts without it
_FOLDERS = "[!.]*/"  # a directory with other visible folders is not that of one run

__all__ = [
    "begin_run",
    "run_callbacks",
    "run_logger",
    "run_plugins",
    "runs_folder",
    "train_ppo_vectorized",
]


@check_arguments
@calm()
def train_ppo_vectorized(
    env: EnvSpec,
    *,
    iterations: int,
    ppo: PPOConfig = PPOSettings.ppo,
    policy: PolicySpec = PPOSettings.policy,
    seed: int = PPOSettings.seed,
    device: str = "auto",
    devices: int = 1,
    run_dir: str | Path | None = None,
    torch_profiler: bool = False,
    torch_profiler_dir: str | Path | None = None,
    torch_profiler_wait: int = 1,
    torch_profiler_warmup: int = 1,
    torch_profiler_active: int = 3,
    torch_profiler_repeat: int = 1,
    torch_profiler_record_shapes: bool = False,
    torch_profiler_profile_memory: bool = False,
    torch_profiler_with_stack: bool = False,
    torch_profiler_summary: bool = False,
    save_path: str | Path | None = None,
    resume_path: str | Path | None = None,
    compile: CompileMode = PPOSettings.compile,  # noqa: A002 - the usual name of the setting
    evaluate_every: int | None = None,
    eval_episodes: int | None = PPOSettings.eval_episodes,
    extensions: tuple[ExtensionSpec, ...] = PPOSettings.extensions,
    redeal: bool = PPOSettings.redeal,
) -> list[dict[str, Any]]:
    """Train PPO for a number of iterations and return its history.

    Args:
        env: Environments to train in, such as ``CartPole(num_envs=2048)``.
        iterations: Number of iterations of the whole run, including those before ``resume_path``.
        ppo: Settings of the algorithm.
        policy: Networks to train.
        seed: Seed of everything random.
        device: Lightning's accelerator, such as ``auto``, ``cpu`` or ``gpu``.
        devices: Number of devices. With more than one, the calling program is started once for each
            device, and each has ``env.num_envs`` environments of its own.
        run_dir: Directory of history, logs and checkpoints; ``None`` for a new
            ``runs/<env>/version_<n>``.
        torch_profiler: Whether a ``WindowProfiler`` (a ``PyTorchProfiler``) records Chrome traces.
        torch_profiler_dir: Directory of traces; ``None`` for ``rank<k>/trace`` in the run
            directory.
        torch_profiler_wait: Number of iterations that are not recorded, at the start of each cycle.
        torch_profiler_warmup: Number of iterations that are recorded and discarded, after the wait.
        torch_profiler_active: Number of iterations that are recorded, after the warm-up.
        torch_profiler_repeat: Number of cycles; 0 repeats them until the run ends.
        torch_profiler_record_shapes: Whether operators are recorded with the shapes of their
            inputs.
        torch_profiler_profile_memory: Whether allocations are recorded.
        torch_profiler_with_stack: Whether operators are recorded with their source lines.
        torch_profiler_summary: Whether the profiler's table is printed at the end of the run. The
            table is always written to ``profile.txt``.
        save_path: File that gets a copy of ``checkpoints/best.ckpt``, or of ``last.ckpt`` where
            nothing was evaluated. The copy is also made for a run that died, if it left either
            file. An existing file is replaced only if it is a checkpoint.
        resume_path: Checkpoint from which the run is resumed. ``last`` is the latest that the run
            in ``run_dir`` has left, or else the newest run of the task; a new run begins where
            there is none.
        compile: Compile mode of the whole run: ``off``, ``auto``, ``default`` or ``max``,
            which ``PPO`` explains.
        evaluate_every: Number of iterations between evaluations. An evaluation saves the policy as
            ``checkpoints/best.ckpt`` if no earlier one was better. ``None`` means no evaluations.
        eval_episodes: Number of episodes of an evaluation, which ``PPO`` explains.
        extensions: Additions to PPO: rewards, terms of the loss and metrics, such as ``RND()``.
        redeal: Whether a run that is resumed by another number of ranks deals the environments of
            the checkpoint anew.

    Returns:
        The rows of this rank's ``history.jsonl``, one for each iteration of this run directory.

    Raises:
        ValueError: If a setting is out of range, a directory has an empty name, ``resume_path``
            names no checkpoint, a running process owns ``run_dir``, or ``save_path`` is a file
            other than a checkpoint.
        BaseException: Whatever ended the run, with a note that says where its evidence is.
    """
    own = locals()  # by name, so that an argument which is a setting of PPO needs no further line
    shared = {name: own[name] for name in PPOSettings.names() if name in own}
    require_specs("train_ppo_vectorized", env, policy)
    counts = {"iterations": iterations, "devices": devices, "evaluate_every": evaluate_every}
    for name, value in (counts | {"torch_profiler_active": torch_profiler_active}).items():
        at_least(f"train_ppo_vectorized.{name}", value, 1)
    known = ("auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators()))
    one_of("train_ppo_vectorized.device", device, known)
    recorded_from = torch_profiler_wait + torch_profiler_warmup
    rule = f"be less than iterations = {iterations}"
    hint = "A window that never opens leaves nothing."
    fits = not torch_profiler or recorded_from < iterations
    require(fits, "torch_profiler_wait + torch_profiler_warmup", rule, recorded_from, hint)
    counts = {"wait": torch_profiler_wait, "warmup": torch_profiler_warmup}
    for name, value in (counts | {"repeat": torch_profiler_repeat}).items():
        at_least(f"train_ppo_vectorized.torch_profiler_{name}", value, 0)
    copies_to = None if save_path is None else _copy_at(save_path)
    require_name("train_ppo_vectorized.run_dir", run_dir, "a directory")
    require_name("train_ppo_vectorized.torch_profiler_dir", torch_profiler_dir, "a directory")
    if run_dir is not None:
        require_output_folder("train_ppo_vectorized.run_dir", place_of(run_dir)[0])
    if resume_path not in (None, "last"):
        load_checkpoint(resume_path, field="train_ppo_vectorized.resume_path")  # refused early
        resume_path = expand_home(resume_path)

    model = PPO(
        **shared,
        total_env_steps=iterations * ppo.rollout_steps * env.num_envs * devices,
        iterations_per_epoch=evaluate_every or PPOSettings.iterations_per_epoch,
    )
    profiler = None
    if torch_profiler:
        profiler = WindowProfiler(
            torch_profiler_dir,
            "ppo",
            wait=torch_profiler_wait,
            warmup=torch_profiler_warmup,
            active=torch_profiler_active,
            repeat=torch_profiler_repeat,
            record_shapes=torch_profiler_record_shapes,
            profile_memory=torch_profiler_profile_memory,
            with_stack=torch_profiler_with_stack,
        )
        profiler.logs_table = False  # the table is printed below, or not at all
    trainer = Trainer(
        accelerator=device,
        devices=devices,
        max_epochs=-1,
        logger=run_logger(env, run_dir),
        log_every_n_steps=1,
        limit_val_batches=0 if evaluate_every is None else 1.0,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        profiler=profiler,
        callbacks=run_callbacks(
            evaluates=evaluate_every is not None, prints_profile=torch_profiler_summary
        ),
        plugins=run_plugins(),
    )
    settings = {
        "model": model.settings.to_data(),
        "trainer": {
            "accelerator": device,
            "devices": devices,
            "limit_val_batches": 0 if evaluate_every is None else 1.0,
        },
    }
    with tells_other_ranks(trainer):
        refuse_trainer(trainer, model.settings)  # before the Trainer starts other ranks
        resume_path = begin_or_resume(
            trainer,
            model,
            resume_path,
            run_dir,
            folder=runs_folder(trainer, env),
            begin=partial(
                begin_run, trainer, env, config=yaml.safe_dump(settings, sort_keys=False)
            ),
        )
    try:
        trainer.fit(model, ckpt_path=resume_path, weights_only=True)
        if copies_to is not None and trainer.is_global_zero:
            _save(trainer, copies_to)
        if profiler is not None and torch_profiler_summary:
            print(profiler.last_table or "")  # noqa: T201 - the caller asked for it
    except BaseException as error:
        _note(error, trainer, profiler)
        if copies_to is not None and trainer.is_global_zero:
            try:
                _save(trainer, copies_to)
            except Exception as problem:  # the caller must see the error that ended the run
                error.add_note(f"save_path={str(save_path)!r} was not written: {problem}")
        raise
    finally:
        end_run(trainer)  # the run may have failed before any callback was called
    return read_json_lines(_layout_of_rank(trainer).history)


def runs_folder(trainer: Trainer, env: EnvSpec) -> str:
    """Folder of the run directories of a task, in ``Trainer.default_root_dir``."""
    return f"{trainer.default_root_dir}/{_folder(env)}"


def run_logger(env: EnvSpec, run_dir: str | Path | None = None) -> TensorBoardLogger:
    """A TensorBoard logger whose ``log_dir`` is the run directory.

    Args:
        env: Environments of the run, which name the folder of a new run directory.
        run_dir: The run directory; ``None`` for a new one, whose number ``begin_run`` chooses.
    """
    if run_dir is None:
        folder = _folder(env)
        return TensorBoardLogger(folder.parent, name=folder.name, default_hp_metric=False)
    # Lightning's hp_metric would be a curve of one point, at -1.
    folder = place_of(run_dir)[0]
    return TensorBoardLogger(folder, name="", version="", default_hp_metric=False)


def begin_run(trainer: Trainer, env: EnvSpec, run_dir: str | Path | None, config: str) -> None:
    """Claim the run directory on the first rank; ``config.yaml`` is written once all ranks agree.

    Args:
        trainer: Trainer of the run.
        env: Environments of the run, which name the folder of a new run directory.
        run_dir: The run directory. ``None`` means the directory that a callback or logger was
            given, or else a new ``runs/<env>/version_<n>`` in ``Trainer.default_root_dir``.
        config: Content of ``config.yaml``, with which the run can be repeated.

    Raises:
        ValueError: If another run is using the directory, it holds files that no run wrote, or no
            file can be written there.
        OSError: If the directory cannot be made.
    """
    leaves_files = not trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue]
    if not (trainer.is_global_zero and leaves_files):
        return
    own = given_directory(trainer)
    alike = run_dir is None or own is None or place_of(run_dir) == place_of(own)
    require(alike, "run_dir", f"be the dirpath of a callback, {str(own)!r}", str(run_dir))
    if run_dir is None:
        held, address = claim_new(trainer, runs_folder(trainer, env))
    else:
        directory, address = place_of(run_dir)
        held = claim(directory)
    mirror, written = None, [*OF_A_RUN, _FOLDERS]
    try:
        held.refuse_others(written)
        require_output_folder("run_dir", held.directory)  # it may be that of another user's run
        if address is not None:  # an earlier attempt may have run on another machine
            mirror = Mirror(held.directory, address, rank=0)
            mirror.begin(fetch_s=None if held.was_run else _FETCH_S, written=written)
        assign_run_directory(trainer, held, config, mirror)
    except BaseException as error:
        held.release(used=mirror is not None and mirror.has_written and not held.was_run)
        if isinstance(error, OSError) and error.filename is None:  # such as a limit on its size
            error.filename = str(held.directory)
        raise


def _folder(env: EnvSpec) -> Path:
    return Path("runs", _folder_name(spec_name(env)))


def _folder_name(task: str) -> str:
    """A task's name without characters that have a meaning in paths."""
    return re.sub(r"[^a-z0-9_.-]+", "_", task.lower()).strip("._") or "task"


def run_callbacks(
    *,
    evaluates: bool,
    saves: bool = True,
    shows_progress: bool = True,
    writes_history: bool = True,
    records: bool = True,
    prints_profile: bool = True,
) -> list[Callback]:
    """The callbacks of every run.

    ``best.ckpt`` is saved before ``last.ckpt``, because ``last.ckpt`` stores which checkpoint is
    the best.

    Args:
        evaluates: Whether the run evaluates its policy, so that ``best.ckpt`` can be chosen.
        saves: Whether checkpoints are saved.
        shows_progress: Whether a progress bar is shown.
        writes_history: Whether ``history.jsonl`` is written.
        records: Whether a ``FlightRecorder`` records the run.
        prints_profile: Whether the flight recorder prints the profiler's table.
    """
    callbacks: list[Callback] = []
    if records:
        callbacks.append(FlightRecorder(print_profile=prints_profile))
    if writes_history:
        callbacks.append(History())
    if shows_progress:
        callbacks.append(RunProgressBar())
    if saves and evaluates:
        callbacks.append(BestCheckpoint(EVAL_RETURN))
    if saves:
        callbacks.append(LastCheckpoint())
    return callbacks


def run_plugins(given: Any = None, strategy: object = None) -> list[Any]:
    """The Trainer plugins of every run: those of the user, and atomic checkpoint files.

    A ``CheckpointIO`` of the user replaces the atomic one.

    Args:
        given: The user's ``Trainer(plugins=...)``.
        strategy: The user's ``Trainer(strategy=...)``, which may bring a ``CheckpointIO``.
    """
    listed = cast(list[Any], given if isinstance(given, list) else [given])
    plugins = [plugin for plugin in listed if plugin is not None]
    chosen = [*plugins, checkpoint_io_of(strategy)]
    if not any(isinstance(plugin, CheckpointIO) for plugin in chosen):
        plugins.append(AtomicCheckpointIO())
    return plugins


def _copy_at(save_path: str | Path) -> Path:
    """The path of the copy of a checkpoint, which is refused before training if it cannot be."""
    field = "train_ppo_vectorized.save_path"
    return require_output(field, save_path, "checkpoint", CHECKPOINT_BEGINS)


def _save(trainer: Trainer, path: Path) -> None:
    """Copy the best checkpoint of a run, or else the last.

    Raises:
        OSError: If the copy cannot be written, as on a full disk.
        FileNotFoundError: If the run has no checkpoint.
    """
    written = (getattr(c, "best_model_path", "") for c in trainer.checkpoint_callbacks)
    source = next((name for name in written if name and Path(name).exists()), None)
    if source is None:
        raise FileNotFoundError("the run had no checkpoint yet")
    write_atomically(path, Path(source).read_bytes())


def _layout_of_rank(trainer: Trainer) -> RankLayout:
    """The files of this rank in the run directory, on which all ranks have agreed."""
    directory = run_directory(trainer)
    assert directory is not None
    return RunLayout(directory).rank(trainer.global_rank)


def _note(error: BaseException, trainer: Trainer, profiler: WindowProfiler | None) -> None:
    """Say in an error where the evidence of the run is, unless the recorder has said it."""
    noted = any("Run directory" in note for note in getattr(error, "__notes__", ()))
    if noted or run_directory(trainer) is None:  # the run has not begun on this rank
        return
    rank = _layout_of_rank(trainer)
    trace = "" if profiler is None else f"; traces in {profiler.dirpath}"
    error.add_note(f"Run directory: {rank.directory.parent} (history in {rank.history}{trace})")
