"""What a function does now is compared with what it did at first, whatever its results are."""

import ctypes
import io
from contextvars import ContextVar

import numpy as np
import pytest
import torch
from torch import nn

from esper_lightning.compiling.audits import Audit, Whole
from esper_lightning.compiling.rehearsals import Rehearsal

X = torch.linspace(-1, 1, 6).view(2, 3)
HIDDEN = ContextVar("hidden", default=1.0)


def rare(x, number):
    """A result in which a number is seen only where ``x`` is large."""
    return torch.where(x > 100, number, x)


class Base:
    factor = 1.0


class Other(Base):
    factor = 2.0


def of_module_order():
    layers = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})

    def function(x):
        for layer in layers.values():
            x = layer(x)
        return x

    return function, lambda: layers._modules.update(a=layers._modules.pop("a"))


def of_two_tensors():
    held = [torch.zeros(3), torch.ones(3)]
    return (lambda x: rare(x, held[0])), held.reverse


def of_a_closure():
    number = 1.0

    def change():
        nonlocal number
        number = 2.0

    return (lambda x: rare(x, number)), change


def of_a_class():
    held = Base()
    return (lambda x: rare(x, held.factor)), lambda: setattr(held, "__class__", Other)


def of_a_context():
    return (lambda x: rare(x, HIDDEN.get())), lambda: HIDDEN.set(2.0)


def of_a_file():
    file = io.StringIO("1.0")
    return (lambda x: rare(x, float(file.getvalue()))), lambda: file.write("2")


def of_ctypes():
    number = ctypes.pointer(ctypes.c_float(1.0))
    return (lambda x: rare(x, number.contents.value)), lambda: setattr(number.contents, "value", 2)


def of_order():
    held = {"a": 1.0, "b": 2.0}
    return (lambda x: rare(x, next(iter(held.values())))), lambda: held.update(a=held.pop("a"))


def of_zero():
    held = [0.0]
    return (lambda x: rare(x, 1 / (x * 0 + held[0]))), lambda: held.__setitem__(0, -0.0)


def of_numbers_in_a_tensor():
    held = [1.0, 2.0, 3.0]
    return (lambda x: rare(x, torch.tensor(held))), lambda: held.__setitem__(2, 4.0)


def of_numpy():
    held = np.ones(3, np.float32)
    return (lambda x: rare(x, torch.from_numpy(held.copy()))), lambda: held.fill(2.0)


def of_a_branch():
    held = [torch.relu]
    return (lambda x: rare(x, held[0](x))), lambda: held.__setitem__(0, torch.tanh)


def of_the_results():
    names = ["a", "b"]
    return (lambda x: dict(zip(names, (x, x + 1), strict=True))), names.reverse


def of_a_tensor_with_the_former_numbers():
    held = [torch.zeros(3)]
    former = held[0]

    def change():
        former.fill_(1.0)  # which a program follows
        held[0] = torch.zeros(3)

    return (lambda x: rare(x, held[0])), change


def of_views_of_one_memory():
    base, number = torch.arange(6.0).view(2, 3), [0]
    rows = base.unbind(0)
    return (lambda x: rare(x, base.mean() + rows[number[0]])), lambda: number.__setitem__(0, 1)


def of_views_that_operations_make():
    number = [0]
    return (lambda x: rare(x, (x + 1).unbind(0)[number[0]])), lambda: number.__setitem__(0, 1)


def of_a_large_array():
    number = [1.0]

    def function(x):
        return rare(x, torch.from_numpy(np.full(300_000, number[0])).max().float())

    return function, lambda: number.__setitem__(0, 2.0)


def of_another_tensor_with_less():
    held = [torch.ones(3)]
    return (lambda x: rare(x, held[0])), lambda: held.__setitem__(0, torch.ones(1))


def of_an_error():
    held = {"a": 1.0}
    return (lambda x: rare(x, held["a"])), held.clear


def of_the_default_dtype():
    return (lambda x: rare(x, torch.zeros(3))), lambda: torch.set_default_dtype(torch.float64)


MADE = [value for name, value in list(globals().items()) if name.startswith("of_")]


@pytest.fixture(autouse=True)
def as_before():
    token, dtype = HIDDEN.set(1.0), torch.get_default_dtype()
    yield
    HIDDEN.reset(token)
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("made", MADE, ids=lambda one: one.__name__)
def test_every_change_is_seen_though_results_are_the_same(made):
    function, change = made()
    rehearsal = Rehearsal(function, (X,))
    assert rehearsal.changed() is None
    assert rehearsal.changed() is None
    change()
    changed = rehearsal.changed()
    assert changed
    assert len(changed) < 150


def test_the_change_is_named():
    number = [2.0]
    rehearsal = Rehearsal(lambda x: (x + 1) * number[0], (X,))
    number[0] = 3.0
    assert rehearsal.changed() == "aten.mul.Tensor(... 3.0) instead of aten.mul.Tensor(... 2.0)"


def test_numbers_of_tensors_and_places_of_arguments_are_no_change():
    weights, held = nn.Linear(3, 3), torch.zeros(3)

    def function(x, y):
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            loss = (weights(x) * held + y.t().contiguous().t()).square().sum()
        (gradient,) = torch.autograd.grad(loss, x)
        return gradient, torch.as_tensor([1.0, 2.0]), torch.from_numpy(np.ones(300_000))

    rehearsal = Rehearsal(function, (X, X))
    with torch.no_grad():
        for tensor in (*weights.parameters(), held):
            tensor.add_(1.0)
    assert rehearsal.changed() is None
    with torch.inference_mode():
        assert rehearsal.changed() is None
    with torch.enable_grad():
        assert rehearsal.changed() is None
    held.data = torch.full((3,), 5.0)  # programs follow a tensor to its memory
    assert rehearsal.changed() is None
    with torch.no_grad():
        held.resize_(1)
    assert rehearsal.changed() is not None


def test_shapes_and_strides_of_arguments_are_kept():
    seen = []

    def function(x, pair):
        seen.append((x.shape, x.stride(), x.dtype, pair[0].shape, pair[0].stride(), pair[1]))
        assert not x.any()
        return x + 1

    args = (torch.ones(3, 4).t(), (torch.ones(1, 2).expand(5, 2), None))
    assert Rehearsal(function, args).changed() is None
    assert seen == [(*[(4, 3), (1, 4), torch.float32], (5, 2), (0, 1), None)] * 2
    empty = torch.ones(0, 2, dtype=torch.bool)
    assert Rehearsal(lambda x: x.logical_not(), (empty,)).changed() is None


def test_a_function_that_divides_integers_is_rehearsed_on_ones():
    number = [2.0]
    rehearsal = Rehearsal(lambda x: 7 // x * number[0], (torch.tensor([3]),))
    assert rehearsal.changed() is None
    number[0] = 3.0
    assert rehearsal.changed() is not None


def test_a_function_that_bears_neither_zeros_nor_ones_is_rehearsed_on_its_arguments():
    table, number = torch.arange(20.0), [2.0]

    def function(place):
        return table[place - 100] * number[0]

    place = torch.tensor([119, 100])
    rehearsal = Rehearsal(function, (place,))
    place.zero_()
    assert rehearsal.changed() is None
    number[0] = 3.0
    assert (rehearsal.changed() or "").startswith("aten.mul")
    with pytest.raises(IndexError):
        Rehearsal(function, (place,))


def test_lack_of_memory_is_no_change():
    lacks = []

    def function(x):
        if lacks:
            raise MemoryError
        return x + 1

    rehearsal = Rehearsal(function, (X,))
    lacks.append(1)
    assert rehearsal.changed() is None


def test_an_audit_finds_it_before_native_code_is_called_and_counts_the_calls():
    number, native = [2.0], []

    def function(x):
        return rare(x, number[0])

    def program(x):
        native.append(1)
        return function(x)

    audit = Audit(Whole())
    audit.rehearse(function, (X,))
    for _ in range(6):
        if audit.is_due():
            audit.call(program, function, (X,))
    number[0] = 3.0
    assert not audit.is_due()
    assert audit.is_due()
    called = len(native)
    _, differs = audit.call(program, function, (X,))
    assert len(native) == called
    assert differs is not None
    assert differs.startswith("other operations than at first: aten.scalar_tensor.default(3.0")
    assert differs.endswith("(in 2 calls at most)")  # 6 and 7; the eighth is not used
    assert (audit.changed() or "").endswith("(in 3 calls at most)")
