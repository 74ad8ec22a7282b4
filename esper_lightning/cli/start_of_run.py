"""What a run starts from: the checkpoint that ``--ckpt_path`` names, or a stored state."""

from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from esper_lightning.callbacks.lightning_internals import parse_checkpoint_path
from esper_lightning.core.paths import expand_home
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.training.checkpoint.content import STATE_KEY
from esper_lightning.training.checkpoint.files import write_checkpoint
from esper_lightning.training.checkpoint.kept import latest_state
from esper_lightning.training.checkpoint.states import load_checkpoint

__all__ = ["Start", "find_start"]


class Start(NamedTuple):
    """What a run starts from."""

    path: str | None
    """Path of the checkpoint; ``None`` for a new run."""
    checkpoint: dict[str, Any] | None
    """Its content."""
    is_file: bool
    """Whether the file exists; otherwise ``write`` makes it once the run owns its directory."""
    said: str
    """What the user should know, in one line; may be empty."""

    def write(self) -> None:
        """Write the stored states that the run resumes from as a checkpoint of the run.

        Raises:
            OSError: If the disk takes no more.
        """
        assert self.path is not None
        assert self.checkpoint is not None
        path = Path(self.path)
        path.parent.mkdir(exist_ok=True)
        write_checkpoint(self.checkpoint, path)


def find_start(trainer: Trainer, name: str | None, run_dir: str | Path | None) -> Start:
    """The checkpoint that a name or path stands for.

    ``last`` is the latest of ``last.ckpt`` and the states that the ranks of a killed run have
    stored in the run directory.

    Args:
        trainer: Trainer of the run.
        name: Value of ``--ckpt_path``.
        run_dir: Value of ``--run_dir``, or the directory that stands for it.

    Raises:
        ValueError: If the file is no whole checkpoint of PPO.
    """
    path, said = name, ""
    if name in ("last", "best", "hpc"):  # a file, by the name that Lightning gives it
        path = parse_checkpoint_path(trainer, name)
    checkpoint = None if path is None else load_checkpoint(path)
    if name == "last" and run_dir is not None and "://" not in str(run_dir):
        run_dir = expand_home(run_dir)  # it may come from a config
        kept, done = latest_state(run_dir), 0
        if checkpoint is not None:
            done = checkpoint[STATE_KEY]["iteration"]
        if kept is not None and kept.iteration > done:
            said = f"Resuming after iteration {kept.iteration}, the last one finished."
            path = str(RunLayout(run_dir.absolute()).joined_state)
            return Start(path, kept.checkpoint, is_file=False, said=said)
    if path is None and name is not None:
        said = "No checkpoint to resume from (--ckpt_path last): a new run begins."
    return Start(path, checkpoint, is_file=True, said=said)
