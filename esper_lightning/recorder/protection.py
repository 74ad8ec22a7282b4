"""What recordings change in their process: one registry, in which they come and go in any order.

A process has one handler for a signal, one wakeup descriptor, one ``lightning...call._interrupt``.
They are ours from the beginning of the first living recording to the end of the last, whichever
threads those run in. What somebody else puts over ours stays where it is, and reaches through ours
what was there before.

Python sets handlers of signals and the wakeup descriptor in the main thread only. A recording that
begins in another thread catches signals in C at once, and has the main thread do the rest as soon
as it runs.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import atexit
import contextlib
import ctypes
import functools
import multiprocessing.util
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import SIGTERMException

from esper_lightning.recorder.signals import (
    ENDING,
    FAULTS,
    Action,
    SignalExit,
    alarm,
    c_handler,
    dump_stacks,
    end_by,
    raise_in_this_thread,
    read_action,
    run_in_main_thread,
    set_c_handler,
    signal_name,
    write_action,
)
from esper_lightning.recorder.watchdog import Arrival, awake_s

__all__ = ["Patch", "Protection", "Recorded", "recorded", "run_depth"]

_LAST_GASP_S = 10
_HANDLED_S = 1.0  # a signal that our handler was called for is no news to the watchdogs
_Handler = Any
_RUN: Any = call._call_and_handle_interrupt
_ABSENT = object()


class Recorded(Protocol):
    """What the registry asks of a recording."""

    @property
    def trainer(self) -> Trainer:
        """Trainer of the run."""
        ...

    @property
    def stacks(self) -> Path:
        """File for the stacks of all threads."""
        ...

    def die(self, error: BaseException, *, lingers: bool) -> None:
        """Save everything; what died of the error is Lightning's run."""
        ...

    def last_gasp(self, signal_name: str) -> None:
        """Save what can be saved from within a handler in C."""
        ...

    def at_exit(self) -> None:
        """The interpreter ends."""
        ...

    def leave(self) -> None:
        """Lightning has shut down what died."""
        ...

    def saving_for_s(self) -> float | None:
        """Seconds since the latest step of saving evidence began, as for ``Watchdog``."""
        ...


def run_depth(trainer: Trainer) -> int:
    """How many runs of a Trainer, one within another, the calling thread is in."""
    depth, frame = 0, cast(FrameType | None, sys._getframe())
    while frame is not None:
        if frame.f_code is _RUN.__code__ and frame.f_locals.get("trainer") is trainer:
            depth += 1
        frame = frame.f_back
    return depth


class Patch:
    """A function in place of an attribute of somebody else's object, taken back in any order.

    Args:
        owner: The object, or a module.
        name: Of the attribute.
        function: Called in its place.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._owner, self._name = owner, name
        self._lives = True
        self._previous: Any = vars(owner).get(name, _ABSENT)

        def patched(*args: Any, **kwargs: Any) -> Any:
            return (function if self._lives else self.original)(*args, **kwargs)

        patched.patch = self  # pyright: ignore[reportFunctionMemberAccess]
        self._patched = patched
        setattr(owner, name, patched)

    @property
    def original(self) -> Callable[..., Any]:
        """What was there before."""
        previous = self._before()
        if previous is _ABSENT:
            return getattr(type(self._owner), self._name).__get__(self._owner)
        return previous

    def undo(self) -> None:
        """Take it back; where somebody has patched over it, it stays and calls the original."""
        self._lives = False
        if vars(self._owner).get(self._name) is self._patched:
            previous = self._before()
            if previous is _ABSENT:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, previous)

    def _before(self) -> Any:
        previous = self._previous
        while isinstance(patch := getattr(previous, "patch", None), Patch) and not patch._lives:
            previous = patch._previous
        return previous


class Protection:
    """The share of one recording in what protects the process.

    Args:
        of: The recording; its thread is the one that calls ``install``.
    """

    def __init__(self, of: Recorded) -> None:
        self.of = of
        self.thread = threading.get_ident()
        self.in_main_thread = _in_main_thread()
        self.kept = _requeue_signals(of.trainer)
        self.arrived: deque[Arrival] = deque()
        self.ended = False  # and Lightning shuts down
        self.ended_by_signal = False
        self._left_to_us: set[int] = set()
        self._lightnings: _Handler = None

    @property
    def unwinds(self) -> bool:
        """Whether what a signal raises in the main thread ends this run, or is ending it."""
        return self.in_main_thread and (self.ended_by_signal or not self.ended)

    def install(self) -> None:
        """Begin to protect the recording."""
        _process.add(self)

    def restore(self, *, run_goes_on: bool = False) -> None:
        """End it; the last one to end leaves the process as the first one found it."""
        _process.remove(self)
        if run_goes_on and self.in_main_thread:  # Lightning gets back what ours replaced
            originals = self.of.trainer._signal_connector._original_handlers
            originals |= {number: signal.getsignal(number) for number in self._left_to_us}
            if self._lightnings is not None:
                signal.signal(signal.SIGTERM, self._lightnings)

    def reinstall(self) -> None:
        """After Lightning put its own SIGTERM handler over ours.

        Its handler waits for the end of the batch and, in ``ddp``, broadcasts from within. What it
        would restore at its end is left to us: others may live by then.
        """
        if self.in_main_thread:
            connector = self.of.trainer._signal_connector
            ours = {*_process.handlers, *_process.caught_in_c()}
            self._left_to_us = ours.intersection(connector._original_handlers)
            for number in self._left_to_us:
                del connector._original_handlers[number]
            self._lightnings = _process.replace_handler_of_lightning(connector)

    @staticmethod
    def renew() -> None:
        """Take again what somebody has set to its default action; called by the watchdogs.

        A Trainer that is not recorded does so at its end, with all signals and in C too.
        """
        _process.renew()

    def received(self) -> list[Arrival]:
        """Ending signals since the last call, also while the main thread is stuck."""
        arrived: list[Arrival] = []
        while self.arrived:
            arrived.append(self.arrived.popleft())
        return arrived

    def beat(self) -> None:
        """The run goes on: of the main thread's, somebody caught what a signal raised."""
        if self.in_main_thread:
            _process.caught_s = awake_s()
            _process.raised = None

    def end(self, *, by_signal: bool) -> None:
        """The run has died, and Lightning is about to shut it down."""
        self.ended, self.ended_by_signal = True, by_signal

    @staticmethod
    def caught_s() -> float:
        """When a run of the main thread was last seen to go on."""
        return _process.caught_s

    @staticmethod
    def others_saving_for_s() -> list[float | None]:
        """``saving_for_s`` of every living recording."""
        return [member.of.saving_for_s() for member in _process.members if not member.ended]

    @staticmethod
    def held() -> contextlib.AbstractContextManager[None]:
        """Signals that arrive within wait until its end; the first of them then takes effect."""
        return _process.held()

    @staticmethod
    def forget_pending() -> None:
        """Drop what arrived while evidence was being saved: the run is ending anyway."""
        _process.forget_pending()


def recorded(trainer: Trainer) -> Recorded | None:
    """The recording of the run that a Trainer is in."""
    member = _process.member_of(trainer)
    return None if member is None else member.of


class _Wakeup:
    """The descriptor to which C writes the number of each signal at once, also while Python waits.

    Whatever is written goes on to the descriptor that was there, such as that of an asyncio loop.
    """

    def __init__(self, arrive: Callable[[int], None]) -> None:
        self._arrive = arrive
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write, False)
        self._installed = False
        self._previous, self._file = -1, _file_of(-1)
        self.thread = threading.Thread(
            target=self._pass_on, daemon=True, name="flight-recorder-signals"
        )
        self.thread.start()

    def install(self) -> None:
        """Have C write to it; for the main thread alone, as ``close``."""
        if not self._installed:
            self._previous = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._file = _file_of(self._previous)
            self._installed = True

    def close(self) -> None:
        """Put the previous descriptor back, unless somebody has replaced ours."""
        if self._installed:
            self._put_back(self._previous if _file_of(self._previous) == self._file else -1)
        os.write(self._write, b"\0")  # the last words that the thread reads

    def leave_in_child(self) -> None:
        """In a forked child, which is not the run, and whose signals are nothing to its parent."""
        if self._installed:
            self._put_back(-1)
        self._close_files()

    def _put_back(self, previous: int) -> None:
        current = signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError, ValueError):  # it was closed a moment ago
            signal.set_wakeup_fd(previous if current == self._write else current)

    def _close_files(self) -> None:
        for descriptor in (self._read, self._write):
            os.close(descriptor)

    def _pass_on(self) -> None:
        while True:
            numbers = os.read(self._read, 64)
            sent = numbers.rstrip(b"\0")
            for number in sent:
                self._arrive(number)
            if sent and self._file is not None and _file_of(self._previous) == self._file:
                with contextlib.suppress(OSError):
                    os.write(self._previous, sent)
            if len(sent) < len(numbers):
                self._close_files()
                return


class _Process:
    """The registry, one for the process."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._busy = False  # the main thread is within ``add`` or ``remove``
        self.members: list[Protection] = []
        self.handlers: dict[int, _Handler] = {}  # Python's, that were there where ours are now
        self._handlers_before: dict[int, _Handler] = {}  # the same of earlier recordings
        self._pythons_address: int | None = None  # of Python's own handler in C
        self._faults_before: dict[int, Action] = {}
        self._faulting: set[int] = set()
        self._wakeup: _Wakeup | None = None
        self._interrupt: Patch | None = None
        self._undo = contextlib.ExitStack()  # what any thread may take back
        self._held = 0
        self._pending: list[int] = []
        self.raised: BaseException | None = None  # by the latest signal; it may still unwind
        self.caught_s = -float("inf")
        self._handled_s: dict[int, float] = {}  # when our handler was called last

    # Recordings come and go.

    def add(self, member: Protection) -> None:
        """A recording begins."""
        with self._changing():
            self.members.append(member)
            try:
                if len(self.members) == 1:
                    self._begin()
                if member.in_main_thread:
                    self.raised = None
                else:
                    self._catch_in_c()
            except BaseException:
                self._remove(member)
                raise

    def remove(self, member: Protection) -> None:
        """A recording ends."""
        with self._changing():
            if member in self.members:
                self._remove(member)

    def _remove(self, member: Protection) -> None:
        self.members.remove(member)
        if not any(other.in_main_thread for other in self.members):
            self.raised = None
        if not self.members:
            self._undo.close()

    @contextmanager
    def _changing(self) -> Generator[None]:
        """Alone; afterwards the main thread brings its own things to what is needed."""
        if not _in_main_thread():
            try:
                with self._lock:
                    yield
            finally:
                run_in_main_thread(self._sync_later)
            return
        with self._lock, self.held():
            outer, self._busy = self._busy, True
            try:
                yield
            finally:
                ended = self._sync()
                self._busy = outer
        if ended is not None:
            ended.join()

    def member_of(self, trainer: Trainer) -> Protection | None:
        """The latest recording of a Trainer, up to the end of Lightning's shutdown."""
        found = [member for member in self.members if member.of.trainer is trainer]
        return found[-1] if found else None

    def _begin(self) -> None:
        """What any thread may do."""
        self._pid = os.getpid()
        self._interrupt = Patch(call, "_interrupt", self._interrupted)
        self._undo.callback(self._interrupt.undo)
        atexit.register(self._at_exit)
        self._undo.callback(atexit.unregister, self._at_exit)
        # Worker processes of multiprocessing leave without atexit.
        finalizer = multiprocessing.util.Finalize(self, self._at_exit, exitpriority=50)
        self._undo.callback(finalizer.cancel)
        self._wakeup = self._wakeup or _Wakeup(self._arrive_early)
        self._undo.callback(self._give_back_in_c)
        for number in FAULTS:
            ours = c_handler(number) == _ADDRESS
            if not ours and signal.getsignal(number) in (signal.SIG_DFL, None):
                self._faults_before[number] = read_action(number)
                set_c_handler(number, _ADDRESS)
        _register_at_fork()

    def renew(self) -> None:
        """Called in any thread but the main one."""
        with self._lock:
            if not self.members:
                return
            for number in self._faults_before:
                if c_handler(number) == 0 and signal.getsignal(number) is signal.SIG_DFL:
                    set_c_handler(number, _ADDRESS)
            if not any(member.in_main_thread for member in self.members):
                self._catch_in_c()
        run_in_main_thread(self._sync_later)

    def caught_in_c(self) -> set[int]:
        """Signals whose handler in C is ours, behind Python's back."""
        return {number for number in (*FAULTS, *ENDING) if c_handler(number) == _ADDRESS}

    def _give_back_in_c(self) -> None:
        for number, action in self._faults_before.items():
            if c_handler(number) == _ADDRESS:
                write_action(number, action)
        for number in ENDING:
            address = c_handler(number)
            by_python = address == self._pythons_address and self.has(number)
            was_default = self.handlers.get(number, signal.SIG_DFL) is signal.SIG_DFL
            if was_default and (address == _ADDRESS or by_python):
                set_c_handler(number, 0)

    def _catch_in_c(self) -> None:
        for number in self._wanted():
            pythons = signal.getsignal(number)
            if c_handler(number) == 0 and (pythons is signal.SIG_DFL or pythons == self._handle):
                set_c_handler(number, _ADDRESS)

    def _wanted(self) -> list[int]:
        kept = set[int]().union(*(member.kept for member in self.members))
        return [number for number in ENDING if number not in kept]

    # What the main thread alone may do.

    def _sync_later(self) -> None:
        """Called between two instructions of whatever the main thread does.

        That may hold any lock, so that nothing here waits for one, or starts a thread. Whoever
        has our lock asks for this again.
        """
        if not self._busy and self._lock.acquire(blocking=False):
            try:
                self._sync()
            finally:
                self._lock.release()

    def _sync(self) -> threading.Thread | None:
        """Bring Python's handlers and the wakeup descriptor to what the living recordings need.

        Returns:
            The thread of the wakeup descriptor where that is no longer needed; it ends by itself.
        """
        unwinds = any(member.in_main_thread for member in self.members)
        for number in list(self.handlers):
            was_default = self.handlers[number] is signal.SIG_DFL
            if not self.members or not (unwinds or was_default):
                self._give_back(number)
        wakeup = self._wakeup
        if self.members:
            for number in self._wanted():
                self._take(number, unwinds=unwinds)
            if wakeup is not None:
                wakeup.install()
        elif wakeup is not None:
            self._wakeup = None
            wakeup.close()
            return wakeup.thread
        return None

    def _take(self, number: int, *, unwinds: bool) -> None:
        """Set our handler where nobody listens.

        A signal that somebody ignores or handles is left alone, but for SIGTERM where the main
        thread runs a fit: Lightning takes that too, and the handler is called first.
        """
        pythons, address = signal.getsignal(number), c_handler(number)
        default = pythons is signal.SIG_DFL and address in (0, _ADDRESS)
        ends_fit = pythons is signal.default_int_handler or (
            number == signal.SIGTERM and callable(pythons) and number not in self.handlers
        )
        if pythons == self._handle:
            if number not in self.handlers:  # somebody had put ours back after its end
                self.handlers[number] = self._handlers_before.get(number, signal.SIG_DFL)
        elif default or (unwinds and ends_fit):
            self.handlers[number] = pythons
        else:
            return
        signal.signal(number, self._handle)
        self._pythons_address = c_handler(number)

    def _give_back(self, number: int) -> None:
        original = self._handlers_before[number] = self.handlers.pop(number)
        if self.has(number) and c_handler(number) in (0, _ADDRESS, self._pythons_address):
            signal.signal(number, original)

    def has(self, number: int) -> bool:
        """Whether Python calls our handler."""
        return signal.getsignal(number) == self._handle

    def replace_handler_of_lightning(self, connector: Any) -> _Handler:
        """Put ours back for SIGTERM; Lightning's may have taken in one that is somebody else's."""
        lightnings: Any = signal.getsignal(signal.SIGTERM)
        composed = getattr(lightnings, "signal_handlers", None)
        if signal.SIGTERM not in self.handlers or composed is None:
            return None
        for handler in composed:
            if callable(handler) and getattr(handler, "__self__", None) not in (connector, self):
                self.handlers[signal.SIGTERM] = handler
        signal.signal(signal.SIGTERM, self._handle)
        return lightnings

    # Signals arrive.

    @contextmanager
    def held(self) -> Generator[None]:
        """In the main thread, where Python calls handlers; elsewhere nothing has to wait."""
        if not _in_main_thread():
            yield
            return
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if not self._held and self._pending:
                number, self._pending = self._pending[0], []
                os.kill(self._pid, number)

    def forget_pending(self) -> None:
        """Those that arrived in the calling thread's ``held``."""
        if _in_main_thread():
            self._pending = []

    def arrive(self, number: int) -> None:
        """Tell every watchdog whose run the signal is to end.

        Called by our handler, and from within C.
        """
        unwinds = any(member.unwinds for member in self.members)
        if unwinds and number not in self.handlers and c_handler(number) != _ADDRESS:
            return
        if not unwinds and not self._ends_process(number):
            return
        arrival = Arrival(number, awake_s(), unwinds)
        for member in list(self.members):
            # Ctrl-C ends what the main thread does; Python lets other threads go on.
            if member.in_main_thread or not arrival.interrupts:
                member.arrived.append(arrival)

    def _arrive_handled(self, number: int) -> None:
        self._handled_s[number] = awake_s()
        self.arrive(number)

    def _arrive_early(self, number: int) -> None:
        """Called by the thread of the wakeup descriptor: the main thread may be stuck in C."""
        if awake_s() - self._handled_s.get(number, -float("inf")) > _HANDLED_S:
            self.arrive(number)

    def _ends_process(self, number: int) -> bool:
        """Whether the default action would have been taken without us."""
        by_python = self.has(number) and self.handlers.get(number) is signal.SIG_DFL
        return by_python or c_handler(number) == _ADDRESS

    def _handle(self, number: int, frame: FrameType | None) -> None:
        mains = [member for member in self.members if member.in_main_thread]
        living = [member for member in mains if not member.ended]
        if self._held:
            self._pending.append(number)
        elif any(member.ended_by_signal for member in mains) or self._unwinds():
            pass  # the first one is still unwinding
        elif living:
            self._arrive_handled(number)
            self._raise(number, frame, living[-1].of.trainer)
        elif any(not member.ended for member in self.members) and self._ends_process(number):
            self._arrive_handled(number)  # the watchdogs save evidence, and end the process
        else:
            self._do_as_before(number, frame)

    def _unwinds(self) -> bool:
        """Whether what the latest signal raised is on its way, through somebody's ``finally``."""
        error = sys.exc_info()[1]
        seen = set[int]()  # a chain that somebody made may have no end
        while error is not None and id(error) not in seen:
            if error is self.raised:
                return True
            seen.add(id(error))
            error = error.__context__
        return False

    def _raise(self, number: int, frame: FrameType | None, trainer: Trainer) -> None:
        try:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            if number != signal.SIGTERM:
                raise SignalExit(number)
            original = self.handlers.get(number)
            if callable(original):
                original(number, frame)
            trainer._signal_connector.received_sigterm = True
            launcher = trainer.strategy.launcher
            if launcher is not None:
                launcher.kill(number)
            error = SIGTERMException()
            error.code = 128 + number  # Lightning leaves None: status 0
            raise error
        except BaseException as raised:
            self.raised = raised
            raise

    def _do_as_before(self, number: int, frame: FrameType | None) -> None:
        """No recording is there for it: ours is in place because somebody put it back."""
        original = self.handlers.get(number, self._handlers_before.get(number, signal.SIG_DFL))
        if callable(original):
            original(number, frame)
        elif original is not signal.SIG_IGN:
            end_by(number)

    def fault(self, number: int) -> None:
        """Last words of a process that dies inside C, in whichever thread failed.

        Stacks, then what each recording can save, then the same death. Not async-signal-safe, and
        no worse than dying at once: the default action is restored first, so that a second fault
        kills, and ``alarm`` ends what hangs. A handler that was there before, such as that of
        ``PYTHONFAULTHANDLER``, has the last word.
        """
        set_c_handler(number, 0)
        again = number in self._faulting  # the handler that was to have the last word gave it back
        self._faulting.add(number)
        try:
            if not again and os.getpid() == self._pid:
                self._save_last_words(number)
        finally:
            if not again and number in self._faults_before:
                write_action(number, self._faults_before[number])
            raise_in_this_thread(number)

    def _save_last_words(self, number: int) -> None:
        name = signal_name(number)
        here = threading.get_ident()
        living = sorted(
            (member for member in self.members if not member.ended),
            key=lambda member: member.thread != here,
        )
        alarm(_LAST_GASP_S)
        for member in living:
            with contextlib.suppress(OSError):
                text = f"Fatal Python error: {signal.strsignal(number)} ({name})"
                dump_stacks(member.of.stacks, text)
        for member in living:
            alarm(_LAST_GASP_S)
            member.of.last_gasp(name)
        alarm(0)

    # Other ends.

    def _interrupted(self, trainer: Trainer, error: BaseException) -> None:
        """In place of Lightning's function that every error of a run comes to.

        Callbacks and loops may have been replaced since ``setup``, and the ``on_exception`` of
        another callback may raise before ours.
        """
        assert self._interrupt is not None
        member = self.member_of(trainer)
        if member is not None and run_depth(trainer) > 1:  # a run within: the outer one may go on
            member = None
        if member is not None:
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            if ignored and signal.SIGINT in self.handlers and _in_main_thread():
                signal.signal(signal.SIGINT, self._handle)  # Lightning might ignore it for good
            member.of.die(error, lingers=True)
        try:
            self._interrupt.original(trainer, error)
        except BaseException:  # Lightning does not shut down what raises now
            _listen_to_interrupts(trainer)
            if member is not None:
                member.of.leave()
            raise

    def _at_exit(self) -> None:
        for member in reversed(list(self.members)):
            member.of.at_exit()

    def leave_in_child(self) -> None:
        """In a forked child, which is not the run: it has the one thread, and Python's handlers."""
        self._lock = threading.RLock()
        self.members, self._held, self._pending, self._busy = [], 0, [], False
        self._undo.close()
        for number in list(self.handlers):
            self._give_back(number)
        if self._wakeup is not None:
            self._wakeup.leave_in_child()
            self._wakeup = None


_process = _Process()


# One for all recordings: C may hold it for ever, and is to hold no run by it.
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_signal(number: int) -> None:
    if number in FAULTS:
        _process.fault(number)
    else:
        _process.arrive(number)


_ADDRESS = ctypes.cast(_on_signal, ctypes.c_void_p).value or 0


@functools.cache
def _register_at_fork() -> None:  # there is no way to take such a function back
    os.register_at_fork(after_in_child=_process.leave_in_child)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _file_of(descriptor: int) -> tuple[int, int] | None:
    """Which file it is: its number may belong to another one by now."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _listen_to_interrupts(trainer: Trainer) -> None:
    """Lightning ignores Ctrl-C while it shuts down, and for good where a callback then raises."""
    original: Any = trainer._signal_connector._original_handlers.get(signal.SIGINT)
    if original is not None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, original)


def _requeue_signals(trainer: Trainer) -> set[int]:
    """Signals that Lightning handles to requeue a SLURM job.

    With several ranks its SIGTERM handler broadcasts from within, wherever the others are: they
    would wait for each other for ever.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return set()
    requeue: int = environment.requeue_signal or signal.SIGUSR1
    return {requeue, signal.SIGTERM} if trainer.world_size == 1 else {requeue}
