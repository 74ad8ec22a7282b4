"""The protocol by which a callback or module of yours saves evidence of its own at a death."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from esper_lightning.recorder.death import Death

__all__ = ["SENTENCE_LENGTH", "Death", "HoldsEvidence"]

SENTENCE_LENGTH = 500
"""Greatest number of characters of a callback's sentence in the report."""


@runtime_checkable
class HoldsEvidence(Protocol):
    """A callback, or the LightningModule, with evidence that is not on disk.

    When a run with a ``FlightRecorder`` dies, ``save_evidence`` of each such object is called once
    the recorder's own evidence is saved. No base class and no registration is needed: the method is
    enough::

        class LastBatches(Callback):
            def save_evidence(self, directory: Path, death: Death) -> str | None:
                torch.save(list(self._batches), directory / "batches.pt")
                return f"the last {len(self._batches)} batches"

    The method is called in a thread of its own and has five seconds; all such methods of a run
    together have ten. The report is on disk before the first method is called. An error of the
    method, or a note that it was late, is written into the report, with the path of the directory
    if the directory holds files; no other evidence is lost. The thread that trains may be stuck, or
    even continue, as after a hang: call no collective, and wait for no lock that the training
    thread may hold. After a fault in C the method is not called.
    """

    def save_evidence(self, directory: Path, death: Death) -> str | None:
        """Write evidence into a directory, quickly and without the other ranks.

        Args:
            directory: Directory for this callback alone: ``rank<k>/evidence/<name of the class>``,
                which exists unless the disk is full. It may hold evidence of an earlier hang.
            death: Death that ends the run: ``cause``, ``error``, ``signal``, and ``reason`` in one
                line.

        Returns:
            A sentence for the report, which is cut to one line of 500 characters, or ``None`` where
            there is nothing to say.

        Raises:
            Exception: Any error that prevents the evidence from being saved; it is reported.
        """
        ...
