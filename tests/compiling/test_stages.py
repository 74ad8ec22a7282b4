"""A stage runs as the stage of a checkpoint did, whose state it gets."""

from collections.abc import Callable
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from esper_lightning.compiling.loops import compile_function
from esper_lightning.compiling.stages import (
    FirstThatWorks,
    NativeStage,
    Stage,
    restore_stages,
    stages_within,
)

pytestmark = pytest.mark.usefixtures("native_code")
CPU = torch.device("cpu")
CALLS: SimpleQueue[int] = SimpleQueue()  # which is not watched


def calls() -> list[int]:
    """Sizes of the arguments of all calls since the last time."""
    return [CALLS.get() for _ in range(CALLS.qsize())]


def stage_of(user: SimpleNamespace) -> NativeStage:
    """A native stage that reads a user's object, and is refused for three numbers."""

    def scaled(x: Tensor) -> Tensor:
        CALLS.put(len(x))
        if len(x) == 3:
            raise ArithmeticError
        return x * user.gain

    stage = compile_function("function", scaled, mode="auto", device=CPU)
    assert isinstance(stage, NativeStage)
    return stage


def of(size: int) -> Tensor:
    """An argument of a size."""
    return torch.ones(size)


def resumed(stage: Stage, new: Stage) -> Stage:
    """A new stage with the state of another one."""
    restore_stages({"one": new, "other": new}, {"one": stage.state(), "gone": stage.state()})
    assert new.state() == stage.state()
    return new


def test_a_stage_that_was_given_up_stays_so() -> None:
    user = SimpleNamespace(gain=2.0)
    stage = stage_of(user)
    stage(of(5))
    assert not stage.state()["slower"]
    user.gain = 3.0
    calls()
    before_the_next_call = resumed(stage, stage_of(user))
    assert stage(of(5)).tolist() == [3.0] * 5
    for new in (before_the_next_call, resumed(stage, stage_of(user))):
        calls()
        assert new(of(5)).tolist() == [3.0] * 5
        assert calls() == [5]


def test_a_kind_of_arguments_that_was_refused_stays_so() -> None:
    user = SimpleNamespace(gain=2.0)
    stage = stage_of(user)
    with pytest.raises(ArithmeticError):
        stage(of(3))
    stage(of(5))
    assert stage.state()["slower"]
    new = resumed(stage, stage_of(user))
    calls()
    with pytest.raises(ArithmeticError):
        new(of(3))
    assert calls() == [3]
    new(of(4))
    assert len(calls()) > 1  # it is asked and traced


def test_comparisons_are_due_when_they_would_have_been() -> None:
    user = SimpleNamespace(gain=2.0)
    stages = [stage_of(user)]
    for _ in range(5):
        stages[0](of(5))
    stages.append(resumed(stages[0], stage_of(user)))
    compared: list[list[bool]] = []
    for stage in stages:
        calls()
        compared.append([])
        for _ in range(12):
            stage(of(5))
            compared[-1].append(calls()[-1:] == [5])
    assert [k for k, one in enumerate(compared[0], 6) if one] == [8, 11, 16]
    assert compared[1][1:] == compared[0][1:]  # its first call is a trace
    assert stages[1].state() == stages[0].state()


def test_ways_that_failed_and_the_first_shapes_are_known_again() -> None:
    def way(name: str, *, fails: bool = False) -> Callable[[Tensor], str]:
        def run(x: Tensor) -> str:
            if fails:
                raise RuntimeError(f"no {len(x)}")
            return name

        return run

    def ways() -> FirstThatWorks:
        return FirstThatWorks("test", "A way", [way("no", fails=True), way("fast"), way("eager")])

    stage = ways()
    assert not stage.state()["slower"]
    assert [stage(of(size)) for size in (2, 3)] == ["fast", "eager"]
    assert stage.state()["slower"]
    new = resumed(stage, ways())
    assert [new(of(size)) for size in (3, 2, 3)] == ["eager", "fast", "eager"]
    other_mode = FirstThatWorks("test", "A way", [way("fast"), way("eager")])
    restore_stages({"one": other_mode}, {"one": stage.state()})
    assert other_mode(of(3)) == "fast"
    native = stage_of(SimpleNamespace(gain=2.0))
    before = native.state()
    restore_stages({"one": native}, {"one": stage.state()})
    assert native.state() == before


def test_stages_of_one_name_are_numbered() -> None:
    user = SimpleNamespace(gain=2.0)
    owner = SimpleNamespace(a=stage_of(user), b=3, c=stage_of(user))
    assert stages_within(owner, SimpleNamespace(d=owner.a)) == {
        "function": owner.a,
        "function 2": owner.c,
        "function 3": owner.a,
    }
