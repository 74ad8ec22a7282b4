"""Metrics that callbacks monitor: impossible names are refused, and absent metrics are reported.

A callback that monitors a metric looks for it at the end of an epoch or of an evaluation at the
earliest, and some callbacks never say that it is not there.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, LearningRateMonitor, ModelCheckpoint
from typing_extensions import override

from esper_lightning.core.errors import require
from esper_lightning.ppo.metrics import EVALUATION_METRICS
from esper_lightning.training.progress import ROW_METRICS
from esper_lightning.training.settings import PPOSettings

__all__ = ["ReportsAbsentMetrics", "refuse_monitors"]

_log = logging.getLogger(__name__)
_LOGS_NOTHING = ("lightning.pytorch.", "esper_lightning.")  # modules of callbacks
_LOGS = (LambdaCallback, LearningRateMonitor)
_ALWAYS_THERE = ("epoch", "step")  # for ``ModelCheckpoint``


def refuse_monitors(trainer: Trainer, settings: PPOSettings, *, logs_more: bool) -> None:
    """Refuse a callback that monitors a metric that the run can never have.

    Nothing is refused where code of a user could log the metric.

    Args:
        trainer: The Trainer before it runs.
        settings: Settings of the module.
        logs_more: Whether the module may log metrics of its own.

    Raises:
        ValueError: If there is no such metric; the error names callback, metric and similar names.
    """
    if logs_more or _may_log_more(trainer):
        return
    known = [*ROW_METRICS, *(EVALUATION_METRICS if _evaluates(trainer) else ())]
    for callback, name in _monitors(trainer):
        late = name.startswith("env/") or (settings.extensions and "/" in name)
        rule, owner = "be a metric of this run", type(callback).__name__
        hint = _similar(name, known)
        if name in EVALUATION_METRICS:
            hint = f"Nothing is evaluated with Trainer(limit_val_batches=0).{hint}"
        require(bool(late) or name in known, f"{owner}.monitor", rule, name, hint.strip())


class ReportsAbsentMetrics(Callback):
    """Logs a warning about each callback whose metric is absent when it could have been there.

    Without code of a user, that is after the first iteration; otherwise after the first epoch, or
    the first evaluation if there are evaluations. Another warning follows at the end of the run, if
    the metric never came.

    Args:
        logs_more: Whether the module may log metrics of its own.
    """

    def __init__(self, *, logs_more: bool) -> None:
        self._logs_more = logs_more
        self._absent: list[tuple[Callback, str]] = []
        self._said: set[str] = set()  # metrics about which there was a warning
        self._is_first = self._was_evaluated = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with every callback that monitors a metric."""
        self._absent = [] if trainer.fast_dev_run else _monitors(trainer)
        self._is_first, self._was_evaluated, self._said = True, False, set()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report what the first iteration shows, if no code of a user can log more."""
        if self._absent and self._is_first:
            self._is_first = False
            self._look(trainer)
            if not (self._logs_more or _may_log_more(trainer)):
                self._say(trainer, but=EVALUATION_METRICS if _evaluates(trainer) else ())

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for metrics of the evaluation; after a sanity check ``on_train_start`` follows."""
        if self._absent:
            self._was_evaluated = True
            self._look(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report metrics that are absent although all hooks have been called once."""
        if self._absent:
            self._look(trainer)
            if self._was_evaluated or not _evaluates(trainer):
                self._say(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report metrics that the whole run did not have, if it had an iteration."""
        if self._absent and not self._is_first:
            self._look(trainer)
            for callback, name in self._absent if trainer.is_global_zero else ():
                text = "%s.monitor named %r, which nothing logged in the whole run.%s"
                hint = _similar(name, trainer.callback_metrics)
                if name in EVALUATION_METRICS and not self._was_evaluated:
                    hint = " Nothing was evaluated."
                _log.warning(text, type(callback).__name__, name, hint)

    def _look(self, trainer: Trainer) -> None:
        found = trainer.callback_metrics
        self._absent = [(callback, name) for callback, name in self._absent if name not in found]

    def _say(self, trainer: Trainer, but: Iterable[str] = ()) -> None:
        for callback, name in self._absent if trainer.is_global_zero else ():
            if name not in but and name not in self._said:
                self._said.add(name)
                text = "%s.monitor must be a metric, got %r, which nothing has logged so far.%s"
                hint = _similar(name, trainer.callback_metrics)
                _log.warning(text, type(callback).__name__, name, hint)


def _monitors(trainer: Trainer) -> list[tuple[Callback, str]]:
    """Callbacks with the metrics that they monitor."""
    callbacks: list[Any] = trainer.callbacks
    found: list[tuple[Callback, str]] = []
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        saves = isinstance(callback, ModelCheckpoint)
        idle = saves and (callback.save_top_k == 0 or name in _ALWAYS_THERE)
        if isinstance(name, str) and not idle:
            found.append((callback, name))
    return found


def _may_log_more(trainer: Trainer) -> bool:
    """Whether a callback may log metrics whose names cannot be known."""
    callbacks: list[Any] = trainer.callbacks
    return any(
        isinstance(each, _LOGS) or not type(each).__module__.startswith(_LOGS_NOTHING)
        for each in callbacks
    )


def _evaluates(trainer: Trainer) -> bool:
    return trainer.limit_val_batches != 0 and not trainer.barebones


def _similar(name: str, known: Iterable[str]) -> str:
    """A sentence with the known names that are most like ``name``, after a space."""
    names = list(known)
    found = get_close_matches(name, names, 2, 0.5)
    if not found:
        return f" Known are {', '.join(names[5:7])} and further columns of history.jsonl."
    are = "is" if len(found) == 1 else "are"
    return f" The nearest {are} {', '.join(map(repr, found))}."
