"""A callback that stops at the first NaN, with the batch that reproduces the fault."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from esper_lightning.core.errors import NonFiniteError
from esper_lightning.core.tensor_trees import named_tensors

__all__ = ["NanGuard"]

_AHEAD = 8  # checks that may be waiting for the device


class NanGuard(Callback):
    """Stop the run at the first input, loss or gradient that is not finite.

    Works with any module whose steps go through Lightning: automatic optimisation, or manual with
    ``manual_backward`` and the optimizers of ``self.optimizers()``. ``PPO`` needs no ``NanGuard``:
    it has checks of its own. With a ``FlightRecorder`` the batch is stored in ``rank<k>/nan.pt``.
    On a CPU the faulty step is not applied. On a GPU nothing waits for the device: a fault is known
    when its flag has arrived, at most a few steps later; the stored batch is the faulty one. Under
    a gradient scaler (``16-mixed``) gradients are not checked: the scaler finds its scale by
    infinite gradients, and skips their steps.

    Raises:
        NonFiniteError: If a value is not finite; names the step, and the tensors concerned.
    """

    def __init__(self) -> None:
        self._batch: Any = None
        self._looks: deque[_Look] = deque()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the checks of an earlier run."""
        self._batch = None
        self._looks.clear()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hold the batch until the next one."""
        self._batch = batch

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Check the batch and the loss."""
        inputs = {
            f"batch.{name}" if name else "batch": tensor
            for name, tensor in named_tensors(self._batch)
            if tensor.is_floating_point() and tensor.device == loss.device
        }
        self._look_at({**inputs, "loss": loss.detach()}, trainer.global_step)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the gradients."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = {
            f"gradient of {name}": parameter.grad
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None
        }
        if gradients:
            self._look_at(gradients, trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the checks of the last steps."""
        self._judge(ahead=0)

    def _look_at(self, named: Mapping[str, Tensor], step: int) -> None:
        elements = {name: _elements(tensor.detach()) for name, tensor in named.items()}
        elements = {name: tensor for name, tensor in elements.items() if tensor.numel()}
        if not elements:
            return
        # A norm is not finite where an element is not: one fused call serves all tensors.
        norms = torch._foreach_norm(list(elements.values()), float("inf"))  # pyright: ignore[reportPrivateUsage]
        finite, event = torch.stack([norm.float() for norm in norms]).isfinite(), None
        if finite.is_cuda:
            # Into pinned memory: a copy into pageable memory would wait for the device.
            on_host = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True)
            finite = on_host.copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(norms[0].device))
        self._looks.append(_Look(finite, event, list(elements), self._batch, step))
        self._judge(ahead=_AHEAD)

    def _judge(self, *, ahead: int) -> None:
        """Raise if a check found a fault; wait while more than ``ahead`` checks are open."""
        while self._looks:
            look = self._looks[0]
            if look.event is not None and not look.event.query():
                if len(self._looks) <= ahead:
                    return
                look.event.synchronize()
            self._looks.popleft()
            if not look.finite.all():
                raise _error(look)


class _Look(NamedTuple):
    finite: Tensor  # on the host, once ``event`` has occurred
    event: torch.cuda.Event | None
    names: list[str]
    batch: Any
    step: int


def _elements(tensor: Tensor) -> Tensor:
    """All elements of a dense tensor; the stored values of a sparse one, unsorted.

    To sort the values would wait for the device.
    """
    if tensor.layout == torch.sparse_coo:
        return tensor._values()
    return tensor if tensor.layout == torch.strided else tensor.values()


def _error(look: _Look) -> NonFiniteError:
    bad = [name for name, ok in zip(look.names, look.finite.tolist(), strict=True) if not ok]
    more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
    return NonFiniteError(
        f"Inputs, loss and gradients must be finite, got NaN or infinity in step {look.step + 1}: "
        f"{', '.join(bad[:4])}{more}.",
        phase="training_step",
        tensors=bad,
        minibatch=look.batch if isinstance(look.batch, dict) else {"batch": look.batch},
    )
