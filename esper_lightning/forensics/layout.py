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


@dataclass(frozen=True)
class RunLayout:
    """A run directory, ``runs/<name>/<version>``."""

    directory: Path

    @property
    def config(self) -> Path:
        """Everything needed to repeat the run."""
        return self.directory / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of ``last.ckpt`` and ``best.ckpt``."""
        return self.directory / "checkpoints"

    def rank(self, rank: int) -> RankLayout:
        """The folder of a global rank."""
        return RankLayout(self.directory / f"rank{rank}")
