"""Our handlers are set where nobody else's is, and leave the process as it was."""

import signal

import pytest

from esper_lightning.recorder.signal_handlers import SignalHandlers

NUMBERS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def _restores():
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ours(_number, _frame):
    """Our handler."""


def theirs(_number, _frame):
    """The handler of somebody else."""


@pytest.fixture
def handlers():
    return SignalHandlers(ours, address=0)


@pytest.mark.parametrize(
    ("number", "before", "unwinds", "is_taken"),
    [
        (signal.SIGUSR1, signal.SIG_DFL, False, True),
        (signal.SIGUSR1, signal.SIG_IGN, True, False),
        (signal.SIGUSR1, theirs, True, False),
        (signal.SIGTERM, theirs, True, True),  # Lightning replaces it, too
        (signal.SIGTERM, theirs, False, False),
        (signal.SIGINT, signal.default_int_handler, True, True),
        (signal.SIGINT, signal.default_int_handler, False, False),
        (signal.SIGINT, theirs, True, False),
    ],
)
def test_a_signal_is_taken_only_where_it_would_end_the_run(
    handlers, number, before, unwinds, is_taken
):
    signal.signal(number, before)
    handlers.take(number, unwinds=unwinds)
    assert handlers.is_ours(number) == is_taken
    handlers.restore(all_of_them=True, unwinds=False)
    assert signal.getsignal(number) == before
    assert handlers.replaced == {}


def test_a_handler_that_somebody_set_over_ours_stays(handlers):
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    handlers.take(signal.SIGUSR1, unwinds=True)
    signal.signal(signal.SIGUSR1, theirs)
    handlers.restore(all_of_them=True, unwinds=False)
    assert signal.getsignal(signal.SIGUSR1) is theirs


def test_after_the_fit_of_the_main_thread_ours_stays_where_the_process_would_end(handlers):
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, theirs)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        handlers.take(number, unwinds=True)
    handlers.restore(all_of_them=False, unwinds=False)
    assert handlers.is_ours(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGTERM) is theirs


def test_the_original_is_known_also_where_somebody_restores_ours_after_its_end(handlers):
    signal.signal(signal.SIGTERM, theirs)
    handlers.take(signal.SIGTERM, unwinds=True)
    handlers.restore(all_of_them=True, unwinds=False)
    signal.signal(signal.SIGTERM, ours)
    assert handlers.original(signal.SIGTERM) is theirs
    handlers.take(signal.SIGTERM, unwinds=True)
    assert handlers.replaced == {signal.SIGTERM: theirs}
