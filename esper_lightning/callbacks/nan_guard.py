"""Stop at the first NaN, with what it takes to see it again."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from esper_lightning.core.validate import NonFiniteError

__all__ = ["NanGuard"]


class NanGuard(Callback):
    """Stop the run at the first loss or gradient that is not finite, before the optimizer uses it.

    For modules with automatic optimisation; ``PPO`` guards itself. With a ``FlightRecorder`` the
    batch is in ``rank<k>/nan.pt``. On a CPU the step is not applied. On a GPU nothing waits for the
    device: the flag of a step is looked at in the next one, so that the weights are those after the
    faulty step, and the batch is the faulty one.

    Raises:
        NonFiniteError: Naming the step, and the loss and parameters concerned.
    """

    def __init__(self) -> None:
        self._batch: Any = None
        self._loss: Tensor | None = None
        self._pending: tuple[Tensor, torch.cuda.Event | None, list[str], Any, int] | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new run."""
        self._batch = self._loss = self._pending = None

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch until the next one."""
        self._batch = batch

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss."""
        self._loss = loss.detach()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at loss and gradients."""
        self._look()
        named = {
            f"gradient of {name}": parameter.grad
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None
        }
        if self._loss is not None:
            named = {"loss": self._loss, **named}
        if not named:
            return
        # A norm is not finite where an element is not: one fused call for all of them.
        norms = torch.stack(torch._foreach_norm(list(named.values()), float("inf")))  # pyright: ignore[reportPrivateUsage]
        finite, event = norms.isfinite(), None
        if finite.is_cuda:
            finite = finite.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (finite, event, list(named), self._batch, trainer.global_step)
        if event is None:
            self._look()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last step."""
        self._look()

    def _look(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        finite, event, names, batch, step = pending
        if event is not None:
            event.synchronize()  # of the step before: it is done
        if finite.all():
            return
        bad = [name for name, ok in zip(names, finite.tolist(), strict=True) if not ok]
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise NonFiniteError(
            f"Loss and gradients must be finite, got NaN or infinity in step {step + 1}: "
            f"{', '.join(bad[:4])}{more}.",
            phase="training_step",
            tensors=bad,
            minibatch=batch if isinstance(batch, dict) else {"batch": batch},
        )
