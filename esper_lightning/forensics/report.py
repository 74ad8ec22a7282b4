"""``crash.json``: the report of one rank's death.

The recorder fills the report (``recorder.death``, ``recorder.rescue``), the second process
(``forensics.sidecar``) completes it, or writes it for a process that vanished, and all code that
shows a death reads it. A new field is a line and a sentence here, and a line where its value is
known.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from esper_lightning.forensics.rank_record import RankRecord
from esper_lightning.forensics.records import EpochSeconds, Record, earlier_key, stored_as

__all__ = [
    "CgroupCounters",
    "CrashReport",
    "ErrorReport",
    "Evidence",
    "MemoryReport",
    "NonFiniteReport",
    "PeerReport",
    "ProfilerReport",
]


@dataclass(frozen=True, kw_only=True)
class NonFiniteReport(Record):
    """Where a value was NaN or infinite.

    Attributes:
        phase: Stage of the iteration: ``rollout``, ``update``, or ``training_step``.
        tensors: Names of the tensors in which there was such a value.
        environments: Indices of the environments concerned, as far as they are known.
    """

    phase: str | None = None
    tensors: tuple[str, ...] = ()
    environments: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ErrorReport(Record):
    """The error of which a run died.

    Attributes:
        type: Name of the error's class; ``None`` where no Python error was raised.
        message: Text of the error, or what is known of the end of a process that vanished.
        traceback: Lines of the traceback as Python prints it, the innermost frames last.
        non_finite: Place of the value that is not finite, if that was the error.
    """

    type: str | None = None
    message: str | None = None
    traceback: tuple[str, ...] = ()
    non_finite: NonFiniteReport | None = None


@dataclass(frozen=True, kw_only=True)
class PeerReport(Record):
    """Another rank that failed before this one.

    Attributes:
        rank: Global rank of the peer; -1 where the rank is not known.
        reason: Reason of the peer's failure as far as it is known, in a few words.
    """

    rank: int | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProfilerReport(Record):
    """The profiler of a run.

    Attributes:
        class_name: Name of the profiler's class, under the key ``class``.
        action: Action of its schedule at the death: ``RECORD``, ``WARMUP`` or ``NONE``.
        dirpath: Absolute folder into which the profiler writes; ``None`` where the user named none.
    """

    class_name: str | None = field(default=None, metadata=stored_as("class"))
    action: str | None = None
    dirpath: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence(Record):
    """The outcome of saving one piece of evidence.

    Attributes:
        state: ``saved``, ``absent`` where there was nothing to save, ``pending`` while saving is
            under way, or ``failed``.
        path: Path of the file or folder, relative to the rank's folder, or absolute if it is
            elsewhere. A failed callback has a path if its folder holds files.
        detail: Content of the file, or the reason why there is none.
    """

    state: str | None = None
    path: str | None = None
    detail: str | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryReport(Record):
    """Memory of the process shortly before its end.

    Attributes:
        rss_bytes: Resident memory of the process.
        peak_bytes: Greatest resident memory of the process so far.
        limit_bytes: Lowest limit, that of a cgroup or the memory of the machine.
        available_bytes: Memory left below that limit, caches that can be dropped included.
    """

    rss_bytes: int | None = None
    peak_bytes: int | None = None
    limit_bytes: int | None = None
    available_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CgroupCounters(Record):
    """Counters of the kernel's OOM killer, by their names.

    Attributes:
        before: Counters when the run began.
        after: Counters when the process was gone.
    """

    before: Mapping[str, int] = field(default_factory=dict[str, int])
    after: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, kw_only=True)
class CrashReport(RankRecord):
    """``crash.json``, with the fields of its base classes.

    Attributes:
        cause: Cause of the death: ``exception``, ``signal``, ``native`` (a fault in C),
            ``vanished`` (the process wrote nothing), ``peer`` (another rank failed), ``hang`` (the
            run continued), or ``exit`` of the interpreter.
        time_s: Time at which the process died, or was last seen alive if it vanished, in seconds
            since the epoch.
        error: Error of which the run died; ``None`` without one.
        signal: Name of the signal that ended the run, such as ``SIGTERM``.
        exit_status: Status with which the process ends unless the error is caught.
        peer: Rank whose failure ended this rank.
        stage: Stage of Lightning's Trainer: ``fit``, ``validate``, ``test`` or ``predict``.
        iteration: Number of the iteration that was under way, from 1.
        global_step: Number of optimizer steps as Lightning counts them.
        epoch: Number of the epoch that was under way, from 0.
        env_steps: Number of environment steps so far, over all environments, if the module counts
            them.
        gradient_steps: Number of gradient steps so far, if the module counts them.
        phases: Names of the phases that were open, the outermost first.
        metrics: Latest values of the metrics that were known without any computation; a number
            that is not finite is spelled as text.
        profiler: Profiler of the run; ``None`` without one.
        evidence: Outcome for each piece of evidence, by its name: ``history``, ``trace``, and so
            on.
        memory: Memory of the process, if it could be measured.
        cgroup: Counters of the kernel's OOM killer, where a second process read them.
        duration_s: Time that saving the evidence took, in seconds.
        complete: Whether nothing more will be added to the report.
        module_class: Name of the class of the LightningModule. (``module`` in versions up to 0.1.)
        versions: Versions of ``python``, ``torch`` and ``lightning``.
        failed_fields: Reason why the value of a field could not be read, by the field's name.
            (``untold`` in versions up to 0.1.)
        written_by: ``sidecar`` where the second process wrote the report, for a process that
            vanished.
    """

    EXPENDABLE: ClassVar[tuple[str, ...]] = (
        *("versions", "metrics", "cgroup", "memory", "evidence", "phases", "profiler"),
        *("event_files", "error.non_finite", "error.traceback"),
    )

    cause: str | None = None
    time_s: EpochSeconds | None = None
    error: ErrorReport | None = None
    signal: str | None = None
    exit_status: int | None = None
    peer: PeerReport | None = None
    stage: str | None = None
    iteration: int | None = None
    global_step: int | None = None
    epoch: int | None = None
    env_steps: int | None = None
    gradient_steps: int | None = None
    phases: tuple[str, ...] = ()
    metrics: Mapping[str, int | float | str] = field(default_factory=dict[str, "int | float | str"])
    profiler: ProfilerReport | None = None
    evidence: Mapping[str, Evidence] = field(default_factory=dict[str, Evidence])
    memory: MemoryReport | None = None
    cgroup: CgroupCounters | None = None
    duration_s: float | None = None
    complete: bool = False
    module_class: str | None = field(default=None, metadata=earlier_key("module"))
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    failed_fields: Mapping[str, str] = field(
        default_factory=dict[str, str], metadata=earlier_key("untold")
    )
    written_by: str | None = None

    @property
    def what_happened(self) -> str:
        """Cause of the death, in a few words; empty where the report has none."""
        error, peer = self.error or ErrorReport(), self.peer
        if self.cause == "peer" and peer is not None and peer.reason:
            return f"rank {peer.rank}: {peer.reason}"
        if error.type:
            return f"{error.type}: {error.message or ''}".rstrip(": ")
        return error.message or self.signal or self.cause or ""
