"""``crash.json``: what one rank tells of its end.

The recorder fills it (``recorder.death``, ``recorder.rescue``), the second process completes it or
writes it for a process that vanished (``forensics.sidecar``), and everything that shows a death
reads it. A new field is a line and a sentence here, and a line where its value is known.
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
        non_finite: Where the value was that is not finite, if that was the error.
    """

    type: str | None = None
    message: str | None = None
    traceback: tuple[str, ...] = ()
    non_finite: NonFiniteReport | None = None


@dataclass(frozen=True, kw_only=True)
class PeerReport(Record):
    """Another rank that failed before this one.

    Attributes:
        rank: Global rank of the peer; -1 where it is not known which.
        reason: What is known of its failure, in a few words.
    """

    rank: int | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProfilerReport(Record):
    """The profiler of a run.

    Attributes:
        class_name: Name of the profiler's class, under the key ``class``.
        action: What its schedule had it do at the death: ``RECORD``, ``WARMUP`` or ``NONE``.
        dirpath: Absolute folder in which it writes; ``None`` where the user named none.
    """

    class_name: str | None = field(default=None, metadata=stored_as("class"))
    action: str | None = None
    dirpath: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence(Record):
    """What became of one piece of evidence.

    Attributes:
        state: ``saved``, ``absent`` where there was nothing to save, ``pending`` while it is being
            saved, or ``failed``.
        path: The file, relative to the rank's folder or absolute where it is elsewhere.
        detail: What is in the file, or why there is none.
    """

    state: str | None = None
    path: str | None = None
    detail: str | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryReport(Record):
    """Memory of the process shortly before its end.

    Attributes:
        rss_bytes: Memory of the process.
        peak_bytes: The most memory that the process had so far.
        limit_bytes: The tightest limit, that of a cgroup or the memory of the machine.
        available_bytes: Memory left below that limit, caches that can be dropped included.
    """

    rss_bytes: int | None = None
    peak_bytes: int | None = None
    limit_bytes: int | None = None
    available_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CgroupCounters(Record):
    """The kernel's counters of what its OOM killer did, by their names.

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
        cause: What ended the run: ``exception``, ``signal``, ``native`` (a fault in C),
            ``vanished`` (the process wrote nothing), ``peer`` (another rank failed), ``hang`` (the
            run went on), or ``exit`` of the interpreter.
        time_s: When the process died, or was last seen alive if it vanished, in seconds since the
            epoch.
        error: The error, if there is one to tell.
        signal: Name of the signal that ended the run, such as ``SIGTERM``.
        exit_status: Status with which the process ends unless somebody catches the error.
        peer: The rank whose failure ended this one.
        stage: What Lightning's Trainer was doing: ``fit``, ``validate``, ``test`` or ``predict``.
        iteration: Number of the iteration that was going on, from 1.
        global_step: Optimizer steps as Lightning counts them.
        epoch: Number of the epoch that was going on, from 0.
        env_steps: Environment steps of the module so far, over all environments, where it counts
            them.
        gradient_steps: Gradient steps of the module so far, where it counts them.
        phases: Names of the phases that were open, the outermost first.
        metrics: Latest values of the metrics that were known without computing anything; a number
            that is not finite is spelled as text.
        profiler: The profiler, if the run had one.
        evidence: What became of each piece of evidence, by its name: ``history``, ``trace``, and
            so on.
        memory: Memory of the process, if it could be measured.
        cgroup: Counters of the kernel's OOM killer, where a second process read them.
        duration_s: How long saving the evidence took, in seconds.
        complete: Whether nothing more will be added to the report.
        module_class: Name of the class of the LightningModule. (``module`` in versions up to 0.1.)
        versions: Versions of ``python``, ``torch`` and ``lightning``.
        failed_fields: Why the value of a field could not be found, by the name of the field.
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
        """What ended the run, in a few words; empty where the report does not say."""
        error, peer = self.error or ErrorReport(), self.peer
        if self.cause == "peer" and peer is not None and peer.reason:
            return f"rank {peer.rank}: {peer.reason}"
        if error.type:
            return f"{error.type}: {error.message or ''}".rstrip(": ")
        return error.message or self.signal or self.cause or ""
