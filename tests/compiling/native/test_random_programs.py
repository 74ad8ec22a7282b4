"""Random programs compute natively what they compute eagerly, or are refused: never anything else.

A program is a list of operations, each of which takes results of earlier ones. Numbers are kept
near 1, so that rounding stays small and no two numbers that are compared are nearly equal.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from esper_lightning.compiling.holders import ImpureError
from esper_lightning.compiling.native.loops import NativeFunction, NativeLoop, NativeMap
from esper_lightning.compiling.native.values import UnsupportedError

ROWS, COLUMNS = 24, 6
PROGRAMS = 8  # of each kind in the fast tests
MORE = 400
REFUSALS = (UnsupportedError, ImpureError)


class Operation(NamedTuple):
    """An operation on tensors of shape ``[N, ...]``, and the number of its arguments."""

    name: str
    number: int
    function: Callable[..., Tensor]


def _one(name: str, function: Callable[[Tensor], Tensor]) -> Operation:
    return Operation(name, 1, function)


def _two(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    return Operation(name, 2, function)


def _with_first_column(x: Tensor, y: Tensor) -> Tensor:
    copy = x.clone()
    copy[:, 0] = y[:, -1]
    return copy


def _written_where(x: Tensor, y: Tensor) -> Tensor:
    copy = x.clone()
    copy[y[:, 0] > 0] = 0.5
    copy[copy > 2] = -1.0
    return copy


def _written(x: Tensor) -> Tensor:
    copy = x.clone()
    copy[torch.arange(len(x)), x.argmin(-1)] = x[:, 0]
    return copy


def _in_place(x: Tensor, y: Tensor) -> Tensor:
    copy = x.clone()
    view = copy[:, 1:]
    view.mul_(y[:, 1:])
    return copy.add_(1.0).sub_(x)


def _products(x: Tensor) -> Tensor:
    products = torch.bmm(x.view(-1, 2, 3), x.view(-1, 3, 2)).flatten(1)
    return products.repeat(1, 2)[:, :COLUMNS]


def _gradient(x: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad((leaf.tanh() * leaf).square().sum(), [leaf])[0]


# Rows of [N, 6] to rows of [N, 6], each from the same row of the arguments.
OF_ROWS = [
    _one("tanh", torch.tanh),
    _one("sin", torch.sin),
    _one("exp", lambda x: x.clamp(-2, 1).exp()),
    _one("sigmoid", torch.sigmoid),
    _one("relu", torch.relu),
    _one("gelu", functional.gelu),
    _one("elu", functional.elu),
    _one("softplus", functional.softplus),
    _one("abs sqrt", lambda x: (x.abs() + 0.1).sqrt()),
    _one("log1p", lambda x: x.abs().log1p()),
    _one("softmax", lambda x: x.softmax(-1)),
    _one("log_softmax", lambda x: x.log_softmax(-1)),
    _one("mean", lambda x: x - x.mean(-1, keepdim=True)),
    _one("var", lambda x: x / (1 + x.var(-1, keepdim=True))),
    _one("amax", lambda x: x.amax(-1, keepdim=True) - x),
    _one("norm", lambda x: x / (1 + x.norm(dim=-1, keepdim=True))),
    _one("logsumexp", lambda x: x - x.logsumexp(-1, keepdim=True)),
    _one("flip", lambda x: x.flip(-1)),
    _one("roll", lambda x: x.roll(2, -1)),
    _one("slices", lambda x: torch.cat([x[:, 3:], x[:, :3]], 1)),
    _one("every second", lambda x: x.view(-1, 3, 2).transpose(1, 2).flatten(1)),
    _one("reshape", lambda x: x.reshape(-1, 2, 3).transpose(1, 2).flatten(1)),
    _one("stack", lambda x: torch.stack([x[:, :3], x[:, 3:]], -1).reshape(-1, 6)),
    _one("chunk", lambda x: torch.cat(x.chunk(3, 1)[::-1], 1)),
    _one("expand", lambda x: x[:, :1].expand(-1, COLUMNS)),
    _one("outer", lambda x: (x[:, :, None] * x[:, None, :]).mean(-1)),
    _one("bmm", _products),
    _one("argmax", lambda x: functional.one_hot(x.argmax(-1), COLUMNS).float()),
    _one("max index", lambda x: x.gather(-1, x.argmax(-1, keepdim=True)).expand(-1, COLUMNS)),
    _one("cumsum", lambda x: x.cumsum(-1)),
    _one("sort", lambda x: x.sort(-1).values),
    _one("max and min", lambda x: x.max(-1, keepdim=True).values - x.min(-1).values[:, None] + x),
    _one("triangle", lambda x: (x[:, :, None] * x[:, None, :]).tril().sum(-1)),
    _one("floors", lambda x: (x.detach() * 4 + 0.25) // 3 + ((x * 4 + 0.25).long() // 3).float()),
    _two("written where", _written_where),
    _one("take", lambda x: x[:, torch.tensor([5, 0, 0, 3, 2, 1])]),
    _one("long", lambda x: (x * 3).long().float()),
    _one("bool", lambda x: (x > 0.1).float()),
    _one("masked", lambda x: x.masked_fill(x > 0.5, -1.0)),
    _one("positions", lambda x: x * torch.arange(COLUMNS)),
    _one("zeros", lambda x: torch.zeros_like(x) + x[:, :1]),
    _one("double", lambda x: x.double().tanh().float()),
    _one("gradient", _gradient),
    _one("pad", lambda x: functional.pad(x, (2, 0))[:, :COLUMNS]),
    _one("unbind", lambda x: torch.stack(x.unbind(1)[::-1], 1)),
    _one("layer norm", lambda x: functional.layer_norm(x, [COLUMNS])),
    _one("embedding", lambda x: functional.embedding(x.argmax(-1), TABLE)),
    _one("weights", lambda x: x @ WEIGHT),
    _one("linear", lambda x: functional.linear(x, WEIGHT, BIAS)),
    _two("add", torch.add),
    _two("sub", torch.sub),
    _two("mul", lambda x, y: x * y.clamp(-2, 2)),
    _two("div", lambda x, y: x / (1 + y.abs())),
    _two("maximum", torch.maximum),
    _two("where", lambda x, y: torch.where(x > y, x, y * 0.5)),
    _two("atan2", lambda x, y: torch.atan2(x, y.abs() + 0.5)),
    _two("lerp", lambda x, y: torch.lerp(x, y, 0.3)),
    _two("cat", lambda x, y: torch.cat([x, y], 1)[:, 3:9]),
    _two("interleave", lambda x, y: torch.stack([x, y], -1).flatten(1)[:, ::2]),
    _two("column", _with_first_column),
    _two("in place", _in_place),
    _two("einsum", lambda x, y: torch.einsum("ni,nj->nij", x, y).mean(1)),
    _two("compare", lambda x, y: ((x > y) & (x > 0) | (y < -0.3)).float()),
    _two("addcmul", lambda x, y: torch.addcmul(x, y, y, value=0.1)),
]
# Rows of [N, 6] to rows of [N, 6], each from several rows of the arguments.
OF_ALL = [
    _one("chosen", lambda x: x + x[torch.arange(len(x)), x.argmax(-1)][:, None]),
    _one("written", _written),
    _one("index add", lambda x: x.index_add(0, x.argmax(-1), 0.1 * x)),
    _one("mean of all", lambda x: x - x.mean()),
    _one("mean of rows", lambda x: x - x.mean(0)),
    _one("softmax of rows", lambda x: x.softmax(0)),
    _one("flip rows", lambda x: x.flip(0)),
    _one("roll rows", lambda x: x.roll(1, 0)),
    _one("first row", lambda x: x - x[:1]),
    _one("first", lambda x: x * x[0, 0]),
    _one("amax of rows", lambda x: x / (1 + x.abs().amax(0))),
    _one("order", lambda x: x * torch.arange(len(x))[:, None] / len(x)),
    _one("number", lambda x: x / len(x) * 8),
    _one("halves", lambda x: torch.cat([x[len(x) // 2 :], x[: len(x) // 2]])),
    _one("covariance", lambda x: x @ (x.T @ x) / len(x)),
    _one("reshape rows", lambda x: x.reshape(COLUMNS, -1).T.reshape(-1, COLUMNS)),
    _one("later zero", lambda x: x + 0.0 * x.mean(0)),
    _one("norm of all", lambda x: x / (1 + x.norm())),
]
_GENERATOR = torch.Generator().manual_seed(11)
WEIGHT = torch.randn(COLUMNS, COLUMNS, generator=_GENERATOR) / 2
BIAS = torch.randn(COLUMNS, generator=_GENERATOR) / 2
TABLE = torch.randn(COLUMNS, COLUMNS, generator=_GENERATOR)


class Program:
    """Some random operations on two tensors; the result is kept within -3 and 3.

    Args:
        seed: Seed of the choices.
        operations: Operations to choose from.
        length: Number of operations.
    """

    def __init__(self, seed: int, operations: Sequence[Operation], length: int = 6) -> None:
        draw = random.Random(seed)
        self.steps: list[tuple[Operation, list[int]]] = []
        for number in range(length):
            chosen = draw.choice(operations)
            # The latest result is always used, so that no operation is dead.
            places = [number + 1, *(draw.randrange(number + 2) for _ in range(chosen.number - 1))]
            draw.shuffle(places)
            self.steps.append((chosen, places))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        values = [y, x]
        for operation, places in self.steps:
            result = operation.function(*(values[place] for place in places))
            values.append(3 * ((result + 0.3 * values[-1]) / 3).tanh())  # has a gradient
        return values[-1]

    def __repr__(self) -> str:
        return "; ".join(f"{operation.name} {places}" for operation, places in self.steps)


def numbers(rows: int = ROWS, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, rows, COLUMNS, generator=generator)
    return x, y


def differs(got: Tensor, expected: Tensor) -> bool:
    return not torch.allclose(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def wrong_of_functions(seeds: range) -> list[str]:
    """Programs of which a native function gives something else than eager calls."""
    programs = [Program(seed, OF_ROWS + OF_ALL) for seed in seeds]
    wrong: list[str] = []
    for some in (programs[start : start + 8] for start in range(0, len(programs), 8)):
        wrong += [repr(each) for each in _checked(some)]
    return wrong


def _checked(programs: Sequence[Program]) -> list[Program]:
    function = NativeFunction(lambda x, y: tuple(program(x, y) for program in programs))
    try:
        function(*numbers())
    except REFUSALS:
        half = len(programs) // 2
        return [*_checked(programs[:half]), *_checked(programs[half:])] if half else []
    found: list[Program] = []
    for seed in range(3):
        for program, got in zip(programs, function(*numbers(seed=seed)), strict=True):
            if differs(got, program(*numbers(seed=seed))) and program not in found:
                found.append(program)
    return found


def wrong_of_maps(seeds: range) -> tuple[list[str], int]:
    """Programs of rows that a native map gets wrong, and the number that it accepts."""
    wrong, accepted = list[str](), 0
    for seed in seeds:
        mixes = seed % 2
        program = Program(seed, OF_ROWS + OF_ALL * mixes, 5)
        rows = 300  # of which a map computes some at a time
        native = NativeMap(lambda rows, _, program=program: program(*rows))
        try:
            native(numbers(rows), ())
        except REFUSALS:
            continue
        accepted += 1
        for again in range(2):
            x, y = numbers(rows, again)
            if differs(native((x, y), ()), program(x, y)):
                wrong.append(repr(program))
                break
    return wrong, accepted


def wrong_of_loops(seeds: range) -> tuple[list[str], int]:
    """Programs whose sums over chunks of samples a native loop gets wrong; number accepted."""
    wrong, accepted = list[str](), 0
    for seed in seeds:
        program = Program(seed, OF_ROWS + OF_ALL * (seed % 2), 4)

        def chunk_body(
            carry: Any, index: Tensor, constants: Any, program: Program = program
        ) -> tuple[Tensor, Tensor]:
            x, y = (each[index] for each in constants)
            with torch.enable_grad():
                weight = carry.detach().requires_grad_()
                loss = (program(x * weight, y) * y).sum()
                (gradient,) = torch.autograd.grad(loss, [weight])
            return gradient, torch.ones_like(index).sum()

        def body(carry: Any, x: Any, constants: Any) -> Any:
            (gradient, number), rate = x
            return carry - rate * (gradient / number).tanh(), number

        rows = 3000
        rates, order = torch.rand(2), torch.stack([torch.randperm(rows)[:2500] for _ in range(2)])
        carry, constants = torch.ones(COLUMNS), numbers(rows)
        try:
            native = NativeLoop(body, chunk_body)
            got, _ = native(carry.clone(), rates, order, constants)
        except REFUSALS:
            continue
        accepted += 1
        expected = carry.clone()
        for rate, index in zip(rates, order, strict=True):
            expected, _ = body(expected, (chunk_body(expected, index, constants), rate), constants)
        if differs(got, expected):
            wrong.append(f"{seed}: {program}")
    return wrong, accepted


def test_random_functions_are_right_or_refused():
    assert wrong_of_functions(range(PROGRAMS)) == []


def test_random_maps_are_right_or_refused():
    wrong, accepted = wrong_of_maps(range(PROGRAMS))
    assert wrong == []
    assert accepted >= PROGRAMS // 4


def test_random_sums_over_samples_are_right_or_refused():
    wrong, accepted = wrong_of_loops(range(PROGRAMS))
    assert wrong == []
    assert accepted >= PROGRAMS // 4


@pytest.mark.slow  # minutes: most of it is compiling
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [wrong_of_functions, wrong_of_maps, wrong_of_loops])
def test_many_random_programs_are_right_or_refused(kind):
    result = kind(range(100, 100 + MORE))
    assert result == [] or result[0] == []
