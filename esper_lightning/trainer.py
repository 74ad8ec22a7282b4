"""Lightning's Trainer with the defaults of ``esper fit``, for runs that a program starts."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch
import yaml
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from typing_extensions import override

from esper_lightning.callbacks.history import History
from esper_lightning.callbacks.lightning_internals import calm
from esper_lightning.callbacks.run_directory import end_run, run_directory
from esper_lightning.core.errors import require_name
from esper_lightning.envs.base import spec_name
from esper_lightning.forensics.replay import BY_PROGRAM
from esper_lightning.ppo.metrics import EVAL_RETURN
from esper_lightning.recorder.flight_recorder import FlightRecorder
from esper_lightning.train import begin_run, run_callbacks, run_logger, run_plugins, runs_folder
from esper_lightning.training.checkpoint.meeting import tells_other_ranks
from esper_lightning.training.checkpoint.start import begin_or_resume
from esper_lightning.training.module import PPO
from esper_lightning.training.trainer_rules import refuse_trainer

__all__ = ["Trainer", "results_of"]

_OF_PLACE = frozenset({"default_root_dir"})
"""Settings that ``config.yaml`` does not hold, because the run directory stands for them."""
_WITHOUT_EFFECT = frozenset({"logger", "profiler"})
"""Settings that change nothing of the training if they are objects, which no config can hold."""


class Trainer(lightning.pytorch.Trainer):
    """Lightning's Trainer with the defaults of ``esper fit``.

    ``Trainer().fit(PPO(...))`` trains to the model's budget. It makes a run directory with history,
    checkpoints, TensorBoard's file and the evidence of a death, shows a progress bar in
    environment steps, evaluates at every epoch, and prints the results. Every setting of Lightning
    can be given; a module other than ``PPO`` trains as it does with Lightning, with the same
    callbacks.

    Args:
        run_dir: Directory of the run; ``None`` for a new ``runs/<env>/version_<n>``.
        callbacks: Further callbacks. One that writes checkpoints or the history, shows progress or
            records the flight replaces the one that every run has.
        kwargs: Settings of Lightning's Trainer.

    Raises:
        ValueError: If ``run_dir`` is an empty or blank text.
    """

    def __init__(
        self,
        *,
        run_dir: str | Path | None = None,
        callbacks: Sequence[Callback] | Callback | None = None,
        **kwargs: Any,
    ) -> None:
        require_name("Trainer.run_dir", run_dir, "a directory")
        given = [callbacks] if isinstance(callbacks, Callback) else [*(callbacks or ())]
        # ``config.yaml`` names what it cannot hold: a replay by ``esper`` would be without it.
        self._further = [type(c).__name__ for c in given if not isinstance(c, FlightRecorder)]
        self._settings = {k: v for k, v in kwargs.items() if _is_plain(v) and k not in _OF_PLACE}
        objects = kwargs.keys() - self._settings.keys() - _OF_PLACE - _WITHOUT_EFFECT
        self._further += sorted(f"Trainer.{name}" for name in objects if kwargs[name] is not None)
        plain = bool(kwargs.get("barebones") or kwargs.get("fast_dev_run"))
        if not kwargs.get("barebones"):
            kwargs["plugins"] = run_plugins(kwargs.get("plugins"), kwargs.get("strategy"))
            kwargs.setdefault("enable_model_summary", False)
            kwargs.setdefault("log_every_n_steps", 1)  # Lightning warns of epochs of fewer steps
            shows = kwargs.get("enable_progress_bar") is not False
            given += default_callbacks(
                given,
                evaluates=kwargs.get("limit_val_batches") != 0,
                saves=kwargs.get("enable_checkpointing") is not False and not plain,
                shows_progress=shows,
            )
        self._own_logger = kwargs.get("logger") in (None, True) and not plain
        if self._own_logger:
            kwargs["logger"] = False  # until ``fit`` knows the task
        self._run_dir = run_dir
        chosen: dict[str, Any] = {"max_epochs": -1, "callbacks": given, **kwargs}
        with calm():
            super().__init__(**chosen)

    @override
    def fit(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: lightning.pytorch.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Train a model, and print what a run of ``PPO`` reached.

        Args:
            model: Model to train.
            args: Data of a module other than ``PPO``.
            kwargs: ``ckpt_path`` and other arguments of Lightning. ``ckpt_path="last"`` resumes the
                run in the run directory, or the newest run of the task where none was given.

        Raises:
            ValueError: If a setting does not fit, or another run owns the directory.
        """
        if not isinstance(model, PPO):
            super().fit(model, *args, **kwargs)
            return
        if self._own_logger:
            self.logger = run_logger(model.env, self._run_dir)
        settings = {"model": model.settings.to_data(), "trainer": self._settings}
        with tells_other_ranks(self):
            refuse_trainer(self, model.settings)
            if not self.barebones:
                config = yaml.safe_dump(settings, sort_keys=False)
                if self._further:
                    config = f"{BY_PROGRAM}objects of its own: {', '.join(self._further)}\n{config}"
                name = kwargs.get("ckpt_path")
                kwargs["ckpt_path"] = begin_or_resume(
                    self,
                    model,
                    name,
                    self._run_dir,
                    folder=runs_folder(self, model.env),
                    begin=partial(begin_run, self, model.env, config=config),
                )
        try:
            with calm():
                super().fit(model, *args, **{"weights_only": True, **kwargs})
        finally:
            end_run(self)
        if self.is_global_zero and not self.barebones:
            print(*results_of(self, model), sep="\n")  # noqa: T201 - the user asked for a run


def default_callbacks(
    given: Sequence[Callback], *, evaluates: bool, saves: bool, shows_progress: bool
) -> list[Callback]:
    """The callbacks of every run, without those that a callback of the user replaces.

    Args:
        given: Callbacks of the user.
        evaluates: Whether the run evaluates its policy.
        saves: Whether checkpoints are saved.
        shows_progress: Whether a progress bar is shown.
    """

    def has(kind: type[Callback]) -> bool:
        return any(isinstance(callback, kind) for callback in given)

    return run_callbacks(
        evaluates=evaluates,
        saves=saves and not has(Checkpoint),
        shows_progress=shows_progress and not has(ProgressBar),
        writes_history=not has(History),
        records=not has(FlightRecorder),
    )


def results_of(
    trainer: lightning.pytorch.Trainer, model: PPO, *, trained: bool = True
) -> list[str]:
    """Lines about what a run reached.

    Args:
        trainer: Trainer of the run, after its end.
        model: Model of the run.
        trained: Whether the run was training, and not only an evaluation.
    """
    lines: list[str] = []
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    if EVAL_RETURN in metrics:
        mean, std = metrics[EVAL_RETURN], metrics["eval/episode_return_std"]
        digits = 1 if abs(mean) >= 10 else 2
        lines.append(
            f"{spec_name(model.env)}: mean return {mean:.{digits}f} (std {std:.{digits}f}) "
            f"over {metrics['eval/episodes']:.0f} deterministic evaluation episodes"
        )
    if trained:
        steps, seconds = model.env_steps, model.progress.train_time_s
        rate = steps / seconds if seconds > 0 else 0.0
        lines.append(f"Trained for {steps:,} env steps in {seconds:.1f} s: {rate:,.0f} env-steps/s")
        directory = run_directory(trainer)
        if directory is not None:
            lines.append(f"Run directory: {_from_here(directory)}")
    return lines


def _is_plain(value: object) -> bool:
    """Whether a setting can be written into a config as it is."""
    if isinstance(value, dict):
        entries = cast(dict[object, object], value).items()
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in entries)
    if isinstance(value, list):
        return all(map(_is_plain, cast(list[object], value)))
    return isinstance(value, str | bool | int | float)


def _from_here(directory: Path) -> Path:
    """A path relative to the current directory, if the path lies below that."""
    try:
        return directory.relative_to(Path.cwd())
    except (ValueError, OSError):  # it is elsewhere, or the current one is gone
        return directory
