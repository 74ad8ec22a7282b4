"""The names of all files in a run directory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["OF_A_RUN", "OF_CALLBACKS", "RankLayout", "RunLayout"]

OF_CALLBACKS = (
    "rank[0-9]*",
    "trackers.json",
    "crash.zip",
    "copies.jsonl",
    "replay.json",
    "videos/[0-9]*.mp4",
    *(f"checkpoints/{name}.ckpt" for name in ("last", "best", "state", "before")),
)
"""Patterns of the names that callbacks and loggers write into a run directory, wherever it is.

``owner.lock`` is not among them: ``forensics.claims`` looks into the file. A logger that writes
files has names of its own, which ``callbacks.logger_folders`` knows.
"""

OF_A_RUN = (
    *OF_CALLBACKS,
    "checkpoints",
    "config.yaml",
    "hparams.yaml",
    "metrics.csv",
    "events.out.tfevents.*",
)
"""Patterns of all names that a whole run writes into its directory, with those of its loggers."""


@dataclass(frozen=True)
class RankLayout:
    """Paths of the files that one rank writes alone.

    Attributes:
        place: Folder of the rank, or a function that returns the folder.
    """

    place: Path | Callable[[], Path]

    @property
    def directory(self) -> Path:
        """Folder of the rank."""
        return self.place if isinstance(self.place, Path) else self.place()

    @property
    def history(self) -> Path:
        """History: one JSON line for each finished iteration."""
        return self.directory / "history.jsonl"

    @property
    def evaluations(self) -> Path:
        """Evaluations: one JSON line for each evaluation during training."""
        return self.directory / "evaluations.jsonl"

    @property
    def trace(self) -> Path:
        """Folder of Chrome traces."""
        return self.directory / "trace"

    @property
    def profile(self) -> Path:
        """Tables of the profiler."""
        return self.directory / "profile.txt"

    @property
    def phases(self) -> Path:
        """Memory-mapped ring of the latest spans (``forensics.phases``)."""
        return self.directory / "phases.ring"

    @property
    def process(self) -> Path:
        """Identity and state of the rank's process (``forensics.rank_record``)."""
        return self.directory / "process.json"

    @property
    def crash(self) -> Path:
        """The report of a death (``forensics.report``)."""
        return self.directory / "crash.json"

    @property
    def attempts(self) -> Path:
        """Earlier attempts of the run: one JSON line for each (``forensics.attempts``)."""
        return self.directory / "attempts.jsonl"

    @property
    def crash_checkpoint(self) -> Path:
        """Checkpoint of the moment of death: weights, optimizer, counters and random states."""
        return self.directory / "crash.ckpt"

    @property
    def states(self) -> tuple[Path, Path]:
        """States after the latest iterations, written in turn (``recorder.state_keeper``)."""
        return self.directory / "state.0.ckpt", self.directory / "state.1.ckpt"

    @property
    def stacks(self) -> Path:
        """Python stacks of all threads, written at a signal, a hang or a native fault."""
        return self.directory / "stacks.txt"

    @property
    def collectives(self) -> Path:
        """The latest collectives of the rank (``forensics.collectives``)."""
        return self.directory / "collectives.json"

    @property
    def memory(self) -> Path:
        """Snapshot of the CUDA allocator, if memory ran out."""
        return self.directory / "memory.pickle"

    @property
    def bad_minibatch(self) -> Path:
        """The minibatch on which a loss or gradient was not finite, for replay."""
        return self.directory / "nan.pt"

    @property
    def evidence(self) -> Path:
        """Folder of the evidence of callbacks, a folder for each (``recorder.evidence``)."""
        return self.directory / "evidence"


@dataclass(frozen=True)
class RunLayout:
    """Paths of the files in a run directory, ``runs/<name>/<version>``.

    Attributes:
        place: The run directory, or a function that returns the directory (``forensics.place``).
    """

    place: Path | Callable[[], Path]

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.place if isinstance(self.place, Path) else self.place()

    @property
    def owner(self) -> Path:
        """Lock that the owning process holds, with its identity (``forensics.claims``)."""
        return self.directory / "owner.lock"

    @property
    def config(self) -> Path:
        """Config with everything that is needed to repeat the run."""
        return self.directory / "config.yaml"

    @property
    def trackers(self) -> Path:
        """Identifiers of the run at W&B and MLflow (``callbacks.tracking``)."""
        return self.directory / "trackers.json"

    @property
    def copies(self) -> Path:
        """Processes that have copied the directory (``callbacks.address_claims``)."""
        return self.directory / "copies.jsonl"

    @property
    def crash_bundle(self) -> Path:
        """The evidence of the latest death as one file (``forensics.bundle``)."""
        return self.directory / "crash.zip"

    @property
    def checkpoints(self) -> Path:
        """Folder of ``last.ckpt`` and ``best.ckpt``."""
        return self.directory / "checkpoints"

    @property
    def best_checkpoint(self) -> Path:
        """Checkpoint of the policy with the greatest evaluation return, if there is one yet."""
        return self.checkpoints / "best.ckpt"

    @property
    def last_checkpoint(self) -> Path:
        """Checkpoint of the state of training at the end of the latest epoch."""
        return self.checkpoints / "last.ckpt"

    @property
    def joined_state(self) -> Path:
        """Checkpoint of the stored states of all ranks, from which a killed run was resumed."""
        return self.checkpoints / "state.ckpt"

    @property
    def before_fault(self) -> Path:
        """Checkpoint of a replay: the state before the iteration that failed."""
        return self.checkpoints / "before.ckpt"

    @property
    def replay(self) -> Path:
        """What a replay repeats (``forensics.replay``); only in the directory of a replay."""
        return self.directory / "replay.json"

    def rank(self, rank: int) -> RankLayout:
        """Paths of the files of a global rank."""
        folder = f"rank{rank}"
        if isinstance(self.place, Path):
            return RankLayout(self.place / folder)
        return RankLayout(lambda: self.directory / folder)
