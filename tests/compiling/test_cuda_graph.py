"""Captures and replays of graphs, with a simulated CUDA: streams, failures, sizes and memory."""

import gc
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from esper_lightning.compiling import cuda_graph, loops, tracing
from esper_lightning.compiling.cuda_graph import CapturedFunction, CapturedLoop
from esper_lightning.compiling.loops import compile_function, compile_loop, log_reasons_again
from esper_lightning.compiling.stepwise import StepwiseLoop
from tests.gpu_proof.simulated import SimulatedCuda

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimulatedCuda:
    simulated = SimulatedCuda()
    simulated.install(monkeypatch)
    log_reasons_again()
    return simulated


def captured(number: float) -> CapturedFunction:
    function = CapturedFunction(lambda x: x * number)
    assert function(torch.ones(2)).tolist() == [number, number]
    return function


def test_a_replay_serves_arguments_at_other_addresses(cuda: SimulatedCuda) -> None:
    function = CapturedFunction(lambda x, y: {"sum": x + y, "x": x})
    first = torch.tensor([1.0]), torch.tensor([2.0])
    assert function(*first)["sum"].item() == 3.0
    assert function(torch.tensor([5.0]), first[1])["sum"].item() == 7.0
    assert first[0].item() == 5.0  # the argument of the capture is the memory of the graph
    assert len(cuda.graphs) == 1


def test_a_result_of_a_compiled_graph_shares_no_memory_with_arguments_or_other_results(
    cuda: SimulatedCuda,
) -> None:
    """The next call overwrites its arguments, and a caller may change them."""
    function = compile_function(
        "test", lambda x: (x.view(-1), x + 1, x[:1]), mode="max", device=CPU
    )
    x = torch.tensor([[1.0], [2.0]])
    results = function(x)
    x.zero_()
    assert [result.tolist() for result in results] == [[1.0, 2.0], [[2.0], [3.0]], [[1.0]]]
    assert len({result.untyped_storage().data_ptr() for result in results}) == 3


def test_live_graphs_have_streams_of_their_own_and_dead_ones_return_theirs(
    cuda: SimulatedCuda,
) -> None:
    functions = [captured(1.0), captured(2.0)]
    streams = [graph.stream for graph in cuda.graphs]
    assert len(set(streams)) == 2
    assert cuda.current not in streams
    del functions[0]
    cuda.graphs.clear()
    gc.collect()
    functions.append(captured(3.0))
    assert cuda.graphs[0].stream == streams[0]


def test_a_stream_of_a_live_graph_is_not_lent_twice_when_torch_has_handed_out_all(
    cuda: SimulatedCuda,
) -> None:
    functions = [captured(1.0)]
    for _ in range(31):  # by others
        torch.cuda.Stream(CPU)
    functions.append(captured(2.0))
    assert cuda.graphs[0].stream != cuda.graphs[1].stream


def test_dead_graphs_are_collected_before_a_capture(cuda: SimulatedCuda) -> None:
    class Environment:
        """It holds its graph, whose function holds it."""

        def __init__(self) -> None:
            self.step: Callable[..., Tensor] = CapturedFunction(self.advance)

        def advance(self, x: Tensor) -> Tensor:
            return x + 1

    Environment().step(torch.ones(1))
    stream = cuda.graphs.pop().stream
    function = captured(2.0)
    assert cuda.graphs[0].stream == stream
    assert function is not None


def test_a_failed_capture_leaves_the_stream_and_ends_captures_of_the_process(
    cuda: SimulatedCuda, caplog: pytest.LogCaptureFixture
) -> None:
    before, numbers = cuda.current, cuda.generator.get_state()
    reads = CapturedFunction(lambda x: x * float(x.sum().item()))
    with pytest.raises(RuntimeError):
        reads(torch.ones(2))
    assert cuda.current == before
    assert not cuda.generator.capturing  # else every later draw is an error
    assert torch.equal(cuda.generator.get_state(), numbers)
    assert len(cuda_graph._failed) == 1
    function = compile_function("test", lambda x: x + 1, mode="max", device=CPU)
    assert function(torch.ones(2)).tolist() == [2.0, 2.0]
    assert cuda.graphs == []
    assert "The capture of another CUDA graph failed in this process" in caplog.text


def test_a_function_that_cannot_be_captured_takes_the_slower_way_with_a_warning(
    cuda: SimulatedCuda, caplog: pytest.LogCaptureFixture
) -> None:
    function = compile_function("test", lambda x: x * x.sum().item(), mode="max", device=CPU)
    for _ in range(2):
        assert function(torch.ones(2)).tolist() == [2.0, 2.0]
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "does not work for the test, which takes a slower way" in record.getMessage()


def test_a_graph_is_captured_on_the_device_of_its_arguments(cuda: SimulatedCuda) -> None:
    captured(1.0)
    assert cuda.devices == [CPU]


def body(carry: Tensor, x: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    return carry + x, carry * constants


@pytest.mark.parametrize("steps", [1, 3, 8, 10, 11])
@pytest.mark.parametrize("given", [False, True])
def test_a_long_loop_is_a_graph_of_a_few_steps_that_is_replayed(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, steps: int, given: bool
) -> None:
    stepwise = StepwiseLoop(body, None, CPU)
    off = compile_loop("test", body, mode="off", device=CPU)
    loop = CapturedLoop(stepwise, CPU)
    factor = torch.tensor(10.0)
    for seed in range(3):
        xs = torch.randn(steps, 2, generator=torch.Generator().manual_seed(seed))
        out = torch.empty(steps, 2) if given else None
        start = torch.full((2,), float(seed))
        expected = off(start.clone(), xs, None, factor)
        if seed == 0:
            example = (torch.zeros(1, dtype=torch.int64), start, xs, None, factor, out)
            stepwise.prepare(*example)
            monkeypatch.setattr(cuda_graph, "MOST_OPERATIONS", 4 * stepwise.operations)
        torch.testing.assert_close(loop(start, xs, None, factor, out), expected, rtol=0, atol=0)
    (graph,) = cuda.graphs
    replays = -(-steps // 4)
    assert graph.size <= (steps // replays) * stepwise.operations
    assert sum(call[0] is torch.ops.aten.add_.Tensor for call in graph.calls) == steps // replays


def test_more_operations_than_a_compiler_can_serve_run_eagerly(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "_is_native", lambda mode, device: False)
    monkeypatch.setattr(loops, "_is_compiled", lambda mode, device: True)
    monkeypatch.setattr(tracing, "MOST_OPERATIONS", 10)
    log_reasons_again()

    def long(x: Tensor) -> Tensor:
        for _ in range(20):
            x = x + 1
        return x

    function = compile_function("test", long, mode="default", device=CPU)
    assert function(torch.zeros(2)).tolist() == [20.0, 20.0]
    assert "A compiled function must have at most 10 operations, got 2" in caplog.text
