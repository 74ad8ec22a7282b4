"""A recording ends once, and never in a way that contradicts what was seen before."""

import contextlib
import threading
from enum import Enum

import pytest

from esper_lightning.recorder import state as module
from esper_lightning.recorder.state import LifeCycle, State

LEGAL = {
    State.RUNNING: {State.DYING, State.FINISHED, State.FAILED, State.OFF},
    State.DYING: {State.DYING, State.FAILED, State.OFF},
}
ENDED = [state for state in State if state not in LEGAL]


@pytest.fixture(autouse=True)
def _only_legal_states():
    """Replaces the fixture by which an illegal state fails every other test."""


@pytest.mark.parametrize("after", State)
@pytest.mark.parametrize("before", LEGAL)
def test_only_a_legal_state_is_entered_and_any_other_is_an_error_in_the_log(before, after, caplog):
    life = LifeCycle()
    life.state = before
    is_legal = after in LEGAL[before]
    assert life.enter(after) == is_legal
    assert life.state is (after if is_legal else before)
    message = f"A recording must not become {after.value} after {before.value}."
    assert caplog.messages == ([] if is_legal else [message])


@pytest.mark.parametrize("after", State)
@pytest.mark.parametrize("end", ENDED)
def test_a_recording_that_has_ended_stays_as_it_is_and_says_nothing(end, after, caplog):
    life = LifeCycle()
    assert life.enter(end)
    assert not life.enter(after)
    assert life.state is end
    assert caplog.messages == []


class Slow(dict[State, frozenset[State]]):
    """A table in which two threads look at the same time, unless a lock prevents it."""

    def __init__(self, table: dict[State, frozenset[State]]) -> None:
        super().__init__(table)
        self.both = threading.Barrier(2)

    def __getitem__(self, state: State) -> frozenset[State]:
        with contextlib.suppress(threading.BrokenBarrierError):
            self.both.wait(0.5)
        return super().__getitem__(state)


def test_of_two_threads_one_ends_the_recording(monkeypatch):
    life, entered = LifeCycle(), []
    monkeypatch.setattr(module, "_NEXT", Slow(module._NEXT))

    def end(state: Enum) -> None:
        entered.append(life.enter(state))

    threads = [threading.Thread(target=end, args=[s]) for s in (State.FINISHED, State.FAILED)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entered) == [False, True]
