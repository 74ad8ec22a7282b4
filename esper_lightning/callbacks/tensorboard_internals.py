"""Private attributes of TensorBoard's writer of events, and why this package needs them.

TensorBoard may rename these attributes in any release. The file is beside
``lightning_internals.py``, for the same reason.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["event_file", "replace_event_file"]

_T = TypeVar("_T")


def event_file(experiment: Any) -> str:
    """Path or address of the file that an experiment of ``TensorBoardLogger`` writes.

    ``file_writer.event_writer._file_name``, TensorBoard's own, which chooses the name itself.

    Raises:
        AttributeError: If ``experiment`` is not one of ``TensorBoardLogger``, or is closed.
    """
    return str(experiment.file_writer.event_writer._file_name)


def replace_event_file(experiment: Any, replace: Callable[[Path], _T]) -> _T | None:
    """Make an experiment of ``TensorBoardLogger`` write into another object than its own file.

    ``_async_writer._writer``, TensorBoard's own, and the ``_writer`` below, which is the file.

    Args:
        experiment: Experiment of a logger.
        replace: Makes the new object from the path of the file, once the file holds all earlier
            events.

    Returns:
        The new object; ``None`` for a file that is not on a local disk.

    Raises:
        AttributeError: If ``experiment`` is not one of ``TensorBoardLogger``, or is closed.
    """
    writer = experiment.file_writer.event_writer
    path = event_file(experiment)
    if "://" in path:
        return None
    records = writer._async_writer._writer
    writer.flush()
    records._writer = file = replace(Path(path))
    return file
