"""The checkpoint of the first rank, for ranks on hosts that do not have the file.

Only the first rank writes checkpoints. Hosts without a shared disk would have to copy them.
"""

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Trainer

from esper_lightning.callbacks.checkpoint_internals import checkpoint_connector
from esper_lightning.core.ranks import Ranks
from esper_lightning.recorder.patch import Patch

__all__ = ["SharedCheckpoint"]

_log = logging.getLogger(__name__)
_PIECE_BYTES = 1 << 26


class SharedCheckpoint:
    """Sends the first rank's checkpoint to the ranks that have found none.

    A rank that has received the checkpoint has it in a temporary file until it is loaded. Another
    checkpoint at the same place would be mistaken for the latest one by a later attempt.

    Args:
        trainer: Trainer of the run that begins.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def share(self, ranks: Ranks, path: str | Path | None) -> str | Path | None:
        """The checkpoint that this rank will load.

        This is a collective. If only ranks other than the first have a checkpoint, each rank gets
        its own path back.

        Args:
            ranks: All ranks of the run.
            path: Checkpoint that this rank has found; ``None`` if it has found none.

        Returns:
            ``path``, or a temporary file with the content of the first rank's checkpoint.
        """
        found = ranks.gather_objects(path is not None and "://" not in str(path))
        if not found[0] or all(found):
            return path
        rank = self._trainer.global_rank
        if rank == 0:
            _send(ranks, Path(str(path)))
        elif found[rank]:
            _receive(ranks, Path(os.devnull))
        else:
            folder = TemporaryDirectory()
            received = Path(folder.name) / "first.ckpt"
            _receive(ranks, received)
            self._load(received, folder)
            return received
        return path

    def _load(self, received: Path, folder: "TemporaryDirectory[str]") -> None:
        """Have Lightning load a file, once, in place of none."""

        def resume(_: object, *more: Any, **settings: Any) -> None:
            patch.undo()
            with folder:
                patch.original(received, *more, **settings)

        patch = Patch(checkpoint_connector(self._trainer), "resume_start", resume)
        _log.info("Rank %d resumes from the first rank's checkpoint.", self._trainer.global_rank)


def _send(ranks: Ranks, path: Path) -> None:
    """Send a file in pieces. After an error the others have a torn file, which they refuse."""
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                ranks.send_from_first(piece)
    finally:
        ranks.send_from_first(b"")


def _receive(ranks: Ranks, path: Path) -> None:
    with path.open("wb") as file:
        while piece := ranks.send_from_first(None):
            file.write(piece)
