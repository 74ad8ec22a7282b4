"""Native functions, maps and loops compute what the same functions compute eagerly."""

from typing import Any

import pytest
import torch
from torch import Tensor

from esper_lightning.compiling.loops import compile_loop
from esper_lightning.compiling.native import translation
from esper_lightning.compiling.native.loops import (
    NativeFunction,
    NativeLoop,
    NativeMap,
    chunk_rows,
)
from esper_lightning.compiling.native.values import UnsupportedError
from esper_lightning.compiling.purity import same_bits
from esper_lightning.core.tensor_trees import leaves

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bits(tree: Any) -> list[bytes]:
    return [leaf.numpy().tobytes() for leaf in leaves(tree)]


def many_layers(x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    for weight in weights:
        x = (x @ weight).tanh() + x.mean(0)
    return x, (x - x.sum(1, keepdim=True)).square().sum()


def test_a_team_of_any_size_computes_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 64, generator=generator)
    weights = tuple(torch.randn(64, 64, generator=generator) / 8 for _ in range(3))
    function = NativeFunction(many_layers)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results += [bits(function(x, weights)) for _ in range(5)]
    torch.set_num_threads(1)
    assert all(result == results[0] for result in results)
    for got, expected in zip(function(x, weights), many_layers(x, weights), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class Descent:
    """Gradient descent on minibatches, with a gradient over chunks of samples in each step."""

    def __init__(self, samples: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.carry = {"weight": torch.randn(24, 5, generator=generator), "n": torch.zeros(())}
        self.rate = torch.rand(steps, generator=generator)
        order = [torch.randperm(samples, generator=generator) for _ in range(steps)]
        self.order = torch.stack(order)
        self.constants = (torch.randn(samples, 5, generator=generator), None)

    @staticmethod
    def chunk_body(carry: Any, index: Tensor, constants: Any) -> tuple[Tensor, Tensor]:
        x = constants[0][index]
        with torch.enable_grad():
            weight = carry["weight"].detach().requires_grad_()
            loss = (torch.nn.functional.linear(x, weight).tanh() - 0.3).square().sum()
            (gradient,) = torch.autograd.grad(loss, [weight])
        return gradient, torch.ones_like(index).sum()

    @staticmethod
    def body(carry: Any, x: Any, constants: Any) -> Any:
        (gradient, number), rate = x
        weight = carry["weight"] - rate * gradient / number
        return {"weight": weight, "n": carry["n"] + 1}, (gradient.norm(), carry["n"])

    def run(self, loop: Any) -> Any:
        return loop(self.carry, self.rate, self.order, self.constants, None)


@pytest.mark.parametrize(("samples", "steps"), [(64, 1), (192, 2), (1024, 5), (61, 3)])
def test_a_loop_over_chunks_is_the_eager_loop_for_any_number_of_threads(samples, steps):
    descent = Descent(samples, steps)
    before = bits(descent.carry)
    expected = descent.run(
        compile_loop("test", Descent.body, Descent.chunk_body, mode="off", device=CPU)
    )
    loop = NativeLoop(Descent.body, Descent.chunk_body)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results += [descent.run(loop) for _ in range(2)]
    torch.set_num_threads(1)
    assert bits(descent.carry) == before  # what the caller holds is not written to
    assert all(bits(result) == bits(results[0]) for result in results)
    for got, value in zip(leaves(results[0]), leaves(expected), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)


def test_a_loop_without_chunks_passes_its_carry_on(threads):
    def body(carry: Any, x: Any, constants: Tensor) -> Any:
        total, count = carry
        total = total * 0.5 + x["x"] * constants
        return (total, count + 1), {"total": total.sum(), "count": count}

    for steps in (1, 2, 5):
        xs = {"x": torch.arange(float(steps * 6)).view(steps, 2, 3)}
        carry = (torch.ones(2, 3), torch.tensor(3))
        eager = compile_loop("test", body, mode="off", device=CPU)
        expected = eager(carry, xs, None, torch.tensor([1.0, 2.0, 4.0]), None)
        got = NativeLoop(body, None)(carry, xs, None, torch.tensor([1.0, 2.0, 4.0]), None)
        assert bits(got) == bits(expected)


@pytest.mark.parametrize("rows", [1, 63, 64, 640, 1000, 1009])
def test_a_map_computes_each_row(threads, rows):
    def function(rows: Any, constants: Tensor) -> Any:
        x, flag = rows
        return {"y": (x @ constants).relu(), "z": torch.where(flag, x.sum(-1), -1.0)}

    x = torch.arange(rows * 20.0).view(rows, 20) % 7
    example = ((x, x[:, 0] > 3), torch.eye(20)[:, :18] * 2)
    got = NativeMap(function)(*example)
    for name, value in function(*example).items():
        assert torch.equal(got[name], value), name


def test_results_are_new_memory_at_every_call():
    function = NativeFunction(lambda x: (x + 1.0, x))
    first = function(torch.zeros(3))
    second = function(torch.ones(3))
    assert [leaf.tolist() for leaf in first] == [[1.0] * 3, [0.0] * 3]
    assert [leaf.tolist() for leaf in second] == [[2.0] * 3, [1.0] * 3]


def test_a_constant_serves_products_and_views():
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.ones(4, 4)
        return ones @ x, ones.view(-1) * x.reshape(-1)

    x = torch.arange(16.0).view(4, 4)
    for got, expected in zip(NativeFunction(function)(x), function(x), strict=True):
        assert torch.equal(got, expected)


def test_strided_arguments_are_read_as_they_are():
    function = NativeFunction(lambda x, y: x * 10 + y)
    x, y = torch.arange(6.0).view(2, 3).t(), torch.arange(2.0).expand(3, 2)
    assert torch.equal(function(x, y), x * 10 + y)


@pytest.mark.parametrize("number", [1, 4])  # one that is not contiguous, and one that is
def test_imaginary_parts_of_conjugates_have_the_sign_that_torch_gives_them(number):
    numbers = torch.complex(torch.ones(4), torch.arange(1.0, 5.0))[:number]
    x, held = torch.ones(number), numbers.conj().imag
    function = NativeFunction(lambda x, y: (x * y, x - held))
    for y in (numbers.conj().imag, numbers.imag):
        for got, expected in zip(function(x, y), (x * y, x - held), strict=True):
            assert torch.equal(got, expected)


def test_a_tensor_that_the_function_holds_is_read_in_place():
    level = torch.tensor([1.0, 2.0])
    function = NativeFunction(lambda x: x * level)
    assert function(torch.ones(2)).tolist() == [1.0, 2.0]
    level.fill_(5.0)
    assert function(torch.ones(2)).tolist() == [5.0, 5.0]


@pytest.mark.parametrize("size", [17, 32])
def test_a_matrix_that_the_function_holds_is_multiplied(threads, size):
    generator = torch.Generator().manual_seed(0)
    held = torch.randn(size, size, generator=generator)
    x = torch.randn(300, size, generator=generator)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ held, x @ held.t()

    function = NativeFunction(both)
    for factor in (1.0, 2.0):
        held *= factor
        for got, expected in zip(function(x), both(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_products_of_every_shape_and_layout(threads):
    sizes = [(40, 24, 17), (40, 24, 5), (3, 24, 5), (40, 6, 5), (2, 3, 4), (5, 20, 33), (1, 17, 1)]
    generator = torch.Generator().manual_seed(0)
    pairs = [
        [torch.randn(shape, generator=generator) for shape in ((m, k), (k, n), (k, m), (n, k))]
        for m, k, n in sizes
    ]

    def products(pairs: list[list[Tensor]]) -> list[Tensor]:
        results: list[Tensor] = []
        for a, b, turned_a, turned_b in pairs:
            results += [a @ b, (a * 2.0) @ b, a @ (b + 1.0), turned_a.t() @ b, a @ turned_b.t()]
        return results

    for got, expected in zip(NativeFunction(products)(pairs), products(pairs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_views_and_writes_of_every_kind():
    """Down to the signs of zeros."""
    aten = torch.ops.aten

    def everything(x: Tensor, k: Tensor) -> list[Tensor]:
        written = x + 0.0
        written[:, 1:3] = x[:, :2]
        return [
            x.flip(0),
            aten.slice_backward(x, [3, 7], 1, 2, 6, 1),
            written,
            (x * 2.0).select(0, -1),
            (x * 2.0).t() * 1.0,
            x.scatter_add(1, k, x[:, :1]),
            torch.any(x, dim=[]),
            x.abs(),
        ]

    x = torch.arange(12.0).view(3, 4) - 5.0
    x[0, :2], x[1, 1] = -0.0, 0.0
    k = torch.tensor([[3], [0], [1]])
    for got, expected in zip(NativeFunction(everything)(x, k), everything(x, k), strict=True):
        assert same_bits(got, expected)


@pytest.mark.parametrize("index", [[0, 4], [-5, 1], [2**40, 0]])
def test_an_index_outside_of_its_tensor_is_an_error_as_in_torch(index):
    def function(x: Tensor, index: Tensor) -> Tensor:
        return x[index]

    native, x = NativeFunction(function), torch.arange(4.0)
    assert native(x, torch.tensor([3, -4])).tolist() == [3.0, 0.0]
    for run in (function, native):
        with pytest.raises(IndexError, match="index"):
            run(x, torch.tensor(index))
    assert native(x, torch.tensor([1, -1])).tolist() == [1.0, 3.0]  # it still works


def test_operations_in_place_become_operations_that_return_new_tensors():
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        before = y + 1
        y[1:].mul_(3.0)
        y.add_(before)
        return y, before

    x = torch.arange(5.0)
    for got, expected in zip(NativeFunction(function)(x), function(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("padding", [None, 1])
def test_an_embedding_and_its_gradient(padding):
    def function(table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            table = table.detach().requires_grad_()
            rows = torch.nn.functional.embedding(index, table, padding_idx=padding)
            return rows, torch.autograd.grad(rows.square().sum(), [table])[0]

    generator = torch.Generator().manual_seed(3)
    table = torch.randn(5, 3, generator=generator)
    index = torch.randint(0, 5, (4, 6), generator=generator)
    native = NativeFunction(function)
    for got, expected in zip(native(table, index), function(table, index), strict=True):
        torch.testing.assert_close(got, expected)
    for outside in (index + 1, index - 1):
        for run in (function, native):
            with pytest.raises(IndexError):
                run(table, outside)


def test_a_negative_index_to_add_at_is_an_error():
    def function(x: Tensor, index: Tensor) -> Tensor:
        return x.index_add(0, index, torch.ones(2))

    native, x = NativeFunction(function), torch.zeros(4)
    assert native(x, torch.tensor([1, 3])).tolist() == [0.0, 1.0, 0.0, 1.0]
    for run in (function, native):
        with pytest.raises(IndexError, match="index"):
            run(x, torch.tensor([1, -1]))


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: x.bfloat16() + 1, "bfloat16"),
        (torch.fft.fft, "fft"),
        (
            lambda x: torch.nn.functional.binary_cross_entropy(x, x),
            "binary_cross_entropy",
        ),  # checks x
        (lambda x: x.mode(-1).values, "aten.mode"),
        (lambda x: x.new_zeros(3, 99).cumsum(1), "one by one, the 99 elements"),
        (lambda x: torch.nn.functional.gelu(x, approximate="tanh"), "approximate='tanh'"),
        (lambda x: (x > 0).to(torch.complex64), "complex64"),
        (lambda x: x.scatter(0, x.long(), x), "several elements"),
        (lambda x: x.log_softmax(0), "other axes than the last"),
        (lambda x: x.long() ** 4, "a power of integers"),
        (lambda x: x[:0] + 1, "empty"),
    ],
)
def test_what_has_no_translation_is_refused_by_name(function, what):
    with pytest.raises(UnsupportedError, match=what) as caught:
        NativeFunction(function)(torch.ones(3, 3))
    assert "\n" not in str(caught.value)


def scaled(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0.5] *= -1.0
    return y


@pytest.mark.parametrize("function", [scaled, lambda x: x[x > 0.5].sum() + x])
def test_shapes_that_depend_on_numbers_are_refused_in_plain_words(function):
    with pytest.raises(UnsupportedError, match="a shape that depends on the numbers"):
        NativeFunction(function)(torch.ones(3))


@pytest.mark.parametrize(
    ("rows", "size"), [(65536, 64), (128, 64), (96, 48), (61, 61), (16381, 16381), (1, 1)]
)
def test_chunks_divide_the_rows(rows: int, size: int) -> None:
    assert chunk_rows(rows) == size


@pytest.mark.parametrize(
    ("carry", "x"),
    [
        (torch.zeros(3), torch.ones(4, 3, dtype=torch.float64)),
        (torch.zeros(3, dtype=torch.int32), torch.ones(4, 3, dtype=torch.int64)),
        (torch.zeros(3, dtype=torch.bool), torch.ones(4, 3, dtype=torch.int64)),
        (torch.zeros(1), torch.ones(4, 3)),
    ],
    ids=["dtype", "width", "bool", "shape"],
)
def test_a_carry_that_a_step_changes_in_kind_is_refused(carry: Tensor, x: Tensor) -> None:
    """Its memory would be read as what it was before."""
    loop = NativeLoop(lambda carry, x, constants: (carry + x, carry), None)
    with pytest.raises(UnsupportedError, match="a state that is"):
        loop(carry, x, None, None)


def test_sums_whose_terms_depend_on_other_samples_are_refused() -> None:
    values = torch.randn(512, generator=torch.Generator().manual_seed(0))

    def of_chunk(carry: Tensor, index: Tensor, constants: Tensor) -> Tensor:
        chosen = constants[index]
        return (chosen - chosen.mean()).square().sum()

    def alone(carry: Tensor, index: Tensor, constants: Tensor) -> Tensor:
        return constants[index].square().sum()

    order = torch.arange(512).view(1, -1)
    body = lambda carry, x, constants: (carry + x[0], carry)  # noqa: E731
    with pytest.raises(UnsupportedError, match="depend on other samples"):
        NativeLoop(body, of_chunk)(torch.zeros(()), torch.zeros(1), order, values)
    total, _ = NativeLoop(body, alone)(torch.zeros(()), torch.zeros(1), order, values)
    torch.testing.assert_close(total, values.square().sum())


def test_sums_that_will_be_more_than_sums_are_refused_before_they_are() -> None:
    """None of these differs from a sum for the numbers at hand."""

    def hinge(chosen: Tensor) -> Tensor:
        return (chosen.mean() - 10.0).relu().expand_as(chosen).sum()

    def clipped(chosen: Tensor) -> Tensor:
        return (chosen * (1e6 / chosen.norm()).clamp(max=1.0)).sum()

    def guarded(chosen: Tensor) -> Tensor:
        return torch.where((chosen > 1e6).any(), 0.0, chosen).sum()

    def squared(chosen: Tensor) -> Tensor:
        return (0.0 * chosen).sum().square()

    values, order = torch.linspace(-1.0, 1.0, 512), torch.arange(512).view(1, -1)
    body = lambda carry, x, constants: (carry + x[0], carry)  # noqa: E731
    for of_values in (hinge, clipped, guarded, squared):

        def of_chunk(carry: Any, index: Any, values: Any, of_values: Any = of_values) -> Tensor:
            return of_values(values[index])

        with pytest.raises(UnsupportedError, match="depend on other samples \\("):
            NativeLoop(body, of_chunk)(torch.zeros(()), torch.zeros(1), order, values)

    def linear(carry: Tensor, index: Tensor, values: Tensor) -> Tensor:
        return 2.0 * (values[index] * carry.exp()).sum()[None].neg().sum() / values.square().sum()

    NativeLoop(body, linear)(torch.zeros(()), torch.zeros(1), order, values)


def test_rows_that_will_depend_on_each_other_are_refused_before_they_do() -> None:
    x = torch.randn(512, 3, generator=torch.Generator().manual_seed(0))
    for function in (
        lambda rows, _: rows * (1e6 / rows.norm()).clamp(max=1.0),
        lambda rows, _: rows + (rows > 1e6).any(),
        lambda rows, _: rows * 2.0 if len(rows) < 100 else rows + rows,
        lambda rows, _: rows * 2.0 if len(rows) > 200 else rows,
        lambda rows, _: torch.cat([rows[:32] * 2.0, rows[32:]]),
    ):
        with pytest.raises(UnsupportedError, match="rows that depend on each other \\("):
            NativeMap(function)(x, None)


def test_rows_that_depend_on_each_other_are_refused() -> None:
    x = torch.randn(512, 3, generator=torch.Generator().manual_seed(0))
    mixed = [
        lambda rows, _: rows - rows.mean(0),
        lambda rows, _: rows + 1e-6 * rows.flip(0),
        lambda rows, _: rows / len(rows),
        lambda rows, _: rows + torch.arange(len(rows))[:, None],
        lambda rows, _: rows + rows.isnan().any(),
    ]
    with_nan = x.clone()
    with_nan[100, 0] = float("nan")
    for function in mixed:
        with pytest.raises(UnsupportedError, match="rows that depend on each other"):
            NativeMap(function)(with_nan, None)
    torch.testing.assert_close(NativeMap(lambda rows, _: rows.tanh())(x, None), x.tanh())


def test_a_function_of_too_many_operations_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(translation, "MOST_OPERATIONS", 3)
    x = torch.ones(2)
    NativeFunction(lambda x: x.sin().cos().exp())(x)
    with pytest.raises(UnsupportedError, match="4 operations, of which at most 3 compile"):
        NativeFunction(lambda x: x.sin().cos().exp().tanh())(x)


def test_an_older_result_may_be_the_argument_of_a_call_that_would_overwrite_it() -> None:
    turn = NativeFunction(lambda x: x.flip(0) + 1.0)
    x = torch.arange(5000.0)
    older = turn(x)
    turn(x)
    torch.testing.assert_close(turn(older), x + 2.0)
