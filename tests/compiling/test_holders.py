"""Everything that a function holds is watched and restored: attributes, variables, classes."""

import functools
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper_lightning.compiling.holders import ImpureError
from esper_lightning.compiling.purity import results_of_pure
from esper_lightning.compiling.tracing import Traced

SEEN: dict[str, Tensor] = {}
CALLS = 0


class Slots:
    """A user's object without a dict."""

    __slots__ = ("calls", "more")

    def __init__(self) -> None:
        self.calls = 0


class Shared:
    """A class that counts for all its objects."""

    calls = 0


class Owner:
    """A user's object whose attributes change by calls, which does not show in the results."""

    calls = 0

    def __init__(self) -> None:
        self.last, self.log, self.table = None, [], {}
        self.names, self.array, self.slots = {"a"}, np.zeros((2, 2)), Slots()
        self.module = nn.Sequential(nn.Linear(2, 2))
        self.python, self.numpy = random.Random(0), np.random.default_rng(0)

    def count(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2.0

    def keep_last(self, x: Tensor) -> Tensor:
        self.last = x * 2.0
        return self.last

    def append(self, x: Tensor) -> Tensor:
        self.log.append(x)
        return x * 2.0

    def cache(self, x: Tensor) -> Tensor:
        return self.table.setdefault("two", torch.full((2,), 2.0)) * x

    def keep_in_module(self, x: Tensor) -> Tensor:
        self.module[0].last = x * 2.0
        return x * 2.0

    def python_stream(self, x: Tensor) -> Tensor:
        return x * (2.0 if self.python.random() < 2.0 else 3.0)

    def numpy_stream(self, x: Tensor) -> Tensor:
        return x * (2.0 if self.numpy.random() < 2.0 else 3.0)

    def add_to_set(self, x: Tensor) -> Tensor:
        self.names.add("b")
        return x * 2.0

    def write_to_array(self, x: Tensor) -> Tensor:
        self.array[1] += 1.0
        return x * 2.0

    def write_to_slots(self, x: Tensor) -> Tensor:
        self.slots.calls, self.slots.more = 1, True
        return x * 2.0

    def count_in_class(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return x * 2.0

    def count_in_other_class(self, x: Tensor) -> Tensor:
        Shared.calls += 1
        return x * 2.0

    def count_in_variable(self, x: Tensor) -> Tensor:
        global CALLS  # noqa: PLW0603 - as a user's module does
        CALLS += 1
        return x * 2.0

    def keep_in_variable(self, x: Tensor) -> Tensor:
        return self.kept(x)

    @staticmethod
    def kept(x: Tensor) -> Tensor:
        SEEN["last"] = x
        return x * 2.0

    def state(self) -> tuple[Any, ...]:
        of_streams = (self.python.getstate(), repr(self.numpy.bit_generator.state))
        attributes = [sorted(vars(one)) for one in (self, self.module[0])]
        counts = (Owner.calls, Shared.calls, CALLS, self.slots.calls, hasattr(self.slots, "more"))
        held = (self.last, self.log[:], self.table.copy(), self.names.copy(), SEEN.copy())
        return (attributes, held, self.array.tolist(), counts, of_streams)


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("count", "Owner.calls"),
        ("keep_last", "Owner.last"),
        ("append", "Owner.log"),
        ("cache", "Owner.table"),
        ("keep_in_module", "Linear.last"),
        ("python_stream", "Owner.python"),
        ("numpy_stream", "Owner.numpy"),
        ("add_to_set", "Owner.names"),
        ("write_to_array", "Owner.array"),
        ("write_to_slots", "Slots.calls"),
        ("count_in_class", "Owner.calls"),
        ("count_in_other_class", "Shared.calls"),
        ("count_in_variable", "CALLS"),
        ("keep_in_variable", "SEEN"),
    ],
)
def test_attributes_that_change_are_refused_and_restored(name: str, attribute: str) -> None:
    user = Owner()
    before, method = user.state(), getattr(user, name)
    for function in (method, functools.partial(method), lambda x: [method(x)]):
        with pytest.raises(ImpureError, match=f"an attribute that changes: {attribute}$"):
            results_of_pure(function, torch.ones(2))
        with pytest.raises(ImpureError, match=f"an attribute that changes: {attribute}$"):
            Traced(function, (torch.ones(2),), functional=True)  # would leave tensors of a tracer
        assert user.state() == before


def test_a_variable_of_a_closure_is_watched_and_an_error_restores_too() -> None:
    calls = 0

    def counting(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x * 2.0

    def failing(x: Tensor) -> Tensor:
        counting(x)
        raise KeyError("of the user")

    with pytest.raises(ImpureError, match="an attribute that changes: calls"):
        results_of_pure(counting, torch.ones(2))
    with pytest.raises(KeyError, match="of the user"):
        results_of_pure(failing, torch.ones(2))
    assert calls == 0


@pytest.mark.parametrize("stream", [random.random, np.random.rand])
def test_the_global_random_streams_are_refused_and_restored(
    stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what they decide is rare."""
    monkeypatch.delitem(sys.modules, "beartype", raising=False)  # of the tests
    states = lambda: (random.getstate(), str(np.random.get_state()))  # noqa: E731, NPY002
    before = states()
    with pytest.raises(ImpureError, match="random numbers of Python or NumPy"):
        results_of_pure(lambda x: x * (3.0 if stream() < 0.0 else 2.0), torch.ones(2))
    assert states() == before


def test_too_many_objects_to_watch_are_refused() -> None:
    agents = [{} for _ in range(20_000)]
    with pytest.raises(ImpureError, match="more than 20000 objects to watch, such as in agents"):
        results_of_pure(lambda x: x * len(agents), torch.ones(2))
