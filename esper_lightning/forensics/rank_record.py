"""``process.json`` of a rank, and the fields that it shares with ``crash.json``.

``process.json`` is written when a rank starts, at its end, and when its evidence is saved.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from esper_lightning.forensics.fingerprint import Fingerprint
from esper_lightning.forensics.processes import ProcessIdentity, same_process
from esper_lightning.forensics.reading import parse_json, read_file
from esper_lightning.forensics.records import EpochSeconds, earlier_key
from esper_lightning.forensics.room import encode, write_json

__all__ = ["SCHEMA", "ProcessRecord", "RankRecord", "same_recording"]

SCHEMA = 1
"""Version of both files' form: keys are only added, and no key changes its meaning."""


@dataclass(frozen=True, kw_only=True)
class RankRecord(ProcessIdentity):
    """The rank and the run that a file belongs to.

    Attributes:
        schema: Version of the file's form, ``SCHEMA`` when it is written.
        rank: Global rank of the process, from 0.
        world_size: Number of ranks of the run.
        started_s: Begin of the run's recording in this process, in seconds since the epoch.
        run: Identifier that all ranks of a run share once they have met, and no other run has.
        event_files: Names of TensorBoard's files in the run directory that this run and earlier
            runs are known to have begun, the oldest first.
    """

    EXPENDABLE: ClassVar[tuple[str, ...]] = ("event_files",)
    """Keys that are dropped, one after another, where a full disk takes no more."""

    schema: int | None = SCHEMA
    rank: int | None = None
    world_size: int | None = None
    started_s: EpochSeconds | None = None
    run: str | None = None
    event_files: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Self:
        """The record in a file, without the values that are not of their field's type.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If the file cannot be read, with the reason in a few words.
        """
        content = parse_json(read_file(path))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return cls.from_dict(cast(dict[str, Any], content))

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The record in a file; ``None`` if the file is missing or damaged."""
        try:
            return cls.load(path)
        except (FileNotFoundError, ValueError):
            return None

    def to_dict(self) -> dict[str, Any]:
        """The record as a JSON object, ``schema`` first."""
        return {"schema": self.schema} | super().to_dict()

    def to_json(self) -> bytes:
        """The record as the content of a file."""
        return encode(self.to_dict())

    def write(self, path: Path) -> None:
        """Replace a file, shortened where the disk is full (``room.write_json``).

        Raises:
            OSError: If the disk takes no file at all.
        """
        write_json(path, self.to_dict(), expendable=self.EXPENDABLE)

    def of_rank(self) -> dict[str, Any]:
        """The fields that all files of this rank and run share, by name."""
        names = [field.name for field in dataclasses.fields(RankRecord)]
        return {name: getattr(self, name) for name in names if name not in ("schema", "unknown")}


@dataclass(frozen=True, kw_only=True)
class ProcessRecord(RankRecord):
    """``process.json``: the identity of a rank's process, and its state.

    Attributes:
        state: ``running``, ``finished``, ``failed``, or ``off`` where the run continues without its
            recorder.
        evidence_saved: Whether all evidence of a failure is on disk; a rank that waits for its
            peers reads this. (``saved`` in versions up to 0.1.)
        changed_s: Time at which the record was written, in seconds since the epoch.
        fingerprint: All that decides what the program does, besides its state.
        differences: What differs from the fingerprint of the run that is resumed, or else of the
            run before in the directory, in a few words each.
        resumed_from: Absolute path, or address, of the checkpoint that the run is resumed from;
            ``None`` for a new run.
        beat_s: Seconds from one sign of life to the next (``forensics.heartbeat``); ``None`` where
            the process gives none.
    """

    EXPENDABLE: ClassVar[tuple[str, ...]] = ("fingerprint", "differences", "event_files")

    state: str | None = None
    evidence_saved: bool | None = dataclasses.field(default=None, metadata=earlier_key("saved"))
    changed_s: EpochSeconds | None = None
    fingerprint: Fingerprint | None = None
    differences: tuple[str, ...] = ()
    resumed_from: str | None = None
    beat_s: float | None = None


def same_recording(one: RankRecord, other: RankRecord) -> bool:
    """Whether two records, of ``process.json`` or ``crash.json``, are of one run of one process.

    A field that either record lacks is not compared.
    """
    began = one.started_s, other.started_s
    return same_process(one, other) and (None in began or began[0] == began[1])
