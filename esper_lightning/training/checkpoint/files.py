"""Checkpoint files, which are written and read whole or not at all.

Only tensors and plain data are read from a file, never code. An error says what is wrong with a
file that is refused.
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from typing_extensions import override

from esper_lightning.core.errors import require
from esper_lightning.forensics.files import replacing
from esper_lightning.forensics.place import refuse_taken
from esper_lightning.forensics.reading import open_file

__all__ = ["CHECKPOINT_BEGINS", "AtomicCheckpointIO", "read_checkpoint", "write_checkpoint"]

_ZIP_MAGIC = b"PK\x03\x04"
CHECKPOINT_BEGINS = _ZIP_MAGIC + rb".{26}[^/]+/data\.pkl"
"""Regular expression for the first bytes of an archive that ``torch.save`` wrote."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that a crash cannot tear: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    A file is written beside its place, flushed to the disk, and renamed. Until the rename, the
    previous file stays. (Lightning's own plugin writes to the system's temporary directory first.
    That is often another file system, from which a file can only be copied, not renamed. Lightning
    does not flush the file either.) Files are read by ``read_checkpoint``, which never runs code
    from a file, unless ``weights_only=False`` is given. Remote paths (``s3://...``) are handled by
    Lightning.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, or replace the previous one.

        Temporary files that an earlier, killed save of the same file left are removed.

        Args:
            checkpoint: Content of the checkpoint.
            path: Path of the file.
            storage_options: Options for Lightning's own way of writing, which they select.

        Raises:
            OSError: If the file cannot be written, as on a full disk. The previous file is still
                there.
            DirectoryInUseError: If the run directory was moved, and another run took its name.
        """
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        refuse_taken(path)
        write_checkpoint(checkpoint, path)

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: Path of the file.
            map_location: Device to which tensors are moved, as for ``torch.load``.
            weights_only: False lets Lightning read the file, which may run code from it.

        Raises:
            ValueError: If the file is not whole, or holds more than tensors and plain data.
        """
        if weights_only is False or _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, map_location=map_location)


def read_checkpoint(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a file of tensors and plain data that ``torch.save`` wrote.

    Checksums are compared first. ``torch.load`` does not compare them, so a bit that flipped on the
    disk would go unnoticed into a weight.

    Args:
        path: Path of the file.
        map_location: Device to which tensors are moved, as for ``torch.load``.

    Raises:
        ValueError: If the file is refused. The error names the file and what is wrong with it.
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
    except Exception as error:  # damaged bytes can make the unpickler raise anything
        message = f"ckpt_path must name a whole checkpoint, got {str(path)!r}."
        raise ValueError(f"{message} It cannot be read: {_first_line(error)}") from error
    rule, hint = "hold a checkpoint", f"It holds a {type(content).__name__}."
    require(isinstance(content, dict), "ckpt_path", rule, str(path), hint)
    return content


def _flaw(path: Path) -> str | None:
    """What is wrong with an archive, in a sentence; ``None`` if nothing is wrong."""
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
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > size:
                return "It is damaged: its entries are longer than the file."
            # For an entry that is marked as a directory, torch returns uninitialised memory.
            directories = (entry.filename for entry in entries if entry.external_attr)
            damaged = next(directories, None) or archive.testzip()
    except zipfile.BadZipFile:
        return "It is torn: its end is missing or damaged."
    except Exception as error:  # damaged bytes can make zipfile raise anything
        return f"It is damaged: {_first_line(error)}"
    return damaged and f"It is damaged, in its entry {damaged!r}."


def _refused_classes(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch.load will raise the same error
        return []


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint whole, or not at all.

    Raises:
        OSError: If the file cannot be written, as on a full disk. The previous file is still there.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer hides the error of the disk
            if not isinstance(error.__context__, OSError):
                raise
            cause = error.__context__
            raise OSError(cause.errno, cause.strerror, str(path)) from error
