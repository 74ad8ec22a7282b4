"""A loop gives the same results in every mode; what cannot be compiled runs eagerly."""

import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_lightning.compiling import stages, stepwise, tracing
from esper_lightning.compiling.loops import (
    CompileMode,
    compile_function,
    compile_loop,
    compile_map,
    few_cpu_threads,
)
from esper_lightning.compiling.stepwise import StepwiseLoop

pytestmark = pytest.mark.usefixtures("native_code")
CPU = torch.device("cpu")
CALLS: SimpleQueue[int] = SimpleQueue()  # which is not watched: what functions hold must not change


def calls() -> list[int]:
    """All calls since the last time that this function was called."""
    return [CALLS.get() for _ in range(CALLS.qsize())]


STEPS, ROWS = 3, 4096
MODES: list[CompileMode] = ["auto", "default", "max"]  # all the same on a CPU


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Warnings of this package: compilers write records of their own."""
    return [r for r in caplog.records if r.name == stages.__name__ and r.levelno > logging.INFO]


class Regression:
    """Gradient descent on a small network: a loop over chunks, with a gradient inside."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.carry = {"weight": torch.randn(64, 8, generator=generator) * 0.1, "n": torch.zeros(())}
        self.rate = torch.tensor([0.1, 0.05, 0.2])
        order = [torch.randperm(2 * ROWS, generator=generator)[:ROWS] for _ in range(STEPS)]
        self.order = torch.stack(order)
        x = torch.randn(2 * ROWS, 8, generator=generator)
        self.constants = (x, (x.sum(1), None))

    @staticmethod
    def chunk_body(
        carry: dict[str, Tensor], index: Tensor, constants: Any
    ) -> tuple[Tensor, Tensor]:
        x, (y, _) = constants
        with torch.enable_grad():
            weight = carry["weight"].detach().requires_grad_()
            hidden = torch.nn.functional.linear(x[index], weight, torch.ones(64)).tanh()
            loss = (hidden.sum(1) - y[index]).square().sum()
            (gradient,) = torch.autograd.grad(loss, [weight])
        return gradient, loss.detach()

    @staticmethod
    def body(carry: dict[str, Tensor], x: Any, constants: Any) -> Any:
        (gradient, loss), rate = x
        weight = carry["weight"] - rate * 1e-2 * gradient / ROWS
        return {"weight": weight, "n": carry["n"] + 1.0}, (loss / ROWS, carry["n"])

    def run(self, mode: CompileMode) -> Any:
        loop = compile_loop("test", self.body, self.chunk_body, mode=mode, device=CPU)
        results = []
        for _ in range(2):  # the first call compiles
            carry = {name: value.clone() for name, value in self.carry.items()}
            carry, rows = loop(carry, self.rate, self.order, self.constants, None)
            results.append((carry, tuple(row.clone() for row in rows)))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
        return results[0]


@pytest.fixture(autouse=True)
def new_run() -> None:
    stages.log_reasons_again()


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_gives_the_same_results_in_every_mode(
    mode: CompileMode, caplog: pytest.LogCaptureFixture
) -> None:
    got, expected = Regression().run(mode), Regression().run("off")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert expected[1][0][0] != expected[1][0][2]
    assert ours(caplog) == []  # nothing fell back


def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a compiled step, run as it is."""
    monkeypatch.setattr(stepwise, "compile_graph", lambda graph: graph)


def test_rows_are_written_to_the_given_storage_and_the_carry_is_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_inductor(monkeypatch)

    def body(carry: Tensor, x: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
        return carry + x, carry * constants

    xs, out = torch.tensor([1.0, 2.0, 4.0]), torch.empty(3)
    off = compile_loop("test", body, mode="off", device=CPU)
    for loop in (off, StepwiseLoop(body, None, CPU)):
        carry, rows = loop(torch.zeros(()), xs, None, torch.tensor(10.0), out)
        assert carry == 7.0
        assert rows is out
        assert out.tolist() == [0.0, 10.0, 30.0]


def test_what_cannot_be_compiled_runs_eagerly_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def branches(x: Tensor) -> Tensor:
        return x + 1 if bool(x.sum() > 0) else x - 1

    function = compile_function("test", branches, mode="auto", device=CPU)
    for value, expected in ((1.0, 2.0), (-1.0, -2.0), (1.0, 2.0)):
        assert function(torch.tensor([value])).item() == expected
    (record,) = ours(caplog)
    assert record.levelno == logging.WARNING
    assert "Native code does not work for the test" in record.getMessage()


def test_without_a_compiler_it_runs_eagerly_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    torch.testing.assert_close(Regression().run("auto"), Regression().run("off"), rtol=0, atol=0)
    (record,) = ours(caplog)
    assert "Native code does not work for the test" in record.getMessage()
    assert "install g++ or clang, or set CXX" in record.getMessage()
    Regression().run("auto")
    assert len(ours(caplog)) == 1  # the same reason
    stages.log_reasons_again()
    Regression().run("auto")
    assert len(ours(caplog)) == 2  # another run warns as well


def test_compiled_steps_that_python_calls_give_the_same_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CUDA, where native code is none."""
    without_inductor(monkeypatch)
    regression = Regression()
    loop = StepwiseLoop(regression.body, regression.chunk_body, CPU)
    carry = {name: value.clone() for name, value in regression.carry.items()}
    got = loop(carry, regression.rate, regression.order, regression.constants, None)
    torch.testing.assert_close(got, regression.run("off"), rtol=1e-4, atol=1e-5)


def test_a_map_gives_the_same_rows_in_every_mode() -> None:
    x, weight = torch.randn(300, 8), torch.randn(8, 20)
    for mode in ("off", "auto"):
        rows = compile_map("test", lambda x, w: (x @ w).tanh(), mode=mode, device=CPU)
        torch.testing.assert_close(rows(x, weight), (x @ weight).tanh(), rtol=1e-5, atol=1e-5)


def test_an_error_of_exhausted_memory_is_raised_without_a_second_try() -> None:
    calls()

    def exhausting(x: Tensor) -> Tensor:
        CALLS.put(1)
        raise torch.OutOfMemoryError("none left")

    function = compile_function("test", exhausting, mode="default", device=CPU)
    with pytest.raises(torch.OutOfMemoryError):
        function(torch.zeros(1))
    assert len(calls()) == 1


def test_the_fastest_way_that_works_serves_the_kind_of_its_first_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on CUDA: other shapes, and what fails, run a slower way."""
    calls: list[str] = []

    def way(name: str, error: Exception | None = None) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            calls.append(name)
            if error is not None:
                raise error
            return 2.0 * x

        return run

    fails = way("fails", RuntimeError("no"))
    ways = stages.FirstThatWorks("test", "A way", [fails, way("fast"), way("eager")])
    for size in (2, 3, 2):
        assert ways(torch.ones(size)).tolist() == [2.0] * size
    assert calls == ["fails", "fast", "eager", "fast"]
    assert len(ours(caplog)) == 1
    calls.clear()
    exhausting = way("exhausting", torch.OutOfMemoryError("none left"))
    ways = stages.FirstThatWorks("test", "A way", [exhausting, way("eager")])
    with pytest.raises(torch.OutOfMemoryError):
        ways(torch.ones(1))
    assert calls == ["exhausting"]


def test_every_shape_has_a_program_of_its_own() -> None:
    """So the results do not depend on the shape that came first, as after a run is resumed."""
    calls()

    def function(x: Tensor) -> Tensor:
        CALLS.put(x.shape[0])
        return 2 * x

    compiled = compile_function("test", function, mode="auto", device=CPU)
    for size in (4, 3):
        assert compiled(torch.ones(size)).tolist() == [2.0] * size
    assert list(dict.fromkeys(calls())) == [4, 3]
    programs = {**compiled._run}
    for size in (4, 3):
        assert compiled(torch.ones(size)).tolist() == [2.0] * size
    assert len(programs) == 2
    assert compiled._run == programs


def test_other_keys_and_other_numbers_have_programs_of_their_own() -> None:
    def function(x: dict[str, Tensor], factor: float) -> Tensor:
        return x.get("a", torch.zeros(1)) * factor

    compiled = compile_function("test", function, mode="auto", device=CPU)
    one = torch.ones(1)
    for tree, factor, expected in [
        ({"a": one}, 2.0, 2.0),
        ({"a": one}, 3.0, 3.0),
        ({"b": one}, 3.0, 0.0),
        ({"a": one}, 2.0, 2.0),
    ]:
        assert compiled(tree, factor).item() == expected


def test_threads_that_compile_at_once_take_turns(caplog: pytest.LogCaptureFixture) -> None:
    def run(number: int) -> list[float]:
        function = compile_function("test", lambda x: x * number, mode="auto", device=CPU)
        return function(torch.ones(2)).tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [[float(number)] * 2 for number in range(4)]
    assert ours(caplog) == []


def test_a_user_can_switch_compilers_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    calls = []
    function = compile_function("test", calls.append, mode="auto", device=CPU)
    function(torch.ones(1))
    function(torch.ones(1))
    assert len(calls) == 2


def test_an_index_outside_is_the_error_that_it_is_eagerly() -> None:
    function = compile_function("test", lambda x, k: x[k], mode="auto", device=CPU)
    x = torch.arange(3.0)
    assert function(x, torch.tensor([2, -3])).tolist() == [2.0, 0.0]
    for outside in (3, -4):
        with pytest.raises(IndexError):
            function(x, torch.tensor([0, outside]))
    for operation in (torch.gather, torch.index_select):  # no negative ones, as in torch
        function = compile_function(
            "test", lambda x, k, of=operation: of(x, 0, k), mode="auto", device=CPU
        )
        assert function(x, torch.tensor([2, 0])).tolist() == [2.0, 0.0]
        with pytest.raises(IndexError):
            function(x, torch.tensor([0, -1]))


@pytest.mark.parametrize(("samples", "threads"), [(64, 1), (2047, 1), (2048, 2)])
def test_small_batches_get_one_thread_and_restore_the_others(samples, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(RuntimeError), few_cpu_threads(samples):
            assert torch.get_num_threads() == threads
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "write",
    [
        lambda h, other: torch.addcmul(other, h, h, value=2.0, out=h),
        lambda h, other: torch.add(h, other, alpha=2, out=h),
        lambda h, other: torch.where(h > 2, h, other, out=h),
        lambda h, other: torch.clamp(h, other, other, out=h),
        lambda h, other: torch.lerp(h, other, 0.5, out=h),
        lambda h, other: torch.sum(h, dim=0, keepdim=True, out=other[:1]),
    ],
    ids=["addcmul", "add", "where", "clamp", "lerp", "sum"],
)
def test_a_result_that_is_written_into_an_argument_is_compiled_as_a_copy(
    monkeypatch: pytest.MonkeyPatch, write: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """torch 2.11 compiles no ``out=`` that is not contiguous."""

    def program(h: Tensor, other: Tensor) -> Tensor:
        write(h, other)
        return h + other

    def arguments() -> tuple[Tensor, Tensor]:
        return torch.arange(6.0).view(2, 3).t(), torch.ones(3, 2)

    graph = tracing.Traced(program, arguments()).graph
    seen: list[str] = []

    def compiler(given: torch.fx.GraphModule, **_: object) -> torch.fx.GraphModule:
        seen.extend(key for node in given.graph.nodes for key in node.kwargs)
        return given

    monkeypatch.setattr(torch, "compile", compiler)
    compiled = tracing.compile_graph(graph)
    assert "out" not in seen
    mine, theirs = arguments(), arguments()
    (result,) = compiled(*mine)
    assert torch.equal(result, program(*theirs))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
