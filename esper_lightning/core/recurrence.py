"""Recurrent cells over a sequence: gated recurrent unit (GRU) and long short-term memory (LSTM).

Axes: ``T`` step, ``M`` sequence, ``H`` feature, ``G`` gate inputs: 3 H for a GRU, 4 H for an LSTM.

The product of inputs and input weights is the same for all steps and is computed before, for all
steps at once; this file computes what depends on the step before. A sequence is one operator with a
gradient of its own, which a compiled graph holds as one node, whatever ``T`` is. For the gradient,
gates are computed again for all steps at once, and the gradient of the weights is one product over
all steps: only operations that are truly sequential run step by step.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float

__all__ = ["Cell", "unroll"]

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


class _Slopes(NamedTuple):
    """Derivatives at every step, computed before the backward loop over steps begins.

    Each tensor is ``[T, M, H]``, or ``[T, M, k, H]`` for ``k`` gates.
    """

    cell: Tensor | None  # of the LSTM's cell by its output
    gates: Tensor  # of the gates by the memory (an LSTM: all but the last, by its cell)
    last: Tensor | None  # of the LSTM's last gate by its output
    kept: Tensor  # of the memory by the one before, not through the gates


def _gru_slopes(
    x: Tensor, before: Tensor, after: Tensor, weight: Tensor, bias: Tensor
) -> tuple[_Slopes, Tensor]:
    """Slopes, and derivatives by the inputs of gates, which differ from those by the memory."""
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
    return _Slopes(None, gates, None, update), outer


def _lstm_slopes(
    x: Tensor, before: Tensor, after: Tensor, weight: Tensor, bias: Tensor
) -> tuple[_Slopes, None]:
    hidden, cell = before.chunk(2, -1)
    gates = x + torch.nn.functional.linear(hidden, weight, bias)
    enter, keep, new, out = gates.chunk(4, -1)
    enter, keep, new, out = enter.sigmoid(), keep.sigmoid(), new.tanh(), out.sigmoid()
    shown = after.chunk(2, -1)[1].tanh()
    by_cell = [new * enter * (1.0 - enter), cell * keep * (1.0 - keep), enter * (1.0 - new * new)]
    slope = out * (1.0 - shown * shown)
    return _Slopes(slope, torch.stack(by_cell, -2), shown * out * (1.0 - out), keep), None


class _Kind(NamedTuple):
    step: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    slopes: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[_Slopes, Tensor | None]]


_KINDS: dict[str, _Kind] = {"gru": _Kind(_gru, _gru_slopes), "lstm": _Kind(_lstm, _lstm_slopes)}


def _exactly(device: torch.device) -> torch.autocast:
    """A context without autocast, whose roundings at every step would add up."""
    return torch.autocast(device.type, enabled=False)


@torch.library.custom_op("esper_lightning::recurrence", mutates_args=())
def _sequence(
    cell: str, x: Tensor, begins: Tensor, memory: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """The operator of ``unroll`` for more than one step."""
    step, after = _KINDS[cell].step, x.new_empty(*x.shape[:2], memory.shape[-1])
    fresh = begins[:, :, None]
    with _exactly(x.device):
        for t in range(len(x)):
            memory = step(x[t], memory.masked_fill(fresh[t], 0.0), weight, bias)
            after[t] = memory
    return after


@torch.library.custom_op("esper_lightning::recurrence_backward", mutates_args=())
def _sequence_backward(
    cell: str,
    x: Tensor,
    begins: Tensor,
    memory: Tensor,
    weight: Tensor,
    bias: Tensor,
    after: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``memory``, ``weight`` and ``bias``."""
    fresh = begins[:, :, None]
    with _exactly(x.device):
        before = torch.cat([memory[None], after[:-1]]).masked_fill(fresh, 0.0)
        slopes, outer = _KINDS[cell].slopes(x, before, after, weight, bias)
        inner, total = torch.empty_like(x), torch.empty_like(after)
        carried = torch.zeros_like(memory)
        size = weight.shape[1]
        for t in range(len(x) - 1, -1, -1):
            now = gradient[t] + carried
            total[t] = now
            if slopes.cell is None or slopes.last is None:  # a GRU
                inner[t] = (now[:, None] * slopes.gates[t]).flatten(1)
                carried = torch.addmm(now * slopes.kept[t], inner[t], weight)
            else:
                by_hidden, by_cell = now[:, :size], now[:, size:]
                by_cell = torch.addcmul(by_cell, by_hidden, slopes.cell[t])
                inner[t, :, : 3 * size] = (by_cell[:, None] * slopes.gates[t]).flatten(1)
                inner[t, :, 3 * size :] = by_hidden * slopes.last[t]
                carried = torch.cat([inner[t] @ weight, by_cell * slopes.kept[t]], -1)
            carried = carried.masked_fill(fresh[t], 0.0)
        by_weight = inner.flatten(0, 1).t() @ before[..., :size].flatten(0, 1)
        by_x = inner if outer is None else (total[:, :, None] * outer).flatten(2)
        by_bias = inner.sum((0, 1))
    return by_x, carried, by_weight, by_bias


def _shape_of_sequence(cell: str, x: Tensor, begins: Tensor, memory: Tensor, *_: Tensor) -> Tensor:
    del cell, begins
    return x.new_empty(*x.shape[:2], memory.shape[-1])


def _shapes_of_gradients(
    cell: str, x: Tensor, begins: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    del cell, begins
    return tuple(torch.empty_like(value) for value in (x, *others[:3]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.cell = inputs[0]
    ctx.save_for_backward(*inputs[1:], output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    by_x, *others = _sequence_backward(ctx.cell, *ctx.saved_tensors, gradient.contiguous())
    return None, by_x, None, *others


_sequence.register_fake(_shape_of_sequence)
_sequence_backward.register_fake(_shapes_of_gradients)
_sequence.register_autograd(_backward, setup_context=_save)
