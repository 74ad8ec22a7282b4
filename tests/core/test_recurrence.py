"""Recurrent cells and their gradients, against those of torch, over several episodes."""

import pytest
import torch
from torch import Tensor, nn

from esper_lightning.core.recurrence import unroll

STEPS, ROWS, SIZE = 6, 4, 3
CELLS = {"gru": (3, 1), "lstm": (4, 2)}  # gates, and what a memory holds, in units of SIZE
each_cell = pytest.mark.parametrize("cell", CELLS)


def arguments(cell: str, steps: int = STEPS, **kind) -> tuple[Tensor, ...]:
    gates, held = CELLS[cell]
    shapes = [(steps, ROWS, gates * SIZE), (ROWS, held * SIZE), (gates * SIZE, SIZE)]
    generator = torch.Generator().manual_seed(0)
    kind = {"dtype": torch.float64, **kind}
    return tuple(
        torch.randn(shape, generator=generator, **kind) for shape in (*shapes, (gates * SIZE,))
    )


def some_begin(steps: int = STEPS) -> Tensor:
    begins = torch.rand(steps, ROWS, generator=torch.Generator().manual_seed(1)) < 0.3
    begins[0, 0] = begins[-1, 1] = True
    return begins


def by_torch(cell: str, x: Tensor, begins: Tensor, *others: Tensor) -> Tensor:
    """The memories of torch's cell, step by step, with the inputs given to the gates unchanged."""
    memory, weight, bias = others
    kind = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[cell]
    theirs = kind(x.shape[-1], SIZE, dtype=x.dtype)
    held = {
        "weight_ih": torch.eye(x.shape[-1], dtype=x.dtype),
        "bias_ih": torch.zeros(x.shape[-1], dtype=x.dtype),
        "weight_hh": weight,
        "bias_hh": bias,
    }
    after = []
    for now, begin in zip(x, begins, strict=True):
        memory = torch.where(begin[:, None], 0.0, memory)
        state = memory if cell == "gru" else memory.split(SIZE, -1)
        state = torch.func.functional_call(theirs, held, (now, state))
        memory = state if cell == "gru" else torch.cat(state, -1)
        after.append(memory)
    return torch.stack(after)


@each_cell
@pytest.mark.parametrize("steps", [1, STEPS])
def test_memories_and_their_gradients_equal_those_of_torch(cell: str, steps: int) -> None:
    x, *others = (value.requires_grad_() for value in arguments(cell, steps))
    begins = some_begin(steps)
    after, expected = unroll(cell, x, begins, *others), by_torch(cell, x, begins, *others)
    torch.testing.assert_close(after, expected)
    weight = torch.randn(after.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    gradients = torch.autograd.grad((after * weight).sum(), [x, *others])
    theirs = torch.autograd.grad((expected * weight).sum(), [x, *others])
    for got, wanted in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(got, wanted)


@each_cell
def test_steps_one_by_one_equal_the_sequence(cell: str) -> None:
    x, memory, weight, bias = arguments(cell, dtype=torch.float32)
    begins, first = some_begin(), memory
    for t in range(STEPS):
        memory = unroll(cell, x[t : t + 1], begins[t : t + 1], memory, weight, bias)[0]
        whole = unroll(cell, x, begins, first, weight, bias)
        assert torch.equal(whole[t], memory)
    none = torch.zeros_like(begins)
    assert torch.equal(
        unroll(cell, x, None, first, weight, bias), unroll(cell, x, none, first, weight, bias)
    )


@each_cell
def test_nothing_passes_the_beginning_of_an_episode(cell: str) -> None:
    """No number passes forwards, also none that is not finite, and no gradient backwards."""
    x, memory, weight, bias = arguments(cell)
    begins = torch.zeros(STEPS, ROWS, dtype=torch.bool)
    begins[3] = True
    expected = unroll(cell, x, begins, memory, weight, bias)[3:]
    x[:3] = torch.nan
    memory[:] = torch.nan
    assert torch.equal(unroll(cell, x, begins, memory, weight, bias)[3:], expected)

    x, memory, weight, bias = (value.requires_grad_() for value in arguments(cell))
    after = unroll(cell, x, begins, memory, weight, bias)
    by_x, by_memory = torch.autograd.grad(after[3:].sum(), [x, memory])
    assert (by_x[:3] == 0.0).all()
    assert (by_memory == 0.0).all()
    assert (by_x[3:] != 0.0).any()


@each_cell
def test_memories_are_exact_under_autocast(cell: str) -> None:
    x, *others = (v.requires_grad_() for v in arguments(cell, dtype=torch.float32))

    def results() -> tuple[Tensor, ...]:
        after = unroll(cell, x, some_begin(), *others)
        return after, *torch.autograd.grad(after.sum(), [x, *others])

    exact = results()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = results()
    for got, expected in zip(rounded, exact, strict=True):
        assert torch.equal(got, expected)
