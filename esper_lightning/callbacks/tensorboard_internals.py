"""Private attributes of TensorBoard's writer of events, and why this package needs them.

TensorBoard may rename these attributes in any release. The file is beside
``lightning_internals.py``, for the same reason.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

__all__ = ["OneEvent", "event_file", "replace_event_file"]

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


class OneEvent:
    """An experiment of ``TensorBoardLogger`` that writes many scalars as one event.

    TensorBoard makes an event of each scalar, which a thread then writes: in a run with few
    environments that took a third of an iteration. All else is that of the experiment.

    ``_get_file_writer`` of torch's ``SummaryWriter``, which its ``add_scalar`` calls, too.

    Args:
        experiment: Experiment of a logger.
    """

    def __init__(self, experiment: Any) -> None:
        self._experiment = experiment
        self._summary: Any = None
        self._step: int | None = None

    @staticmethod
    def suits(experiment: object) -> bool:
        """Whether an experiment is torch's ``SummaryWriter``."""
        return type(experiment).__module__.startswith("torch.utils.tensorboard")

    def add_scalar(
        self, tag: str, scalar_value: Any, global_step: int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Add a scalar to the event; one with settings of its own is written at once."""
        if args or kwargs:
            self._experiment.add_scalar(tag, scalar_value, global_step, *args, **kwargs)
            return
        from torch.utils import tensorboard  # noqa: PLC0415 - TensorBoard may be missing

        summary: Any = cast("Any", tensorboard).summary.scalar(tag, scalar_value)
        if global_step != self._step:
            self.write()
        if self._summary is None:
            self._summary, self._step = summary, global_step
        else:
            self._summary.value.extend(summary.value)

    def write(self) -> None:
        """Write the event, if it has scalars."""
        summary, self._summary = self._summary, None
        if summary is not None:
            self._experiment._get_file_writer().add_summary(summary, self._step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experiment, name)
