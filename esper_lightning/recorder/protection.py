"""The protection of one recording against signals and faults, by ``recorder.registry``."""

import contextlib
import signal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from esper_lightning.callbacks.lightning_internals import handlers_to_restore
from esper_lightning.recorder.member import Member, Recorded
from esper_lightning.recorder.registry import registry
from esper_lightning.recorder.signal_handlers import Handler
from esper_lightning.recorder.watchdog import Arrival

__all__ = ["Protection", "recorded"]


class Protection:
    """Signals, faults and errors of the process, for one recording.

    Args:
        of: Recording to protect, made in the thread that runs the fit.
    """

    def __init__(self, of: Recorded) -> None:
        self._member = Member(of)
        self._left_to_us: set[int] = set()
        self._lightnings: Handler = None

    @property
    def in_main_thread(self) -> bool:
        """Whether the fit runs in the main thread."""
        return self._member.in_main_thread

    def install(self) -> None:
        """Begin to protect the recording."""
        registry.add(self._member)

    def restore(self, *, run_continues: bool = False) -> None:
        """End the protection; the last to end restores the process as it was before the first.

        Args:
            run_continues: Whether the run continues without its recorder: Lightning's handlers that
                ours replaced are restored then.
        """
        registry.remove(self._member)
        if run_continues and self.in_main_thread:
            originals = handlers_to_restore(self._member.of.trainer)
            originals |= {number: signal.getsignal(number) for number in self._left_to_us}
            if self._lightnings is not None:
                signal.signal(signal.SIGTERM, self._lightnings)

    def reinstall(self) -> None:
        """Set our SIGTERM handler over the handler that Lightning has set over ours.

        Lightning's handler waits for the end of the batch and, in ``ddp``, calls a collective. The
        handlers that Lightning would restore at its end are restored by the recorder instead: other
        recordings may live by then.
        """
        if self.in_main_thread:
            trainer = self._member.of.trainer
            if signal.SIGTERM not in self._member.left_to_lightning:
                self._lightnings = registry.handlers.replace_handler_of_lightning(trainer)
            originals = handlers_to_restore(trainer)
            self._left_to_us = registry.handlers.all_ours().intersection(originals)
            for number in self._left_to_us:
                del originals[number]

    @staticmethod
    def renew() -> None:
        """Set our handlers again where the default action was set; the watchdogs call this.

        A Trainer without a recorder sets all signals to the default action at its end, in C too.
        """
        registry.renew()

    def received(self) -> list[Arrival]:
        """Signals since the last call that end the run, also while the main thread is stuck."""
        waiting = self._member.arrived
        arrived: list[Arrival] = []
        while waiting:
            arrived.append(waiting.popleft())
        return arrived

    def beat(self) -> None:
        """Note that the run continues: in the main thread, no exception is unwinding any more."""
        if self.in_main_thread:
            registry.arrivals.run_continues()

    def set_status(self, error: BaseException) -> None:
        """Let the end by SIGTERM be the process's exit status, where Lightning leaves status 0.

        Lightning raises the error at the end of a batch in which SIGTERM came. What ends so that a
        SLURM job is requeued stays as it is.
        """
        ours = signal.SIGTERM not in self._member.left_to_lightning
        if ours and isinstance(error, SIGTERMException) and error.code is None:
            error.code = 128 + signal.SIGTERM

    def end(self, *, by_signal: bool) -> None:
        """Note that the run has died, and Lightning is about to shut it down."""
        self._member.ended, self._member.ended_by_signal = True, by_signal

    @staticmethod
    def caught_s() -> float:
        """Time (``awake_s``) at which a run of the main thread was last seen to continue."""
        return registry.arrivals.caught_s

    @staticmethod
    def others_saving_for_s() -> list[float | None]:
        """``saving_for_s`` of every living recording."""
        return [member.of.saving_for_s() for member in registry.members if not member.ended]

    @staticmethod
    def held() -> contextlib.AbstractContextManager[None]:
        """Hold signals back until the end of the block; the first signal then takes effect."""
        return registry.arrivals.held()

    @staticmethod
    def forget_pending() -> None:
        """Drop the signals that arrived while evidence was saved: the run is ending anyway."""
        registry.arrivals.forget_pending()


def recorded(trainer: Trainer) -> Recorded | None:
    """The recording of a Trainer's current run; ``None`` without one."""
    member = registry.member_of(trainer)
    return None if member is None else member.of
