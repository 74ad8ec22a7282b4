"""The files that a recording holds open in the folder of its rank."""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lightning.pytorch import Trainer

from esper_lightning.callbacks.checkpoint_internals import checkpoint_to_load
from esper_lightning.forensics import sidecar
from esper_lightning.forensics.attempts import list_attempt
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.room import release_room, reserve_room
from esper_lightning.recorder.attempt import attempt
from esper_lightning.recorder.death import in_words
from esper_lightning.recorder.earlier_evidence import EarlierEvidence
from esper_lightning.recorder.fingerprint import take_fingerprint
from esper_lightning.recorder.peers import Peers

__all__ = ["RankFiles", "open_rank_files"]

_log = logging.getLogger(__name__)


class RankFiles(NamedTuple):
    """Objects that read and write the files in the folder of a rank."""

    peers: Peers
    """The ``process.json`` of this rank, and those of the other ranks."""
    ring: PhaseRing
    """Ring of the open phases and the latest closed phases."""
    earlier: EarlierEvidence
    """Evidence of earlier runs."""


def open_rank_files(
    trainer: Trainer,
    layout: RunLayout,
    undo: contextlib.ExitStack,
    *,
    met: Sequence[ProcessRecord],
    watch: bool,
    trains: bool,
) -> RankFiles:
    """Rename evidence of earlier runs, open the phase ring, and report that the rank runs.

    If the disk refuses one file, the others are opened nonetheless, with one warning.

    Args:
        trainer: Trainer of the run.
        layout: Run directory.
        undo: Stack to which this function adds the calls that close the files.
        met: Processes of the ranks, as ``peers.meet`` returns them; empty where they have not met.
        watch: Whether a second process watches this one.
        trains: Whether the run is a fit.

    Raises:
        OSError: If the folder of the rank cannot be made.
    """
    files = layout.rank(trainer.global_rank)
    files.directory.mkdir(parents=True, exist_ok=True)
    peers = Peers(layout, trainer.global_rank, trainer.world_size, met)
    refused: list[BaseException] = []

    def attempt_file(action: Callable[[], object]) -> None:
        error = attempt(action, what=None, errors=OSError).error
        refused.extend([] if error is None else [error])

    with sidecar.locked(files.directory):
        # A second process dies with its container, and may still be at work elsewhere.
        attempt_file(lambda: sidecar.complete_report(files))
        if trains:
            attempt_file(lambda: list_attempt(files))
        resumed_from = checkpoint_to_load(trainer)
        resumes = resumed_from is not None
        earlier = EarlierEvidence(layout, files, trains=trains, resumes=resumes)
        attempt_file(earlier.rename)
        attempt_file(lambda: peers.note_event_files(earlier.keep_latest_events(trainer)))
        ring = PhaseRing(files.phases)
        undo.callback(ring.close)
        attempt_file(lambda: reserve_room(files.directory))
        undo.callback(lambda: release_room(files.directory))
        taken = attempt(lambda: take_fingerprint(trainer, layout), what=None).result
        if taken is not None:
            peers.note_fingerprint(taken, earlier.fingerprint)
        if resumed_from is not None:
            peers.note_resumption(str(resumed_from))
        attempt_file(lambda: peers.report("running"))
    refused += [] if ring.error is None else [ring.error]
    if refused:
        text = "%s does not take every file: %s. At a death, some evidence may not be saved."
        _log.warning(text, files.directory, in_words(refused[0]))
    running = replace(peers.process, state="running", fingerprint=None)
    second = sidecar.start(files.directory, os.getpid(), running) if watch else None
    if second is not None:
        undo.callback(second.stop)
    return RankFiles(peers, ring, earlier)
