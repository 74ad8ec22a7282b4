"""What is not a pure function is refused before it changes anything, and runs eagerly."""

import copy
import ctypes
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_lightning.compiling.holders import ImpureError
from esper_lightning.compiling.loops import compile_function, compile_loop, compile_map
from esper_lightning.compiling.purity import results_of_pure, same_bits

CPU = torch.device("cpu")


class Holder:
    """A user's object with a tensor, a number and a random stream."""

    def __init__(self) -> None:
        self.held, self.calls = torch.tensor([1.0, 2.0]), 0
        self.generator = torch.Generator().manual_seed(1)

    def in_place(self, x: Tensor) -> Tensor:
        self.held.add_(1.0)
        return x * self.held

    def by_view(self, x: Tensor) -> Tensor:
        self.held[1:].view(1, 1)[0].mul_(2.0)
        return x * self.held

    def out(self, x: Tensor) -> Tensor:
        return torch.add(x, 1.0, out=self.held) * 2.0

    def all_at_once(self, x: Tensor) -> Tensor:
        torch._foreach_add_([self.held], 1.0)
        return x * self.held

    def argument(self, x: Tensor) -> Tensor:
        return x.mul_(2.0)

    def random(self, x: Tensor) -> Tensor:
        return x + torch.rand(2, generator=self.generator)

    def list_of_numbers(self, x: Tensor) -> Tensor:
        return x * self.held.tolist()[0]

    def number(self, x: Tensor) -> Tensor:
        return x * float(self.held[0])

    def branch(self, x: Tensor) -> Tensor:
        return x * 2.0 if self.held[0] > 0.0 else x

    def new_data(self, x: Tensor) -> Tensor:
        self.held.data = self.held + 1.0
        return x * self.held


a, b, place = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(1)
WAYS_AROUND_OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x * torch.tensor([[a], [b]])[0],
    "as_tensor": lambda x: x * torch.as_tensor([a, b]),
    "asarray": lambda x: x * torch.asarray((a, b)),
    "new_tensor": lambda x: x * x.new_tensor(data=[[a, b]]),
    "an index": lambda x: x.view(1, 2)[:, [place]],
    "a number": lambda x: x * torch.FloatTensor([a, b]),
    "Tensor.numpy": lambda x: x * torch.from_numpy(a.numpy().copy()),
    "Tensor.__array__": lambda x: x * float(np.asarray(a)),
    "Tensor.__dlpack__": lambda x: x * torch.from_dlpack(a),
    "Tensor.data_ptr": lambda x: x * ctypes.c_float.from_address(a.data_ptr()).value,
    "Tensor.untyped_storage": lambda x: x * a.untyped_storage()[0],
    "Tensor.__deepcopy__": lambda x: x * copy.deepcopy(a),
    "Tensor.__format__": lambda x: x * float(f"{a:.3f}"),
    "Tensor.__repr__": lambda x: x * float(repr(a)[7:-1]),
    "untyped_storage": lambda x: x * pickle.loads(pickle.dumps(a)),
}


@pytest.mark.parametrize("name", WAYS_AROUND_OPERATIONS)
def test_numbers_that_operations_do_not_show_are_refused(name: str) -> None:
    with pytest.raises(ImpureError, match=name) as caught:
        results_of_pure(WAYS_AROUND_OPERATIONS[name], torch.ones(2))
    assert len(str(caught.value)) < 100


RARE: dict[str, Callable[..., Any]] = {
    "loop": lambda body: compile_loop("rollout", body, mode="auto", device=CPU),
    "function": lambda body: compile_function("update", body, mode="auto", device=CPU),
}


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("kind", RARE)
def test_a_list_of_tensors_with_a_rare_effect_is_never_read_as_it_was(kind: str) -> None:
    """Its effect is not in what comparisons look at: the first step, and a few numbers."""
    bonus, penalty = torch.tensor(0.0), torch.tensor(-1.0)

    def body(carry: Tensor, x: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
        worth = torch.tensor([bonus, penalty])
        return carry, torch.where(x + constants > 7.0, worth[0], carry + bonus * 0.0)

    run, constants = RARE[kind](body), torch.zeros(1)
    given: Any = (torch.zeros(1000), torch.arange(1000.0) * 0.00701, constants)
    if kind == "loop":
        given = (torch.zeros(1), torch.arange(9.0)[:, None], None, constants, None)
    run(*given)
    bonus.fill_(10.0)
    assert run(*given)[1].max() == 10.0


def test_lists_of_numbers_and_operations_on_lists_of_tensors_are_pure() -> None:
    def function(x: Tensor) -> Tensor:
        y = (
            torch.tensor([[1.0, 2.0]]) * torch.stack([a, b])
            + x[place[None]]
            + x[torch.tensor([0, 1])]
        )
        y[:, [0, 1]] *= torch.as_tensor(b) * torch.tensor(a.shape).sum()
        return torch.cat([y, y])

    assert results_of_pure(function, torch.ones(2))[0].tolist() == [[0.0, 0.0]] * 2


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("in_place", "add_"),
        ("by_view", "mul_"),
        ("out", "add.out"),
        ("all_at_once", "_foreach_add_"),
        ("argument", "mul_"),
        ("random", "random numbers"),
        ("list_of_numbers", "list of Python"),
        ("number", "a number of a tensor"),
        ("branch", "a number of a tensor"),
        ("new_data", "other data"),
    ],
)
def test_effects_are_refused_before_they_happen(name: str, what: str) -> None:
    user, x = Holder(), torch.ones(2)
    stream = user.generator.get_state()
    with pytest.raises(ImpureError, match=what) as caught:
        results_of_pure(getattr(user, name), x)
    assert "\n" not in str(caught.value)
    assert user.held.tolist() == [1.0, 2.0]
    assert x.tolist() == [1.0, 1.0]
    assert torch.equal(user.generator.get_state(), stream)


def test_results_that_change_from_call_to_call_are_refused() -> None:
    calls = itertools.count()
    with pytest.raises(ImpureError, match="change from call to call"):
        results_of_pure(lambda x: x + next(calls), torch.ones(2))


def test_a_pure_function_may_write_to_what_it_made_and_give_nan() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y, table = x * 2.0, torch.tensor([1.0, 2.0])
        y[0] = float("nan")
        table.add_(1.0)
        with torch.enable_grad():
            weight = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((weight * table).square().sum(), [weight])
        return y, gradient

    y, gradient = results_of_pure(function, torch.ones(2))
    assert y.isnan().tolist() == [True, False]
    assert gradient.tolist() == [8.0, 18.0]


def test_attention_without_dropout_is_not_random() -> None:
    x = torch.ones(2, 1, 3, 4)
    results_of_pure(torch.nn.functional.scaled_dot_product_attention, x, x, x)
    dropping = partial(torch.nn.functional.scaled_dot_product_attention, dropout_p=0.5)
    with pytest.raises(ImpureError, match="random numbers"):
        results_of_pure(dropping, x, x, x)


def test_results_of_any_layout_are_compared() -> None:
    x = torch.arange(6.0).view(1, 2, 3)
    first, second, third = results_of_pure(lambda x: (x[:, 0, 0], x.transpose(1, 2), x[0, 0, 0]), x)
    assert (first.tolist(), second.shape, third.item()) == ([0.0], (1, 3, 2), 0.0)
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
    assert not same_bits(torch.zeros(1), torch.zeros(1, 1))


@pytest.mark.usefixtures("native_code")
def test_a_loop_and_a_map_leave_what_they_hold_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """Also what asks whether samples depend on each other runs on nothing of the user's."""
    held, index, samples = torch.zeros(()), torch.arange(512)[None], torch.ones(512)

    def summed(carry: Tensor, index: Tensor, constants: Tensor) -> Tensor:
        held.add_(1.0)
        return constants[index].sum()

    def counted(rows: Tensor, _: Any) -> Tensor:
        held.add_(1.0)
        return rows * 2.0

    loop = compile_loop("loop", lambda c, x, k: (c + x[0], c), summed, mode="auto", device=CPU)
    total, _ = loop(torch.zeros(()), torch.zeros(1), index, samples, None)
    assert total == 512.0
    assert held == 1.0  # of the one call that ran eagerly
    body = lambda c, x, k: (c + held.add_(1.0) * 0.0, x)  # noqa: E731
    loop = compile_loop("loop", body, mode="auto", device=CPU)
    loop(torch.zeros(()), torch.zeros(2), None, None, None)
    assert held == 3.0  # once in each of two steps
    held.fill_(1.0)
    rows = compile_map("map", counted, mode="auto", device=CPU)
    assert rows(samples, None).sum() == 1024.0
    assert held == 2.0
    assert (
        len([one for one in caplog.records if "writing to" in one.getMessage()]) == 1
    )  # one reason


@pytest.mark.usefixtures("native_code")
def test_a_function_that_counts_its_calls_counts_on() -> None:
    user = Holder()

    def counting(x: Tensor) -> Tensor:
        user.calls += 1
        return x + user.calls

    function = compile_function("test", counting, mode="auto", device=CPU)
    first, second = function(torch.zeros(1)).item(), function(torch.zeros(1)).item()
    assert second == first + 1.0
