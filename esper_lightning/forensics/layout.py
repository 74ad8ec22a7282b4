"""Where everything of a run is: the names in a run directory, in one place."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["RankLayout", "RunLayout"]


@dataclass(frozen=True)
class RankLayout:
    """Files that one rank writes alone."""

    directory: Path

    @property
    def history(self) -> Path:
        """One JSON line for each finished iteration."""
        return self.directory / "history.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON line for each evaluation during training."""
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
        """Which process this rank is, and how it fares (``forensics.rank_record``)."""
        return self.directory / "process.json"

    @property
    def crash(self) -> Path:
        """The report of a death (``forensics.report``)."""
        return self.directory / "crash.json"

    @property
    def crash_checkpoint(self) -> Path:
        """Weights, optimizer, counters and random states at the moment of death."""
        return self.directory / "crash.ckpt"

    @property
    def stacks(self) -> Path:
        """Python stacks of all threads, if a signal, a hang or a native fault called for them."""
        return self.directory / "stacks.txt"

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
        """Folder of what callbacks saved at a death, a folder for each (``recorder.evidence``)."""
        return self.directory / "evidence"


@dataclass(frozen=True)
class RunLayout:
    """A run directory, ``runs/<name>/<version>``."""

    directory: Path

    @property
    def owner(self) -> Path:
        """Lock that the owning process holds, and its name (``forensics.claims``)."""
        return self.directory / "owner.lock"

    @property
    def config(self) -> Path:
        """Everything needed to repeat the run."""
        return self.directory / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of ``last.ckpt`` and ``best.ckpt``."""
        return self.directory / "checkpoints"

    @property
    def best_checkpoint(self) -> Path:
        """The policy with the greatest evaluation return, once there was an evaluation."""
        return self.checkpoints / "best.ckpt"

    @property
    def last_checkpoint(self) -> Path:
        """The state of training at the end of the latest epoch."""
        return self.checkpoints / "last.ckpt"

    def rank(self, rank: int) -> RankLayout:
        """The folder of a global rank."""
        return RankLayout(self.directory / f"rank{rank}")
