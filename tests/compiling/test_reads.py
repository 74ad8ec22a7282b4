"""Native code is given up once something has changed that it took for a constant."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper_lightning.compiling.loops import (
    compile_function,
    compile_loop,
    compile_map,
    log_reasons_again,
)
from esper_lightning.compiling.purity import results_of_pure
from esper_lightning.compiling.reads import recorded

CPU = torch.device("cpu")
LEVEL, LEVELS = 1.0, [1.0]


class Outer(nn.Module):
    """A user's module with a module within."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()


class Task:
    """A user's object whose attributes something else changes between calls."""

    level = 1.0

    def __init__(self) -> None:
        self.scale, self.table, self.array = 1.0, {"a": [1.0]}, np.ones(1)
        self.tensor, self.outer, self.calls = torch.ones(2), Outer(), 0
        self.dropout = nn.Dropout(0.5).eval()

    def by_number(self, x: Tensor) -> Tensor:
        return x * self.scale

    def by_table(self, x: Tensor) -> Tensor:
        return x * self.table["a"][0]

    def by_array(self, x: Tensor) -> Tensor:
        return x * float(self.array[0])

    def by_tensor(self, x: Tensor) -> Tensor:
        return x * self.tensor

    def by_class(self, x: Tensor) -> Tensor:
        return x * self.level

    def by_variable(self, x: Tensor) -> Tensor:
        return x * LEVEL

    def by_list(self, x: Tensor) -> Tensor:
        return x * LEVELS[0]

    def set_all(self, value: float) -> None:
        """Change what each method above reads."""
        global LEVEL  # noqa: PLW0603 - as a user's module does
        self.scale = self.table["a"][0] = self.array[0] = value
        self.tensor = torch.full((2,), value)
        Task.level = LEVEL = LEVELS[0] = value


@pytest.fixture
def task() -> Any:
    made = Task()
    yield made
    made.set_all(1.0)


@pytest.mark.parametrize("name", [one for one in vars(Task) if one.startswith("by_")])
def test_what_a_function_reads_is_noticed_when_it_changes(task: Task, name: str) -> None:
    method, x = getattr(task, name), torch.ones(2)
    with recorded(method) as reads:
        results_of_pure(method, x)
    task.calls += 1  # which the method does not read
    assert reads.changed() is None
    task.set_all(3.0)
    assert reads.changed() is not None
    assert "__getattribute__" not in vars(Task)


def test_another_module_and_another_mode_are_noticed(task: Task) -> None:
    def through_module(x: Tensor) -> Tensor:
        return task.outer.inner(x)

    def by_dropout(x: Tensor) -> Tensor:
        return task.dropout(x)

    for function in (through_module, by_dropout):
        task.dropout.eval()
        with recorded(function) as reads:
            results_of_pure(function, torch.ones(2))
        assert reads.changed() is None
        task.outer.inner, _ = nn.Tanh(), task.dropout.train()
        assert reads.changed() is not None


@pytest.mark.usefixtures("native_code")
def test_a_function_follows_what_changes_and_says_so(
    task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> list[str]:
        return [one for one in caplog.messages if one.startswith("Native code")]

    of_rows = compile_map("map", lambda rows, _: task.by_number(rows), mode="auto", device=CPU)
    function = compile_function("function", task.by_number, mode="auto", device=CPU)
    for made in (function, lambda x: of_rows(x, None)):
        task.scale = 1.0
        assert made(torch.ones(2)).tolist() == [1.0, 1.0]
        assert said() == []
        task.scale = 2.0
        assert made(torch.ones(2)).tolist() == [2.0, 2.0]
        assert "an attribute that changed: Task.scale" in said()[0]
        task.scale = 5.0
        assert made(torch.ones(2)).tolist() == [5.0, 5.0]
        assert len(said()) == 1
        caplog.clear()
        log_reasons_again()


@pytest.mark.usefixtures("native_code")
def test_a_loop_follows_what_its_steps_and_its_chunks_read(task: Task) -> None:
    """As an environment whose curriculum is a number, and a term of the loss with a weight."""
    index, samples = torch.arange(4)[None], torch.ones(4)
    for of_step in (True, False):
        task.scale = 1.0

        def step(carry: Tensor, x: Any, _: Any, of_step: bool = of_step) -> tuple[Tensor, Tensor]:
            total, number = x
            return carry + total + (task.by_number(number) if of_step else number), carry

        def chunk(carry: Tensor, index: Tensor, samples: Tensor, of_step: bool = of_step) -> Tensor:
            chosen = samples[index]
            return (chosen if of_step else task.by_number(chosen)).sum()

        loop = compile_loop("loop", step, chunk, mode="auto", device=CPU)
        for scale in (1.0, 10.0):
            task.scale = scale
            total, _ = loop(torch.zeros(()), torch.ones(1), index, samples, None)
            assert total == (4.0 + scale if of_step else 4.0 * scale + 1.0)


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("change", ["double", "smaller", "resize_"])
def test_a_held_tensor_of_another_kind_is_never_read_as_it_was(
    task: Task, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It would be read beyond its end, or as numbers of another type."""
    log_reasons_again()
    task.tensor = torch.arange(1000.0)
    function = compile_function(
        "function", lambda x: (x * task.tensor.sum()).float(), mode="auto", device=CPU
    )
    assert function(torch.ones(1)).item() == 499500.0
    if change == "resize_":
        task.tensor.resize_(3)
    else:
        task.tensor.data = torch.ones(3) if change == "smaller" else task.tensor.double() + 1.0
    expected = {"double": 500500.0, "smaller": 3.0, "resize_": 3.0}[change]
    for _ in range(2):
        assert function(torch.ones(1)).item() == expected
    assert len([one for one in caplog.messages if "a tensor that changed: " in one]) == 1
