"""Reads by a text, within a package, and of objects of other libraries are watched or refused."""

import copy
import ctypes
import enum
import pickle
import re
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper_lightning.compiling.entries import Members
from esper_lightning.compiling.holders import ImpureError, find_holders
from esper_lightning.compiling.loops import compile_function, compile_loop
from esper_lightning.compiling.purity import results_of_pure
from esper_lightning.compiling.reads import recorded
from esper_lightning.envs import Box
from esper_lightning.policies.encoders import FlatEncoder

settings: Any = ModuleType("settings_of_a_script")
exec("GAIN, CALLS = 1.0, 0\ndef scaled(x): return x * GAIN\n", vars(settings))
exec("def counting(x):\n global CALLS\n CALLS += 1\n return x * 2.0", vars(settings))
GAIN_OF_TEST = 1.0

# An installed package with two modules, of which one imports the other within a function.
prices: Any = ModuleType("shop.prices")
goods: Any = ModuleType("shop.goods")
for module in (prices, goods):
    module.__package__, module.__file__ = "shop", "/site-packages/shop/module.py"
exec("GAIN, GAINS = 1.0, {0: 1.0}\nclass Sizes: gain = 1.0\nSIZES = Sizes()", vars(prices))
exec(
    "SIZE = 1.0\ndef priced(x): return x * _price()\n"
    "def _price():\n from .prices import GAIN, GAINS, SIZES\n"
    " return SIZE * GAIN * GAINS[0] * SIZES.gain",
    vars(goods),
)


class Once(type):
    """A class of classes that have one object each."""

    level, made = 1.0, dict[Any, Any]()

    def __call__(cls) -> Any:
        return cls.made.setdefault(cls, super().__call__())


class Config(metaclass=Once):
    """The settings of a user's program."""

    gain = 1.0


class Mass(NamedTuple):
    """A named tuple with a method."""

    mass: float

    def weight(self) -> float:
        return self.mass * settings.GAIN


class Mode(enum.IntEnum):
    """A number with a method."""

    EASY = 1

    def gain(self) -> float:
        return settings.GAIN


class Table(dict[str, float]):
    """A dict with attributes."""


class Pair(tuple[float, ...]):
    """A tuple with attributes."""


class Part:
    """An object with a number, which sets and keys may hold."""

    gain = 1.0


class Indirect:
    """An object that has attributes by its own rules."""

    def __init__(self) -> None:
        self.data = {"gain": 1.0}

    def __getattribute__(self, name: str) -> Any:
        data = object.__getattribute__(self, "__dict__").get("data", {})
        return data[name] if name in data else object.__getattribute__(self, name)


class Task:
    """What a user's environment may hold."""

    def __init__(self) -> None:
        self.names, self.name = ("GAIN",), "GAIN"
        self.parts, self.keys = {Part()}, {Part(): 1.0}
        self.mass, self.mode = Mass(1.0), Mode.EASY
        self.table: Any = Table()
        self.pair: Any = Pair((1.0,))
        self.table.space = self.pair.space = SimpleNamespace(gain=1.0)
        self.marked: Any = torch.ones(())
        self.marked.gain = 1.0
        self.part, self.indirect, self.behind = Part(), Indirect(), {"gain": 1.0}
        self.get, self.reference = self.behind.get, weakref.ref(self.part)
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        self.normal = torch.distributions.Normal(torch.zeros(2), torch.ones(2), validate_args=False)
        self.box = gymnasium.spaces.Box(-1.0, 1.0, (2,))
        random = torch.Generator()
        self.flat = FlatEncoder(Box((2,)), None, (2,), activation="tanh", generator=random)


def by_names(x: Tensor, names: tuple[str, ...]) -> Tensor:
    for name in names:
        x = x * getattr(settings, name)
    return x


def appearing(x: Tensor) -> Tensor:
    try:
        return x * VARIABLE_THAT_APPEARS  # pyright: ignore[reportUndefinedVariable]
    except NameError:
        return x


SCALED = "scaled"
set_gain = lambda t: setattr(settings, "GAIN", 2.0)  # noqa: E731
CHANGES: dict[str, tuple[Callable[[Task, Tensor], Tensor], Callable[[Task], Any]]] = {
    "number by a text": (lambda t, x: by_names(x, t.names), set_gain),
    "function by a text": (lambda t, x: getattr(settings, SCALED)(x), set_gain),
    "dict of a module": (lambda t, x: x * vars(settings)[t.name], set_gain),
    "module by a text": (lambda t, x: x * sys.modules["settings_of_" + "a_script"].GAIN, set_gain),
    "asked of a module": (
        lambda t, x: x * (2.0 if hasattr(settings, "NEW") else 1.0),
        lambda t: setattr(settings, "NEW", 1.0),
    ),
    "own variable by a text": (
        lambda t, x: x * globals()[f"{t.name}_OF_TEST"],
        lambda t: globals().__setitem__("GAIN_OF_TEST", 2.0),
    ),
    "variable that appears": (
        lambda t, x: appearing(x),
        lambda t: globals().__setitem__("VARIABLE_THAT_APPEARS", 2.0),
    ),
    "installed helper": (lambda t, x: goods.priced(x), lambda t: setattr(goods, "SIZE", 2.0)),
    "import within a package": (
        lambda t, x: goods.priced(x),
        lambda t: setattr(prices, "GAIN", 2.0),
    ),
    "dict within a package": (
        lambda t, x: goods.priced(x),
        lambda t: prices.GAINS.__setitem__(0, 2.0),
    ),
    "object within a package": (
        lambda t, x: goods.priced(x),
        lambda t: setattr(prices.SIZES, "gain", 2.0),
    ),
    "element of a set": (
        lambda t, x: x * next(iter(t.parts)).gain,
        lambda t: setattr(next(iter(t.parts)), "gain", 2.0),
    ),
    "key": (
        lambda t, x: x * next(iter(t.keys)).gain,
        lambda t: setattr(next(iter(t.keys)), "gain", 2.0),
    ),
    "copy": (lambda t, x: x * copy.copy(t.part).gain, lambda t: setattr(t.part, "gain", 2.0)),
    "deep copy": (
        lambda t, x: x * copy.deepcopy([t.part])[0].gain,
        lambda t: setattr(t.part, "gain", 2.0),
    ),
    "pickle": (
        lambda t, x: x * pickle.loads(pickle.dumps(t.part)).gain,
        lambda t: setattr(t.part, "gain", 2.0),
    ),
    "method of a tuple": (lambda t, x: x * t.mass.weight(), set_gain),
    "method of a number": (lambda t, x: x * t.mode.gain(), set_gain),
    "one object": (lambda t, x: x * Config().gain, lambda t: setattr(Config(), "gain", 2.0)),
    "class of classes": (lambda t, x: x * Config.level, lambda t: setattr(Once, "level", 2.0)),
    "attribute of a dict": (
        lambda t, x: x * t.table.space.gain,
        lambda t: setattr(t.table.space, "gain", 2.0),
    ),
    "attribute of a tuple": (
        lambda t, x: x * t.pair.space.gain,
        lambda t: setattr(t.pair, "space", SimpleNamespace(gain=2.0)),
    ),
    "attribute of a tensor": (
        lambda t, x: x * t.marked.gain,
        lambda t: setattr(t.marked, "gain", 2.0),
    ),
    "method in C": (lambda t, x: x * t.get("gain"), lambda t: t.behind.update(gain=2.0)),
    "weak reference": (
        lambda t, x: x * t.reference().gain,
        lambda t: setattr(t.part, "gain", 2.0),
    ),
    "own rules": (
        lambda t, x: x * t.indirect.gain,
        lambda t: t.indirect.data.update(gain=2.0),
    ),
    "optimizer": (
        lambda t, x: x * t.optimizer.param_groups[0]["lr"],
        lambda t: t.optimizer.param_groups[0].update(lr=2.0),
    ),
    "distribution": (
        lambda t, x: t.normal.log_prob(x),
        lambda t: setattr(t.normal, "scale", torch.full((2,), 2.0)),
    ),
    "space": (
        lambda t, x: x * float(t.box.high[0]),
        lambda t: setattr(t.box, "high", np.full(2, 2.0)),
    ),
    "hook of a shipped class": (
        lambda t, x: t.flat(x[None]),
        lambda t: t.flat.register_forward_hook(lambda *args: args[2] * 2.0),
    ),
    "layer of a shipped class": (
        lambda t, x: t.flat(x[None]),
        lambda t: setattr(t.flat, "1", nn.ReLU()),
    ),
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore what the changes change."""
    for one in (settings, prices, goods):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    monkeypatch.setattr(settings, "GAIN", 1.0)
    monkeypatch.setattr(settings, "NEW", 1.0, raising=False)
    monkeypatch.delattr(settings, "NEW")
    monkeypatch.setattr(prices, "GAIN", 1.0)
    monkeypatch.setattr(prices, "GAINS", {0: 1.0})
    monkeypatch.setattr(prices.SIZES, "gain", 1.0)
    monkeypatch.setattr(goods, "SIZE", 1.0)
    monkeypatch.setattr(Once, "level", 1.0)
    monkeypatch.setattr(Config(), "gain", 1.0)
    monkeypatch.setitem(globals(), "GAIN_OF_TEST", 1.0)
    monkeypatch.setitem(globals(), "VARIABLE_THAT_APPEARS", 1.0)
    monkeypatch.delitem(globals(), "VARIABLE_THAT_APPEARS")


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_function_reads_in_an_indirect_way_is_noticed_when_it_changes(name: str) -> None:
    task, x, (read, change) = Task(), torch.tensor([1.0, -2.0]), CHANGES[name]
    function = lambda x: read(task, x)  # noqa: E731
    with recorded(function) as reads:
        before = torch.cat(results_of_pure(function, x))
    task.name = "GAIN"
    settings.unread = 5
    assert reads.changed() is None or name in ("dict of a module", "own variable by a text")
    change(task)
    assert not torch.equal(function(x), before)
    assert reads.changed() is not None
    assert type(settings) is ModuleType
    assert sys.getprofile() is None


SHOWING: dict[str, Callable[[], Any]] = {
    "proxy": lambda: weakref.proxy(settings),
    "local": threading.local,
    "Event": threading.Event,
    "memoryview": lambda: memoryview(bytearray(1)),
    "c_double": ctypes.c_double,
}


@pytest.mark.parametrize("name", SHOWING)
def test_what_shows_changes_that_nothing_can_see_is_refused(name: str) -> None:
    held = SimpleNamespace(shown=SHOWING[name]())
    function = lambda x: x if held.shown is None else x * 2.0  # noqa: E731
    with (
        pytest.raises(
            ImpureError, match=f"shown: changes of a \\w*(?i:{name})\\w* are not noticed"
        ),
        recorded(function),
    ):
        function(torch.ones(2))


def test_numbers_of_another_thread_and_of_a_comparison_of_tensors_are_refused() -> None:
    part, one = Part(), torch.ones(2)
    with ThreadPoolExecutor(1) as pool:
        function = lambda x: x * pool.submit(lambda: part.gain).result()  # noqa: E731
        with pytest.raises(ImpureError, match="waiting for another thread"), recorded(function):
            function(torch.ones(2))
    with pytest.raises(ImpureError, match="a number of a tensor"):
        results_of_pure(lambda x: x if torch.equal(one, x) else x * 2.0, torch.ones(2))


@pytest.mark.parametrize("how", ["text", "set", "tuple"])
def test_what_changes_where_a_function_finds_it_is_restored(how: str) -> None:
    part: Any = Part()
    pair: Any = Pair((1.0,))
    pair.calls = part.calls = 0
    parts, names = {part}, ("counting",)

    def function(x: Tensor) -> Tensor:
        if how == "text":
            return getattr(settings, names[0])(x)
        held: Any = next(iter(parts)) if how == "set" else pair
        held.calls += 1
        return x * 2.0

    with pytest.raises(ImpureError, match=r"an attribute that changes: (CALLS|.*calls|pair)"):
        results_of_pure(function, torch.ones(2))
    assert (settings.CALLS, part.calls, pair.calls) == (0, 0, 0)


def test_a_profile_of_python_continues_after_a_recording() -> None:
    import cProfile  # noqa: PLC0415

    with cProfile.Profile() as profile:
        with recorded(settings.scaled):
            settings.scaled(torch.ones(1))
        torch.ones(1).new_ones(7)
    assert any("new_ones" in str(one.code) for one in profile.getstats())


def test_a_profiler_of_torch_with_stacks_continues_beside_a_recording(tmp_path: Path) -> None:
    def before(x: Tensor) -> Tensor:
        return x * settings.GAIN

    def later() -> Tensor:
        return torch.ones(1).new_ones(7)

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, with_stack=True) as profile:
        with recorded(before) as reads:
            before(torch.ones(1))
        later()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = (tmp_path / "trace.json").read_text()
    for name in ("before", "later"):
        assert re.search(rf"test_reads_of_others\.py\(\d+\): {name}", trace), name
    settings.GAIN += 1.0
    try:
        assert reads.changed() is not None
    finally:
        settings.GAIN -= 1.0


# Installed as well, of which another installed project imports classes.
tariffs: Any = ModuleType("tariffs")
market: Any = ModuleType("market.stall")
for module in (tariffs, market):
    module.__file__ = f"/site-packages/{module.__name__}/module.py"
exec(
    "class Base: rates = [1.0]\n"
    "class Tariff(Base):\n gain = 1.0\n"
    " @staticmethod\n def of(x): return x * Tariff.gain\n"
    " class Inner: gain = 1.0\n"
    "def gain(): return Tariff.gain",
    vars(tariffs),
)
vars(market).update(tariffs=tariffs, Tariff=tariffs.Tariff, gain=tariffs.gain)
exec(
    "def by_class(x): return x * Tariff.gain\n"
    "def by_module(x): return x * tariffs.Tariff.gain\n"
    "def by_function(x): return x * gain()\n"
    "def by_static_method(x): return Tariff.of(x)\n"
    "def by_object(x): return x * Tariff().gain\n"
    "def by_base(x): return x * Tariff.rates[0]\n"
    "def by_inner(x): return x * Tariff.Inner.gain",
    vars(market),
)


@pytest.mark.usefixtures("native_code")
@pytest.mark.parametrize("kind", ["loop", "function"])
@pytest.mark.parametrize("name", [one for one in vars(market) if one.startswith("by_")])
def test_classes_that_installed_projects_read_are_watched(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no comparison shows the effect: not in the first step, and in a few numbers."""
    monkeypatch.setitem(sys.modules, "tariffs", tariffs)
    monkeypatch.setattr(tariffs.Tariff, "gain", 1.0)
    monkeypatch.setattr(tariffs.Tariff.Inner, "gain", 1.0)
    monkeypatch.setattr(tariffs.Base, "rates", [1.0])

    def body(carry: Tensor, x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return carry, torch.where(x > 7.0, getattr(market, name)(x), 0.0)

    x = torch.arange(1000.0) * 0.00801  # of which a hundredth is above 7.9
    given: Any = (torch.zeros(1000), x * (x > 7.9), torch.zeros(1))
    run: Any = compile_function("update", body, mode="auto", device=torch.device("cpu"))
    if kind == "loop":
        given = (torch.zeros(1), torch.arange(9.0)[:, None], None, torch.zeros(1), None)
        run = compile_loop("rollout", body, mode="auto", device=torch.device("cpu"))
    before = run(*given)[1].max().item()
    tariffs.Tariff.gain = tariffs.Tariff.Inner.gain = tariffs.Base.rates[0] = 2.0
    assert run(*given)[1].max().item() == 2.0 * before


def test_methods_of_classes_that_installed_projects_name_are_not_followed() -> None:
    """There are thousands in a large library: those that are called are watched as they run."""
    held = {id(one.held) for one in find_holders(market.by_class)}
    assert id(tariffs.Tariff) in held
    assert id(tariffs.Base) in held
    assert not any(
        isinstance(one.held, FunctionType) for one in find_holders([Members(tariffs.Tariff)])
    )
