"""Recurrent sequences in native code give what the eager operators give, with their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_lightning.compiling.native.loops import NativeFunction
from esper_lightning.core.recurrence import Cell, unroll

CELLS: dict[Cell, tuple[int, int]] = {"gru": (3, 1), "lstm": (4, 2)}


def sequences(cell: Cell, steps: int, rows: int, size: int, seed: int) -> list[Tensor]:
    gates, held = CELLS[cell]
    generator = torch.Generator().manual_seed(seed)
    shapes = [(steps, rows, gates * size), (rows, held * size), (gates * size, size)]
    floats = [torch.randn(shape, generator=generator) for shape in (*shapes, (gates * size,))]
    begins = torch.rand(steps, rows, generator=generator) < 0.3
    return [floats[0], begins, *floats[1:]]


def with_gradients(cell: Cell):
    def run(x: Tensor, begins: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for value in (x, *others)]
            after = unroll(cell, leaves[0], begins, *leaves[1:])
            score = (after * (after - 1.0)).sum()
            return after.detach(), *torch.autograd.grad(score, leaves)

    return run


@settings(max_examples=12)
@given(
    cell=st.sampled_from(list(CELLS)),
    steps=st.integers(2, 5),
    rows=st.sampled_from([1, 3, 16, 64, 128]),
    size=st.sampled_from([1, 3, 8, 17]),
    seed=st.integers(0, 2**32),
)
def test_sequences_and_their_gradients_equal_eager_ones(
    cell: Cell, steps: int, rows: int, size: int, seed: int
) -> None:
    run, given = with_gradients(cell), sequences(cell, steps, rows, size, seed)
    for got, expected in zip(NativeFunction(run)(*given), run(*given), strict=True):
        largest = float(expected.abs().max()) + 1.0
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6 * largest)


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_passes_the_beginning_of_an_episode(cell: Cell) -> None:
    x, begins, memory, *others = sequences(cell, 4, 3, 5, seed=0)
    begins[:] = False
    begins[2] = True
    x[:2], memory[:] = torch.nan, torch.inf
    native = NativeFunction(lambda *values: unroll(cell, *values))
    got = native(x, begins, memory, *others)
    assert got[:2].isnan().any()
    torch.testing.assert_close(got[2:], unroll(cell, x, begins, memory, *others)[2:])


@pytest.mark.parametrize("cell", CELLS)
def test_the_bits_do_not_depend_on_the_number_of_threads(cell: Cell) -> None:
    given = sequences(cell, 3, 256, 8, seed=0)
    native, before = NativeFunction(with_gradients(cell)), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(native(*given))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_a_view_and_a_broadcast_sequence_are_read_where_they_lie() -> None:
    x, begins, memory, weight, bias = sequences("gru", 4, 6, 3, seed=1)

    def run(x: Tensor, begins: Tensor, memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return unroll(
            "gru", x.transpose(0, 1), begins.t(), memory[:1].expand_as(memory), weight, bias
        )

    given = (x.transpose(0, 1).contiguous(), begins.t().contiguous(), memory, weight, bias)
    torch.testing.assert_close(NativeFunction(run)(*given), run(*given))
