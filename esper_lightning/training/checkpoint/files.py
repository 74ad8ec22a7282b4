"""How checkpoints get to the disk and back: whole, or not at all.

It reads tensors and plain data, never code; and says what is wrong with a file that it refuses.
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from typing_extensions import override

from esper_lightning.core.errors import require
from esper_lightning.forensics.files import replacing
from esper_lightning.forensics.reading import open_file

__all__ = ["CHECKPOINT_BEGINS", "AtomicCheckpointIO", "read_checkpoint"]

_ZIP_MAGIC = b"PK\x03\x04"
CHECKPOINT_BEGINS = _ZIP_MAGIC + rb".{26}[^/]+/data\.pkl"
"""A regular expression: an archive whose first part is what ``torch.save`` pickled."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that a crash cannot tear: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    A file is written beside its place, flushed to the disk, and renamed: until then the previous
    one stays. (Lightning's own goes through the system's temporary directory, which is often
    another file system, so that what it calls a move is a copy; and it does not flush.) Files are
    read by ``read_checkpoint``, without running code from them unless ``weights_only=False`` is
    asked for. Remote paths (``s3://...``) are left to Lightning.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Put a checkpoint in place.

        What a killed save of the same file left beside it is removed.

        Raises:
            OSError: If the disk takes no more; the previous file is still there.
        """
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        with replacing(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's writer stumbles over the error of the disk
                if not isinstance(error.__context__, OSError):
                    raise
                cause = error.__context__
                raise OSError(cause.errno, cause.strerror, str(path)) from error

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: If it is not whole, or holds more than tensors and plain data.
        """
        if weights_only is False or _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, map_location=map_location)


def read_checkpoint(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a file of tensors and plain data that ``torch.save`` wrote.

    Checksums are compared first: ``torch.load`` does not, and a bit that flipped on the disk would
    be a weight like any other.

    Raises:
        ValueError: Naming the file and what is wrong with it.
    """
    path = Path(path)
    try:
        flaw = _flaw(path)
    except FileNotFoundError as error:
        message = f"ckpt_path must name an existing checkpoint, got {str(path)!r}."
        raise ValueError(message) from error
    require(flaw is None, "ckpt_path", "name a whole checkpoint", str(path), flaw or "")
    refused = _refused_classes(path)
    hint = f"It holds objects of {', '.join(refused)}, and reading those could run code."
    require(not refused, "ckpt_path", "hold only tensors and plain data", str(path), hint)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # the unpickler raises whatever damaged bytes make of it
        message = f"ckpt_path must name a whole checkpoint, got {str(path)!r}."
        raise ValueError(f"{message} It cannot be read: {_first_line(error)}") from error
    rule, hint = "hold a checkpoint", f"It holds a {type(content).__name__}."
    require(isinstance(content, dict), "ckpt_path", rule, str(path), hint)
    return content


def _flaw(path: Path) -> str | None:
    """What is wrong with an archive, in a sentence."""
    try:
        with open_file(path) as file:
            start, size = file.read(len(_ZIP_MAGIC)), os.fstat(file.fileno()).st_size
    except ValueError as error:
        return f"I{str(error)[1:]}." if str(error).startswith("it ") else f"{error}."
    if not start.startswith(_ZIP_MAGIC):
        what = f"It begins with {start!r}, which is no file of torch.save."
        return what if start else "It is empty."
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if sum(part.file_size for part in parts) > size:
                return "It is damaged: its parts are longer than the file."
            # torch takes a part that says it is a directory for whatever is in memory.
            directories = (part.filename for part in parts if part.external_attr)
            damaged = next(directories, None) or archive.testzip()
    except zipfile.BadZipFile:
        return "It is torn: it has no end, or a damaged one."
    except Exception as error:  # what is read may be anything
        return f"It is damaged: {_first_line(error)}"
    return damaged and f"It is damaged, in its part {damaged!r}."


def _refused_classes(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch.load meets the same and tells
        return []


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
