"""Recurrent cells over a sequence: gated recurrent unit (GRU) and long short-term memory (LSTM).

Axes: ``T`` step, ``M`` sequence, ``H`` feature, ``G`` gate inputs: 3 H for a GRU, 4 H for an LSTM.

The product of inputs and input weights is the same for all steps and is computed before, for all
steps at once; this file computes what depends on the step before. A sequence is one operator with a
gradient of its own, which a compiled graph holds as one node, whatever ``T`` is. For the gradient,
gates are computed again for all steps at once, and the gradient of the weights is one product over
all steps: only operations that are truly sequential run step by step.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float

__all__ = ["Cell", "backward_step", "forward_step", "unroll"]

Cell = Literal["gru", "lstm"]


def unroll(
    cell: Cell,
    x: Float[Tensor, "T M G"],
    begins: Bool[Tensor, "T M"] | None,
    memory: Float[Tensor, "M S"],
    weight: Float[Tensor, "G H"],
    bias: Float[Tensor, " G"],
) -> Float[Tensor, "T M S"]:
    """The memory after each step.

    The memory of a GRU is its output, ``S = H``; the memory of an LSTM is its output and then its
    cell, ``S = 2 H``.
    The equations, and the order of gates in ``G``, are those of ``torch.nn.GRUCell`` and
    ``torch.nn.LSTMCell``.

    Args:
        cell: Kind of the cell.
        x: Contribution of the inputs of each step to the gates.
        begins: Whether a sequence begins anew at a step, from a memory of zeros.
        memory: Memory before the first step.
        weight: Weights from the output of a step to the gates of the next step.
        bias: Biases of the gates.
    """
    if x.shape[0] == 1:  # acting: plain operations, which a compiler fuses with others
        before = memory if begins is None else memory.masked_fill(begins[0, :, None], 0.0)
        return _KINDS[cell].step(x[0], before, weight, bias)[None]
    if begins is None:
        begins = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    return _sequence(cell, x, begins, memory, weight, bias)


def _gru(x: Tensor, memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    size = memory.shape[-1]
    inner = torch.addmm(bias, memory, weight.t())
    reset, update = (x[:, : 2 * size] + inner[:, : 2 * size]).sigmoid().chunk(2, -1)
    new = (x[:, 2 * size :] + reset * inner[:, 2 * size :]).tanh()
    return new + update * (memory - new)


def _lstm(x: Tensor, memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    hidden, cell = memory.chunk(2, -1)
    gates = x + torch.addmm(bias, hidden, weight.t())
    enter, keep, new, out = gates.chunk(4, -1)
    cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return torch.cat([out.sigmoid() * cell.tanh(), cell], -1)


def _gru_slopes(
    x: Tensor, before: Tensor, after: Tensor, weight: Tensor, bias: Tensor
) -> tuple[list[Tensor], Tensor]:
    del after
    size = before.shape[-1]
    inner = torch.nn.functional.linear(before, weight, bias)
    reset, update = (x[..., : 2 * size] + inner[..., : 2 * size]).sigmoid().chunk(2, -1)
    inner = inner[..., 2 * size :]
    new = (x[..., 2 * size :] + reset * inner).tanh()
    by_new = (1.0 - update) * (1.0 - new * new)
    by_reset = by_new * inner * reset * (1.0 - reset)
    by_update = (before - new) * update * (1.0 - update)
    gates = torch.stack([by_reset, by_update, by_new * reset], -2)
    outer = torch.stack([by_reset, by_update, by_new], -2)
    return [gates, update], outer


def _gru_back(now: Tensor, gates: Tensor, kept: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    by_gates = (now[:, None] * gates).flatten(1)
    return torch.addmm(now * kept, by_gates, weight), by_gates


def _lstm_slopes(
    x: Tensor, before: Tensor, after: Tensor, weight: Tensor, bias: Tensor
) -> tuple[list[Tensor], None]:
    hidden, cell = before.chunk(2, -1)
    gates = x + torch.nn.functional.linear(hidden, weight, bias)
    enter, keep, new, out = gates.chunk(4, -1)
    enter, keep, new, out = enter.sigmoid(), keep.sigmoid(), new.tanh(), out.sigmoid()
    shown = after.chunk(2, -1)[1].tanh()
    by_cell = [new * enter * (1.0 - enter), cell * keep * (1.0 - keep), enter * (1.0 - new * new)]
    cell_by_output = out * (1.0 - shown * shown)
    last = shown * out * (1.0 - out)
    return [cell_by_output, torch.stack(by_cell, -2), last, keep], None


def _lstm_back(
    now: Tensor, cell_by_output: Tensor, gates: Tensor, last: Tensor, kept: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    by_hidden, by_cell = now.chunk(2, -1)
    by_cell = torch.addcmul(by_cell, by_hidden, cell_by_output)
    by_gates = torch.cat([(by_cell[:, None] * gates).flatten(1), by_hidden * last], -1)
    return torch.cat([by_gates @ weight, by_cell * kept], -1), by_gates


class _Kind(NamedTuple):
    """The functions of a cell.

    Attributes:
        step: The memory after a step: ``(x, memory, weight, bias) -> memory``.
        slopes: Derivatives at every step, computed before the backward loop over steps begins:
            ``(x, before, after, weight, bias) -> (slopes, outer)``. Slopes are ``[T, M, H]``, or
            ``[T, M, k, H]`` for ``k`` gates: of the gates by the memory (an LSTM: all but the
            last, by its cell), and of the memory by the one before, not through the gates; an
            LSTM has two more, of its cell and of its last gate by its output. ``outer`` are the
            derivatives of the gates' inputs by the memory, where they differ from those of gates.
        back: The gradients by the memory before a step and by its gates, from that by the memory
            after it: ``(gradient, *slopes, weight) -> (by_memory, by_gates)``.
    """

    step: Callable[..., Tensor]
    slopes: Callable[..., tuple[list[Tensor], Tensor | None]]
    back: Callable[..., tuple[Tensor, Tensor]]


_KINDS: dict[str, _Kind] = {
    "gru": _Kind(_gru, _gru_slopes, _gru_back),
    "lstm": _Kind(_lstm, _lstm_slopes, _lstm_back),
}


def forward_step(
    cell: str, memory: Tensor, x: Tensor, begins: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """The memory after a step of a sequence: the step of the operator ``recurrence``.

    Args:
        cell: Kind of the cell.
        memory: Memory before the step, ``[M, S]``.
        x: Contribution of the inputs to the gates, ``[M, G]``.
        begins: Whether a sequence begins anew, ``[M]``.
        weight: Weights from the output of a step to the gates of the next step, ``[G, H]``.
        bias: Biases of the gates, ``[G]``.
    """
    return _KINDS[cell].step(x, memory.masked_fill(begins[:, None], 0.0), weight, bias)


def backward_step(
    cell: str, carried: Tensor, gradient: Tensor, begins: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients at a step of a sequence: the step of the operator ``recurrence_backward``.

    Args:
        cell: Kind of the cell.
        carried: Gradient by the memory after the step, from the later steps, ``[M, S]``.
        gradient: Gradient by the memory after the step, from elsewhere, ``[M, S]``.
        begins: Whether a sequence begins anew at the step, ``[M]``.
        *others: Slopes of the step, and weights, ``[G, H]``.

    Returns:
        Gradients by the memory before the step, ``[M, S]``, and by the gates, ``[M, G]``.
    """
    by_memory, by_gates = _KINDS[cell].back(gradient + carried, *others)
    return by_memory.masked_fill(begins[:, None], 0.0), by_gates


def _exactly(device: torch.device) -> torch.autocast:
    """A context without autocast, whose roundings at every step would add up."""
    return torch.autocast(device.type, enabled=False)


@torch.library.custom_op("esper_lightning::recurrence", mutates_args=())
def _sequence(
    cell: str, x: Tensor, begins: Tensor, memory: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """The operator of ``unroll`` for more than one step."""
    after = x.new_empty(*x.shape[:2], memory.shape[-1])
    with _exactly(x.device):
        for t in range(len(x)):
            after[t] = memory = forward_step(cell, memory, x[t], begins[t], weight, bias)
    return after


# The schema is written out, because torch 2.6 cannot infer it from a Sequence.
@torch.library.custom_op(
    "esper_lightning::recurrence_backward",
    mutates_args=(),
    schema="(str cell, Tensor gradient, Tensor begins, Tensor[] slopes, Tensor weight) "
    "-> (Tensor, Tensor)",
)
def _sequence_backward(
    cell: str, gradient: Tensor, begins: Tensor, slopes: Sequence[Tensor], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by the memory before each step, and by the gates of each step."""
    by_memory = torch.empty_like(gradient)
    by_gates = gradient.new_empty(*gradient.shape[:2], weight.shape[0])
    carried = torch.zeros_like(gradient[0])
    with _exactly(gradient.device):
        for t in range(len(gradient) - 1, -1, -1):
            now = [slope[t] for slope in slopes]
            carried, by_gates[t] = backward_step(
                cell, carried, gradient[t], begins[t], *now, weight
            )
            by_memory[t] = carried
    return by_memory, by_gates


def _shape_of_sequence(cell: str, x: Tensor, begins: Tensor, memory: Tensor, *_: Tensor) -> Tensor:
    del cell, begins
    return x.new_empty(*x.shape[:2], memory.shape[-1])


def _shapes_of_gradients(
    cell: str, gradient: Tensor, begins: Tensor, slopes: Sequence[Tensor], weight: Tensor
) -> tuple[Tensor, Tensor]:
    del cell, begins, slopes
    by_gates = gradient.new_empty(*gradient.shape[:2], weight.shape[0])
    return torch.empty_like(gradient), by_gates


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.cell = inputs[0]
    ctx.save_for_backward(*inputs[1:], output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, begins, memory, weight, bias, after = ctx.saved_tensors
    size = weight.shape[1]
    with _exactly(x.device):
        before = torch.cat([memory[None], after[:-1]]).masked_fill(begins[:, :, None], 0.0)
        slopes, outer = _KINDS[ctx.cell].slopes(x, before, after, weight, bias)
        gradient = gradient.contiguous()
        by_memory, by_gates = _sequence_backward(ctx.cell, gradient, begins, slopes, weight)
        by_weight = by_gates.flatten(0, 1).t() @ before[..., :size].flatten(0, 1)
        by_x = by_gates
        if outer is not None:
            later = torch.cat([by_memory[1:], torch.zeros_like(by_memory[:1])])
            by_x = ((gradient + later)[:, :, None] * outer).flatten(2)
        by_bias = by_gates.sum((0, 1))
    return None, by_x, None, by_memory[0], by_weight, by_bias


_sequence.register_fake(_shape_of_sequence)
_sequence_backward.register_fake(_shapes_of_gradients)
_sequence.register_autograd(_backward, setup_context=_save)
