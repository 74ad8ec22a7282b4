"""Stages with all their ways to run, of which the fastest that works is used.

Which way a stage takes depends on what has happened in the process. That is its state, which
checkpoints hold: a resumed run would otherwise compile what the run had given up, and round
otherwise.
"""

import hashlib
import logging
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypedDict

import torch
from typing_extensions import override

from esper_lightning.compiling.audits import Audit, Whole
from esper_lightning.compiling.holders import ImpureError
from esper_lightning.compiling.native.loops import NativeFunction, NativeLoop, NativeMap
from esper_lightning.compiling.native.values import UnsupportedError
from esper_lightning.compiling.other_threads import call_unrecorded
from esper_lightning.compiling.reads import Reads
from esper_lightning.compiling.tracing import Tree
from esper_lightning.core.tensor_trees import kind

__all__ = [
    "FirstThatWorks",
    "NativeStage",
    "Stage",
    "StageState",
    "log_reasons_again",
    "log_slower",
    "restore_stages",
    "stages_within",
]

_log = logging.getLogger(__name__)
_REASONS_LOGGED: set[str] = set()
_COUNTS_OF_NATIVE = 4  # whether a stage is given up, and those of its audit
_TRACING = threading.RLock()  # torch traces in one thread at a time


def log_reasons_again() -> None:
    """Allow every reason for a slower way to be logged again, as at the start of a run.

    Each run logs each reason as a warning once.
    """
    _REASONS_LOGGED.clear()


def log_slower(how: str, name: str, error: Exception) -> None:
    """Log why a function takes a slower way: each reason once in a run.

    Args:
        how: Way that does not work.
        name: Name of the function.
        error: Error that says why.
    """
    cause = getattr(error, "inner_exception", error)  # from a compiler's backend
    reason = f"{type(cause).__name__}: {cause}".strip().splitlines()[0][:300]
    if isinstance(error, UnsupportedError | ImpureError):
        reason = str(error)
    level = logging.DEBUG if reason in _REASONS_LOGGED else logging.WARNING
    _REASONS_LOGGED.add(reason)
    _log.log(level, "%s does not work for the %s, which takes a slower way: %s", how, name, reason)
    _log.debug("The whole error:", exc_info=error)


class StageState(TypedDict):
    """How a stage runs, as plain data."""

    slower: bool
    """Whether the stage runs a slower way for good, at least for some arguments."""
    kinds: list[str]
    """Digests of kinds of arguments: those that run eagerly, or those of the first call."""
    counts: list[int]
    """Counters of the stage."""
    values: dict[str, str]
    """Digests of plain values that native code read when it was made, by name."""


class Stage(ABC):
    """A function with all ways to run it.

    Args:
        name: Name of the function, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def look(self) -> None:  # noqa: B027 - most ways to run a function need no look
        """Take a slower way if the function is no longer what the fast one was made of."""

    @abstractmethod
    def state(self) -> StageState:
        """How the stage runs, for a checkpoint."""

    @abstractmethod
    def restore(self, state: StageState) -> None:
        """Run as the stage of a checkpoint did; before the first call."""


def stages_within(*owners: object) -> dict[str, Stage]:
    """The stages among the attributes of objects by name, in their order.

    Args:
        *owners: Objects that hold stages.
    """
    found: dict[str, Stage] = {}
    for stage in _stages(owners):
        number = sum(other.name == stage.name for other in found.values()) + 1
        found[stage.name if number == 1 else f"{stage.name} {number}"] = stage
    return found


def restore_stages(stages: Mapping[str, Stage], states: Mapping[str, StageState]) -> None:
    """Let stages run as those of a checkpoint did.

    Args:
        stages: Stages by name, from ``stages_within``.
        states: States of the stages of the checkpoint, by the same names.
    """
    for name, stage in stages.items():
        if name in states:
            stage.restore(states[name])


def _stages(owners: Sequence[object]) -> Iterator[Stage]:
    for owner in owners:
        yield from (one for one in vars(owner).values() if isinstance(one, Stage))


def _digest(kind_of_args: Hashable) -> str:
    return hashlib.blake2b(repr(kind_of_args).encode(), digest_size=8).hexdigest()


class NativeStage(Stage):
    """A function as native code, a program for each kind of arguments.

    So the results for some arguments never depend on what was called before. Where there can be no
    program, the function runs eagerly; for good once something has changed that a program read of
    a user's objects, or once results differ from those of the function.

    Args:
        name: Name of the function, for messages.
        program: Function that makes a native function, which compiles at its first call.
        eager: The function itself.
        sample: Part of a call that is compared now and then.
    """

    def __init__(
        self,
        name: str,
        program: Callable[[], NativeFunction | NativeMap | NativeLoop],
        eager: Callable[..., Tree],
        sample: Whole,
    ) -> None:
        super().__init__(name)
        self._program, self._eager = program, eager
        self._audit = Audit(sample)
        self._run: dict[Hashable, Callable[..., Tree]] = {}
        self._reads: list[Reads] = []
        self._is_native = True
        self._eager_kinds: set[str] = set()
        self._former: dict[str, str] = {}  # values that programs of a checkpoint had read

    def __call__(self, *args: Tree) -> Tree:
        """Run the function the fastest way that works."""
        if self._is_native and (changed := self._changed()) is not None:
            self._give_up(ImpureError(f"an attribute that changed: {changed}"))
        if not self._is_native or any(isinstance(arg, list) for arg in args):
            return self._eager(*args)  # lists are minibatches of unequal size
        kind_of_args = kind(args)
        run = self._run.get(kind_of_args)
        if run is None:
            run = self._run[kind_of_args] = self._made(_digest(kind_of_args), args)
        try:
            return self._call(run, args)
        except ImpureError as error:
            self._give_up(error)
            return self._eager(*args)

    def _made(self, digest: str, args: tuple[Tree, ...]) -> Callable[..., Tree]:
        """A program for arguments, or the function itself where there can be none."""
        if digest in self._eager_kinds:
            return self._eager
        program = self._program()
        try:
            call_unrecorded(_TRACING, lambda: program.prepare(*args))
            self._audit.rehearse(self._eager, args)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # of the function, of torch's tracer, or of the compiler
            self._eager_kinds.add(digest)
            log_slower("Native code", self.name, error)
            return self._eager
        self._reads += program.reads
        for name, value in self._values().items():
            if self._former.get(name, value) != value:
                self._give_up(ImpureError(f"an attribute that changed: {name}"))
                return self._eager
        return program

    def _values(self) -> dict[str, str]:
        """Digests of the plain values that all programs read."""
        return {name: value for reads in self._reads for name, value in reads.values.items()}

    def _call(self, run: Callable[..., Tree], args: tuple[Tree, ...]) -> Tree:
        """Call a program; ``ImpureError`` if it no longer does what the function does."""
        if run is self._eager or not self._audit.is_due():
            return run(*args)
        result, differs = self._audit.call(run, self._eager, args)
        if differs is not None:
            raise ImpureError(differs)
        return result

    def _give_up(self, reason: ImpureError) -> None:
        """Run the function eagerly for good."""
        self._is_native = False
        log_slower("Native code", self.name, reason)

    def _changed(self) -> str | None:
        """Name of something that a program read and that has changed since."""
        return next((name for reads in self._reads if (name := reads.changed())), None)

    @override
    def look(self) -> None:
        """Give native code up if it is no longer what the function does, after the latest call."""
        if self._is_native and (changed := self._audit.changed()) is not None:
            self._give_up(ImpureError(changed))

    @override
    def state(self) -> StageState:
        """How the stage runs; eagerly also where its next call would find that so it must."""
        eager = not self._is_native or self._changed() is not None
        return {
            "slower": eager or len(self._eager_kinds) > 0,
            "kinds": sorted(self._eager_kinds),
            "counts": [int(eager), *self._audit.counts()],
            "values": {} if eager else {**self._former, **self._values()},
        }

    @override
    def restore(self, state: StageState) -> None:
        """Run as the stage of a checkpoint did; before the first call."""
        if len(state["counts"]) == _COUNTS_OF_NATIVE:
            eager, *counts = state["counts"]
            self._is_native, self._eager_kinds = not eager, {*state["kinds"]}
            self._audit.restore(counts)
            self._former = dict(state["values"])


class FirstThatWorks(Stage):
    """Ways to run the same function, of which the fastest that works is used.

    Compiled ways serve only the shapes of the first call. Calls with other shapes, such as a
    shorter last rollout, are not worth a compilation and run eagerly.

    Args:
        name: Name of the function, for messages.
        how: What the fastest way is, for messages.
        ways: Ways to run the function, from the fastest to the eager one.
    """

    def __init__(self, name: str, how: str, ways: Sequence[Callable[..., Tree]]) -> None:
        super().__init__(name)
        self._how, self._ways, self._number = how, list(ways), len(ways)
        self._kind: Hashable = None
        self._digest: str | None = None  # of that kind, which may be known from a checkpoint

    def __call__(self, *args: Tree) -> Tree:
        """Run the function the fastest way that works."""
        if len(self._ways) == 1:
            return self._ways[0](*args)
        if any(isinstance(arg, list) for arg in args):  # minibatches of unequal size
            return self._ways[-1](*args)
        kind_of_args = kind(args)
        if kind_of_args == self._kind:
            return self._ways[0](*args)
        if self._kind is not None or self._digest not in (None, _digest(kind_of_args)):
            _log.debug("The %s has other shapes than at first and runs eagerly.", self.name)
            return self._ways[-1](*args)
        self._kind, self._digest = kind_of_args, _digest(kind_of_args)
        while len(self._ways) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", module="torch")  # from compilers
                    return self._ways[0](*args)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # compilers raise errors of every kind
                del self._ways[0]
                log_slower(self._how, self.name, error)
        return self._ways[0](*args)

    @override
    def state(self) -> StageState:
        """How the stage runs: which shapes came first, and how many ways are left of how many."""
        left, kinds = len(self._ways), [] if self._digest is None else [self._digest]
        counts = [left, self._number]
        return {"slower": left < self._number, "kinds": kinds, "counts": counts, "values": {}}

    @override
    def restore(self, state: StageState) -> None:
        """Run as the stage of a checkpoint did; before the first call, and in the same mode."""
        left, *number = state["counts"]
        if number == [self._number] and 0 < left <= self._number:
            del self._ways[: self._number - left]
            self._digest = next(iter(state["kinds"]), None)
