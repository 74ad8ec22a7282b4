"""One registry of the process: recordings begin and end in any order and in any thread."""

import asyncio
import itertools
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import SIGTERMException

from esper_lightning.recorder.protection import Protection, recorded
from esper_lightning.recorder.signals import ENDING, FAULTS, c_handler


class Run:
    """A recording that does nothing, in the main thread or in another one."""

    def __init__(self, in_main_thread=True):
        connector = SimpleNamespace(cluster_environment=None)
        self.trainer = SimpleNamespace(_accelerator_connector=connector)
        self.in_main_thread = in_main_thread
        self.died, self.left = [], 0

    def begin(self):
        def begin():
            self.protection = Protection(self)
            self.protection.install()

        self._do(begin)

    def end(self):
        self._do(self.protection.restore)

    def saving_for_s(self):
        return None

    def _do(self, action):
        if self.in_main_thread:
            action()
        else:
            thread = threading.Thread(target=action)
            thread.start()
            thread.join()


def flight_threads():
    return {each.name for each in threading.enumerate() if "flight" in each.name}


def state_of_the_process():
    """A handler that a recording changes; ``None`` for the wakeup descriptor."""
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    end = time.monotonic() + 2  # threads that end by themselves
    while time.monotonic() < end and flight_threads():
        time.sleep(0.001)
    return {
        "Python": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "C": {number: c_handler(number) for number in signal.valid_signals()},
        "wakeup": wakeup,
        "threads": flight_threads(),
    }


def protected(number, before):
    """Whether a handler is set in C where none was before."""
    return c_handler(number) != before["C"][number]


LISTENED_TO = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]


@given(
    order=st.permutations([0, 0, 1, 1, 2, 2]),
    in_main_thread=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_while_one_lives_the_process_is_protected_and_afterwards_as_before(order, in_main_thread):
    before = state_of_the_process()
    runs, living = [Run(each) for each in in_main_thread], set()
    for number in order:
        if number in living:
            runs[number].end()
            living.remove(number)
        else:
            runs[number].begin()
            living.add(number)
        for each in (*FAULTS, *(n for n in LISTENED_TO if n != signal.SIGALRM)):
            assert protected(each, before) == bool(living)
        for which, run in enumerate(runs):
            assert (recorded(run.trainer) is run) == (which in living)
    assert state_of_the_process() == before


class TestWhatSomebodyElseInstalls:
    def test_stays_where_it_is(self):
        def theirs(number, frame):
            seen.append(number)

        seen, run = [], Run()
        run.begin()
        signal.signal(signal.SIGUSR1, theirs)
        run.end()
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert seen == [signal.SIGUSR1]
        finally:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    @pytest.mark.parametrize("in_main_thread", [True, False])
    def test_as_a_default_action_is_taken_again(self, in_main_thread):
        before, run = state_of_the_process(), Run(in_main_thread)
        run.begin()
        for number in (signal.SIGUSR1, signal.SIGSEGV):  # a Trainer that is not recorded does so
            signal.signal(number, signal.SIG_DFL)
        thread = threading.Thread(target=run.protection.renew)
        thread.start()
        thread.join()
        for number in (signal.SIGUSR1, signal.SIGSEGV):
            assert protected(number, before)
        run.end()
        assert state_of_the_process() == before

    def test_and_puts_back_late_does_what_was_done_before(self):
        seen, run = [], Run()
        before = signal.signal(signal.SIGTERM, lambda *_: seen.append("before"))
        run.begin()
        ours = signal.signal(signal.SIGTERM, lambda *_: seen.append("theirs"))
        run.end()
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, ours)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == ["theirs", "before"]
        finally:
            signal.signal(signal.SIGTERM, before)


class TestTheWakeupDescriptor:
    @pytest.fixture
    def pair(self):
        pair = socket.socketpair()
        for each in pair:
            each.setblocking(False)
        yield pair
        signal.set_wakeup_fd(-1)
        for each in pair:
            each.close()

    @pytest.fixture(autouse=True)
    def handler(self):
        signal.signal(signal.SIGWINCH, lambda *_: None)
        yield
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)

    @staticmethod
    def heard(pair):
        os.kill(os.getpid(), signal.SIGWINCH)
        time.sleep(0.1)
        try:
            return pair[0].recv(16) == bytes([signal.SIGWINCH])
        except BlockingIOError:
            return False

    @pytest.mark.parametrize("order", list(itertools.permutations([0, 1])))
    def test_of_somebody_else_hears_what_ours_hears(self, pair, order):
        signal.set_wakeup_fd(pair[1].fileno())
        runs = [Run(), Run()]
        for run in runs:
            run.begin()
            assert self.heard(pair)
        for number in order:
            runs[number].end()
            assert self.heard(pair)
        assert signal.set_wakeup_fd(-1) == pair[1].fileno()

    def test_that_replaced_ours_stays(self, pair):
        run = Run()
        run.begin()
        signal.set_wakeup_fd(pair[1].fileno())
        assert self.heard(pair)
        run.end()
        assert self.heard(pair)
        assert signal.set_wakeup_fd(-1) == pair[1].fileno()

    def test_ours_is_set_again_where_somebody_left_none(self, pair):
        """As an asyncio loop does when it removes its last handler."""
        signal.set_wakeup_fd(pair[1].fileno())
        run, before = Run(), threading.active_count()
        run.begin()
        signal.set_wakeup_fd(-1)
        run.protection.renew()
        ours = signal.set_wakeup_fd(-1)
        assert ours not in (-1, pair[1].fileno())
        signal.set_wakeup_fd(ours)
        assert not self.heard(pair)  # who left none wants none
        run.end()
        assert signal.set_wakeup_fd(-1) == -1
        assert threading.active_count() == before

    def test_that_was_closed_meanwhile_is_not_put_back(self, pair):
        signal.set_wakeup_fd(pair[1].fileno())
        run = Run()
        run.begin()
        pair[1].close()
        assert not self.heard(pair)
        run.end()
        assert signal.set_wakeup_fd(-1) == -1

    def test_whose_number_is_another_files_by_now_hears_nothing(self, pair):
        other = socket.socketpair()
        for each in other:
            each.setblocking(False)
        signal.set_wakeup_fd(pair[1].fileno())
        run = Run()
        run.begin()
        with other[0], other[1]:
            os.dup2(other[1].fileno(), pair[1].fileno())
            assert not self.heard(other)
            run.end()
            assert signal.set_wakeup_fd(-1) == -1
            assert not self.heard(other)

    def test_is_not_passed_on_to_a_child(self, pair):
        signal.set_wakeup_fd(pair[1].fileno())
        run = Run()
        run.begin()
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGWINCH)
            os._exit(signal.set_wakeup_fd(-1) != -1)
        assert os.waitpid(pid, 0)[1] == 0
        time.sleep(0.1)
        with pytest.raises(BlockingIOError):
            pair[0].recv(16)
        run.end()


def test_an_asyncio_loop_hears_its_signals_while_a_run_blocks_it_and_afterwards():
    handled = []

    async def main():
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR2, lambda: handled.append("while"))
        run = Run()
        run.begin()
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.1)
        run.end()
        await asyncio.sleep(0.1)
        loop.add_signal_handler(signal.SIGUSR2, lambda: handled.append("after"))
        os.kill(os.getpid(), signal.SIGUSR2)
        await asyncio.sleep(0.1)
        loop.remove_signal_handler(signal.SIGUSR2)

    asyncio.run(main())
    assert handled == ["while", "after"]


def test_a_child_forked_while_signals_are_held_back_holds_back_its_own():
    run = Run()
    run.begin()
    with Protection.held():
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            Run().begin()
            with Protection.held():
                os.kill(os.getpid(), signal.SIGUSR1)
                status = 2
        except SystemExit as error:
            status = 0 if status == 2 and error.code == 128 + signal.SIGUSR1 else 3
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    run.end()


@pytest.mark.parametrize(
    ("error", "left_to_lightning", "code"),
    [
        (SIGTERMException(), set(), 143),
        (SIGTERMException(), {signal.SIGTERM}, None),  # it requeues a SLURM job
        (SystemExit(), set(), None),
        (SystemExit(3), set(), 3),
    ],
)
def test_an_end_by_sigterm_that_lightning_raises_is_no_success(error, left_to_lightning, code):
    protection = Protection(Run())
    protection._member.left_to_lightning = left_to_lightning
    protection.set_status(error)
    assert error.code == code
