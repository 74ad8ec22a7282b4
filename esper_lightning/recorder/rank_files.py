"""What a recording has open in the folder of its rank, from its beginning to its end."""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lightning.pytorch import Trainer

from esper_lightning.forensics import sidecar
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.room import release_room, reserve_room
from esper_lightning.recorder.attempt import attempt
from esper_lightning.recorder.death import in_words
from esper_lightning.recorder.earlier_evidence import EarlierEvidence
from esper_lightning.recorder.peers import Peers

__all__ = ["RankFiles", "open_rank_files"]

_log = logging.getLogger(__name__)


class RankFiles(NamedTuple):
    """What is open in the folder of a rank."""

    peers: Peers
    """This rank's ``process.json``, and those of the others."""
    ring: PhaseRing
    """Open phases and the latest closed ones."""
    earlier: EarlierEvidence
    """What earlier runs left."""


def open_rank_files(
    trainer: Trainer,
    layout: RunLayout,
    undo: contextlib.ExitStack,
    *,
    met: Sequence[ProcessRecord],
    watch: bool,
    trains: bool,
) -> RankFiles:
    """Rename what earlier runs left, open the ring, and report that the rank runs.

    One file that is impossible is no reason to have no other: there is one warning then.

    Args:
        trainer: Trainer of the run.
        layout: Run directory.
        undo: Where the ends of what begins here are added.
        met: Processes of the ranks, as ``peers.meet`` returns them; empty where they have not met.
        watch: Whether a second process watches this one.
        trains: Whether the run is a fit.

    Raises:
        OSError: If the folder cannot be made.
    """
    files = layout.rank(trainer.global_rank)
    files.directory.mkdir(parents=True, exist_ok=True)
    peers = Peers(layout, trainer.global_rank, trainer.world_size, met)
    refused: list[BaseException] = []

    def attempt_file(action: Callable[[], object]) -> None:
        error = attempt(action, what=None, errors=OSError).error
        refused.extend([] if error is None else [error])

    with sidecar.locked(files.directory):
        # The second process of a run dies with its container, and may be late elsewhere.
        attempt_file(lambda: sidecar.complete_report(files))
        earlier = EarlierEvidence(layout, files, trains=trains)
        attempt_file(earlier.rename)
        attempt_file(lambda: peers.note_event_files(earlier.keep_latest_events(trainer)))
        ring = PhaseRing(files.phases)
        undo.callback(ring.close)
        attempt_file(lambda: reserve_room(files.directory))
        undo.callback(release_room, files.directory)
        attempt_file(lambda: peers.report("running"))
    refused += [] if ring.error is None else [ring.error]
    if refused:
        text = "%s does not take every file: %s. At a death, what can be saved will be."
        _log.warning(text, files.directory, in_words(refused[0]))
    running = replace(peers.process, state="running")
    second = sidecar.start(files.directory, os.getpid(), running) if watch else None
    if second is not None:
        undo.callback(second.stop)
    return RankFiles(peers, ring, earlier)
