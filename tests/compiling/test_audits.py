"""Native code that no longer does what its function does is found, and told."""

import re
from collections import Counter
from contextvars import ContextVar
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from esper_lightning.compiling.audits import Audit, FirstRows, FirstStep, Whole
from esper_lightning.compiling.loops import (
    compile_function,
    compile_loop,
    compile_map,
    log_reasons_again,
)

CPU = torch.device("cpu")
OTHERS = "results that are no longer those of the function: "
ALL_OTHERS = OTHERS + "the result (in 0 calls at most)"
HIDDEN = ContextVar("scale", default=1.0)


class Row(NamedTuple):
    kept: Tensor
    reward: Tensor


def scale() -> float:
    """A number in a place that no watch looks at."""
    return HIDDEN.get()


def loop_body(carry: Tensor, x: Tensor, constants: Tensor) -> tuple[Tensor, Row]:
    carry = carry + x
    return carry, Row(carry, carry * scale() + constants)


def of_loop(loop):
    carry, rows = loop(torch.zeros(3), torch.ones(4, 3), None, torch.ones(3), None)
    assert torch.equal(carry, torch.full((3,), 4.0))
    return rows.reward[-1, 0].item() - 1


def of_function(function):
    return function(torch.full((3,), 4.0))[0].item()


def of_map(function):
    return function(torch.full((200,), 4.0), torch.ones(1))[0].item()


@pytest.fixture(params=["loop", "function", "map"])
def called(request):
    """A function that calls native code, and the name of the result that will differ."""
    if request.param == "loop":
        loop = compile_loop("rollout", loop_body, mode="auto", device=CPU)
        return lambda: of_loop(loop)
    if request.param == "function":
        function = compile_function("values", lambda x: x * scale(), mode="auto", device=CPU)
        return lambda: of_function(function)
    rows = compile_map("acting", lambda x, k: x * scale() * k, mode="auto", device=CPU)
    return lambda: of_map(rows)


@pytest.mark.usefixtures("native_code")
def test_what_the_watch_does_not_see_is_found_within_256_calls(called, caplog):
    log_reasons_again()
    for _ in range(70):
        assert called() == 4.0
    token = HIDDEN.set(10.0)
    found = [called() for _ in range(130)]
    HIDDEN.reset(token)
    right = found.index(40.0)
    assert 0 < right < 128
    assert found[:right] == [4.0] * right
    assert found[right:] == [40.0] * (130 - right)
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1
    assert "other operations than at first: aten.mul.Tensor(... 10.0) instead of" in lines[0]
    assert re.search(r"\(in 7 calls at most\)", lines[0])


def test_comparisons_become_rare():
    audit, large = Audit(Whole()), Audit(Whole())
    large.rehearse(torch.clone, (torch.ones(2**16),))
    due, of_large = ([k for k in range(1, 5121) if one.is_due()] for one in (audit, large))
    assert due[:14] == [1, 2, 4, 5, 8, 11, 16, 28, 32, 56, 64, 72, 128, 247]
    assert {2**k for k in range(13)} < {*due} & {*of_large}
    for every, found in ((256, due), (32, of_large)):
        blocks = Counter(k // every for k in found if k & (k - 1) and k % 1024 and k >= every)
        # At a power of two that is also the place of its block, there is one less.
        assert all(blocks[k] == 1 or k & (k - 1) == 0 for k in range(1, 5120 // every))
    # A change that comes and goes regularly is met.
    for period in range(2, 30):
        assert {k % period for k in of_large} == {*range(period)}


def test_results_are_compared_more_rarely_than_operations():
    audit, native, compared = Audit(Whole()), [], []

    def program(x):
        native.append(1)
        return x

    def function(x):
        compared.append(len(native))
        return x

    x = torch.ones(2)
    for _ in range(1024):
        if audit.is_due():
            audit.call(program, function, (x,))
        else:
            program(x)
    assert compared == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


def native_of(change):
    return lambda *args: change(args[0].clone())


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda x: x + 1e-6, False),
        (lambda x: x * (1 + 1e-5), False),
        (lambda x: torch.where(torch.arange(400) == 7, 100.0, x), False),  # a tie went otherwise
        (lambda x: torch.where(torch.arange(400) < 7, 100.0, x), True),
    ],
)
def test_a_difference_of_few_numbers_counts_if_it_comes_twice(change, differs):
    x = torch.linspace(-2, 2, 400)
    x[0], x[1] = float("nan"), float("inf")
    audit, native = Audit(Whole()), native_of(change)
    assert audit.is_due()
    assert audit.call(native, torch.clone, (x,))[1] is None
    assert audit.is_due()
    assert not audit.is_due() or differs  # a suspicion is followed up at once
    assert (audit.call(native, torch.clone, (x,))[1] is not None) == differs
    got, name = audit.call(native_of(torch.clone), torch.clone, (x,))
    assert (torch.equal(got.nan_to_num(), x.nan_to_num()), name) == (True, None)


@pytest.mark.parametrize(
    "change", [lambda x: x * 1.1, lambda x: x + 1, lambda x: x.fill_(float("nan"))]
)
def test_a_difference_of_most_numbers_counts_at_once(change):
    audit, x = Audit(Whole()), torch.linspace(-2, 2, 400)
    assert audit.is_due()
    assert (
        audit.call(native_of(change), torch.clone, (x,))[1]
        == OTHERS + "the result (in 0 calls at most)"
    )
    audit, x = Audit(Whole()), torch.linspace(-2, 2, 4)
    assert audit.is_due()
    assert audit.call(native_of(change), torch.clone, (x,))[1] is None


def test_a_difference_is_named_by_its_field():
    row = Row(torch.ones(1, 2), torch.ones(1, 2))
    audit = Audit(FirstStep())
    args = (torch.ones(2), torch.ones(3, 2), None, None, None)
    for expected in (None, OTHERS + "reward (in 1 calls at most)"):
        native = lambda *_: (None, Row(torch.ones(3, 2), torch.zeros(3, 2)))  # noqa: E731
        assert audit.is_due()
        assert audit.call(native, lambda *_: (None, row), args)[1] == expected


def test_a_loop_may_write_into_its_carry_and_is_still_compared_with_what_it_was_given():
    carry, xs = torch.ones(2), torch.arange(6.0).view(3, 2)

    def native(carry, xs, *_):
        rows = carry + xs
        carry.fill_(9.0)
        return carry, rows

    audit = Audit(FirstStep())
    for _ in range(2):
        _, differs = audit.call(
            native, lambda carry, xs, *_: (None, carry + xs), (carry, xs, None, None, None)
        )
        assert differs is None
    assert torch.equal(carry, torch.ones(2))


def test_of_rows_the_first_are_compared():
    seen = []

    def function(rows, constants):
        seen.append(rows["x"].shape[0])
        return rows

    rows = {"x": torch.ones(1000, 2)}
    assert Audit(FirstRows()).call(lambda rows, _: rows, function, (rows, None))[1] is None
    assert seen == [64]
