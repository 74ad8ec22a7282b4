"""Native code is given up once something has changed that it took for a constant."""

import argparse
import array
import builtins
import ctypes
import functools
import os
import sys
import threading
from collections import ChainMap, UserDict, deque
from types import MappingProxyType, ModuleType, SimpleNamespace
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


settings = ModuleType("settings_of_a_user")
exec("GAIN = 1.0\nclass Sizes: gain = 1.0\ndef step(x): return x * GAIN", vars(settings))


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
        self.tensor, self.outer = torch.ones(2), Outer()
        self.calls: Any = 0
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


class Harder(Task):
    """Another class for the same object."""

    def by_number(self, x: Tensor) -> Tensor:
        return x * 2


def test_an_object_of_another_class_is_noticed(task: Task) -> None:
    method, x = task.by_number, torch.ones(2)
    with recorded(method) as reads:
        results_of_pure(method, x)
    task.__class__ = Harder
    assert reads.changed() == "Task.__class__"


class Layers(nn.Module):
    """A user's module with what modules hold."""

    level = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("wind", torch.ones(()))
        self.weight = nn.Parameter(torch.ones(()))
        self.linear, self.norm = nn.Linear(2, 2), nn.LayerNorm(2)
        self.slope, self.row = nn.LeakyReLU(0.1), nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        self.parts = nn.ParameterList([nn.Parameter(torch.ones(()))])
        self.named = nn.ParameterDict({"a": torch.ones(())})

    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0


class Sub(Task):
    """A user's object with an attribute of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.space = Layers(), SimpleNamespace(gain=1.0)
        self.parsed, self.chain = argparse.Namespace(gain=1.0), ChainMap({"gain": 1.0})
        self.user_dict, self.numbers = UserDict(gain=1.0), array.array("d", [1.0])
        self.many, self.large = [1.0] * 2000, np.ones(3000)
        self.part = functools.partial(scaled, gain=1.0)
        self.behind, self.queue = {"gain": 1.0}, deque([1.0])
        self.view = MappingProxyType(self.behind)

    def __getattr__(self, name: str) -> Any:
        if name == "hidden":
            return self.__dict__["scale"]
        raise AttributeError(name)


def scaled(x: Tensor, gain: float = 1.0) -> Tensor:
    return x * gain * vars(scaled).get("more", 1.0)


def imported_within(x: Tensor) -> Tensor:
    import settings_of_a_user  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    return x * settings_of_a_user.GAIN


scaled.more = 1.0  # pyright: ignore[reportFunctionMemberAccess]
AGAIN = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
TWO = nn.Parameter(torch.full((), 2.0))
CHANGES: dict[str, tuple[Any, Any]] = {
    "module": (lambda t, x: x * settings.GAIN, lambda t: setattr(settings, "GAIN", 2.0)),
    "class of a module": (
        lambda t, x: x * settings.Sizes.gain,
        lambda t: setattr(settings.Sizes, "gain", 2.0),
    ),
    "function of a module": (
        lambda t, x: settings.step(x),
        lambda t: setattr(settings, "GAIN", 2.0),
    ),
    "import": (lambda t, x: imported_within(x), lambda t: setattr(settings, "GAIN", 2.0)),
    "buffer": (lambda t, x: x * t.layers.wind, lambda t: setattr(t.layers, "wind", TWO.data)),
    "parameter": (lambda t, x: x * t.layers.weight, lambda t: setattr(t.layers, "weight", TWO)),
    "assigned": (
        lambda t, x: t.layers.linear(x),
        lambda t: t.layers.linear.load_state_dict(AGAIN, assign=True),
    ),
    "sequence": (
        lambda t, x: t.layers.row(x),
        lambda t: t.layers.row.__setitem__(1, nn.ReLU()),
    ),
    "list of parameters": (
        lambda t, x: x * t.layers.parts[0],
        lambda t: t.layers.parts.__setitem__(0, TWO),
    ),
    "dict of parameters": (
        lambda t, x: x * t.layers.named["a"],
        lambda t: t.layers.named.__setitem__("a", TWO),
    ),
    "eps": (lambda t, x: t.layers.norm(x), lambda t: setattr(t.layers.norm, "eps", 1.0)),
    "slope": (
        lambda t, x: t.layers.slope(-x),
        lambda t: setattr(t.layers.slope, "negative_slope", 0.5),
    ),
    "hook": (
        lambda t, x: t.layers.linear(x),
        lambda t: t.layers.linear.register_forward_hook(lambda m, i, o: o * 2.0),
    ),
    "method": (lambda t, x: t.layers(x), lambda t: setattr(Layers, "forward", lambda s, x: x)),
    "own method": (lambda t, x: t.by_list(x), lambda t: setattr(t, "by_list", lambda x: x * 2.0)),
    "hidden class attribute": (
        lambda t, x: x * t.layers.level,
        lambda t: setattr(t.layers, "level", 2.0),
    ),
    "attribute of a subclass": (
        lambda t, x: x * t.level,
        lambda t: setattr(Sub, "level", 2.0),
    ),
    "namespace": (lambda t, x: x * t.space.gain, lambda t: setattr(t.space, "gain", 2.0)),
    "arguments": (lambda t, x: x * t.parsed.gain, lambda t: setattr(t.parsed, "gain", 2.0)),
    "chain": (lambda t, x: x * t.chain["gain"], lambda t: t.chain.update(gain=2.0)),
    "user dict": (lambda t, x: x * t.user_dict["gain"], lambda t: t.user_dict.update(gain=2.0)),
    "view": (lambda t, x: x * t.view["gain"], lambda t: t.behind.update(gain=2.0)),
    "deque": (lambda t, x: x * t.queue[0], lambda t: t.queue.appendleft(2.0)),
    "numbers": (lambda t, x: x * t.numbers[0], lambda t: t.numbers.__setitem__(0, 2.0)),
    "long list": (lambda t, x: x * t.many[1500], lambda t: t.many.__setitem__(1500, 2.0)),
    "large array": (lambda t, x: x * float(t.large[9]), lambda t: t.large.__setitem__(9, 2.0)),
    "partial": (lambda t, x: t.part(x), lambda t: t.part.keywords.update(gain=2.0)),
    "default": (lambda t, x: scaled(x), lambda t: setattr(scaled, "__defaults__", (2.0,))),
    "attribute of a function": (lambda t, x: scaled(x), lambda t: setattr(scaled, "more", 2.0)),
    "dict of attributes": (lambda t, x: x * vars(t)["scale"], lambda t: setattr(t, "scale", 2.0)),
    "own getattr": (lambda t, x: x * t.hidden, lambda t: setattr(t, "scale", 2.0)),
    "in vain": (lambda t, x: x * getattr(t, "new", 1.0), lambda t: setattr(t, "new", 2.0)),
    "builtin": (
        lambda t, x: x * GAIN_OF_ALL,  # pyright: ignore[reportUndefinedVariable]
        lambda t: setattr(builtins, "GAIN_OF_ALL", 2.0),
    ),
    "environment": (
        lambda t, x: x * float(os.environ.get("GAIN_OF_A_USER", "1")),
        lambda t: os.environ.__setitem__("GAIN_OF_A_USER", "2"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_kind_of_thing_that_a_function_reads_is_watched(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no kind of change leaves an old value in native code, and nothing else is noticed."""
    monkeypatch.setattr(settings, "GAIN", 1.0)
    monkeypatch.setattr(builtins, "GAIN_OF_ALL", 1.0, raising=False)
    monkeypatch.setattr(settings.Sizes, "gain", 1.0)
    monkeypatch.setattr(Layers, "forward", Layers.forward)
    monkeypatch.setattr(Sub, "level", 1.0)
    monkeypatch.delattr(Sub, "level")
    monkeypatch.setattr(scaled, "__defaults__", (1.0,))
    monkeypatch.setattr(scaled, "more", 1.0)
    monkeypatch.setenv("GAIN_OF_A_USER", "1")
    monkeypatch.setitem(sys.modules, "settings_of_a_user", settings)
    task, x, (read, change) = Sub(), torch.tensor([1.0, 2.0]), CHANGES[name]
    function = lambda x: read(task, x)  # noqa: E731
    with recorded(function) as reads:
        before = torch.cat(results_of_pure(function, x))
    task.layers.unread = 5
    assert reads.changed() is None
    with torch.no_grad():
        change(task)
        assert not torch.equal(function(x), before)
    assert reads.changed() is not None


def test_equal_values_are_no_change_and_other_threads_read_for_themselves() -> None:
    task = Sub()

    def step(x: Tensor) -> Tensor:
        reader = threading.Thread(target=lambda: task.calls)
        reader.start()
        reader.join()
        return x * task.scale * task.table["a"][0] * task.many[0]

    with recorded(step) as reads:
        step(torch.ones(2))
    task.calls, task.scale, task.table["a"] = 7, float("1.0"), [1.0]
    assert reads.changed() is None
    task.table["a"][0] = 2.0  # of the new list
    assert reads.changed() == "Sub.table"


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
def test_an_object_that_holds_its_own_native_code_has_a_program_for_each_shape(
    task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    """What the first program watches is not taken for something that the function holds."""
    log_reasons_again()
    task.calls = compile_function("function", task.by_class, mode="auto", device=CPU)
    for rows in (2, 3):
        assert task.calls(torch.ones(rows)).tolist() == [1.0] * rows
    assert [one for one in caplog.messages if one.startswith("Native code")] == []


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
    for _ in range(2):  # the next call is compared with nothing
        assert function(torch.ones(1)).item() == 499500.0
    if change == "resize_":
        task.tensor.resize_(3)
    else:
        task.tensor.data = torch.ones(3) if change == "smaller" else task.tensor.double() + 1.0
    expected = {"double": 500500.0, "smaller": 3.0, "resize_": 3.0}[change]
    for _ in range(2):
        assert function(torch.ones(1)).item() == expected
    assert len([one for one in caplog.messages if "a tensor that changed: " in one]) == 1


def seen_by_no_operation(tensor: Tensor) -> float:
    """The first number of a tensor as an extension in C may read it."""
    with torch._C.DisableTorchFunction():
        return ctypes.c_float.from_address(tensor.data_ptr()).value


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("size", [2, 100])
def test_a_tensor_that_no_program_reads_is_watched_for_its_numbers(
    size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One that a program reads where it lies may get other numbers."""
    log_reasons_again()
    held, read, x = torch.ones(size), torch.ones(2), torch.ones(2)
    levels = {"held": [held], "read": read}
    function = compile_function(
        "step",
        lambda x: x * seen_by_no_operation(levels["held"][0]) * levels["read"],
        mode="auto",
        device=CPU,
    )
    expected = 1.0
    for factor in (1.0, 2.0, 3.0):
        read.mul_(factor)
        expected *= factor
        assert function(x).tolist() == [expected] * 2
    assert not [one for one in caplog.records if one.levelname == "WARNING"]
    held.fill_(10.0)
    assert function(x).tolist() == [60.0] * 2
    (line,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert line.endswith("an attribute that changed: levels")
