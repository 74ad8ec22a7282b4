"""A directory that a Trainer's run holds, from the claim of the directory to its release.

If the directory is a remote address, the run writes into a local folder, which is copied to the
address at every checkpoint and at the end (``callbacks.mirror``).
"""

import logging
import weakref
from pathlib import Path

from lightning.pytorch import Trainer

from esper_lightning.callbacks.address_claims import new_claims, remembered_address
from esper_lightning.callbacks.mirror import Mirror
from esper_lightning.forensics.claims import Claim
from esper_lightning.forensics.place import Place

__all__ = ["OF_TRAINERS", "HeldDirectory"]

_log = logging.getLogger(__name__)
_COPY_S = 30.0  # limit of the copy at the end; a scheduler's grace period is often as long


class HeldDirectory:
    """The run directory of one Trainer, and the callbacks that use the directory.

    Attributes:
        of_loggers: Claims of folders of loggers outside the directory.
        claims: Claims of the address (``callbacks.address_claims``); ``None`` before they are made.
        config: Content of ``config.yaml`` that is to be written; ``None`` where there is none.
        place: Where the directory is while a run writes into it, and after the run.
        is_used: Whether a run has written into the directory; if not, it is restored at the end.
    """

    config: str | None = None
    is_used = False

    def __init__(
        self,
        directory: Path,
        held: Claim | None,
        address: str | None = None,
        claims: str | None = None,
    ) -> None:
        self.directory, self.claim, self.claims = directory, held, claims
        self.address = None if address is None else remembered_address(directory, address)
        self.of_loggers: list[Claim] = []
        self.users: set[int] = set()
        self.is_open = False  # whether a run writes into it, on any rank
        self.mirror: Mirror | None = None
        self.place: Place | None = None

    def claim_address(self) -> str | None:
        """Claims of the address, if there is one; the copies of all ranks need the same."""
        if self.address is not None and self.claims is None:
            self.claims = new_claims(self.directory)
        return self.claims

    def begin(self, rank: int) -> None:
        """Begin to copy the directory to its address, if it has one, and report where files are."""
        self.is_open = self.is_used = True
        if self.place is not None:
            self.place.close()
        self.place = Place(self.directory)
        if self.address is not None:
            self.mirror = Mirror(self.directory, self.address, rank, self.claim_address())
            if self.claim is not None:  # the second process of a rank that vanishes copies too
                self.claim.note(address=self.address)
            text = "The run writes into %s, which is copied to %s at checkpoints and at the end."
            _log.warning(text, self.directory, self.address)

    def claim_of(self, folder: Path) -> Claim | None:
        """The claim of a folder, by whatever path; ``None`` if this run does not own the folder."""
        held = (each for each in (self.claim, *self.of_loggers) if each is not None and each.holds)
        return next((each for each in held if each.directory.resolve() == folder.resolve()), None)

    def end(self) -> None:
        """Release the directory, after its last copy to its address if it has one."""
        self.is_open = False
        self.users.clear()
        is_taken = self.place is not None and self.place.is_taken
        if self.mirror is not None and not is_taken:
            self.mirror.copy(seconds=_COPY_S)
        self.mirror = None
        self.release()

    def release(self) -> None:
        """Release directory and folders as they are, without a copy to the remote address."""
        if self.place is not None:
            self.place.close()
        for held in (*self.of_loggers, self.claim):
            if held is not None:
                held.release(used=self.is_used)
        self.of_loggers.clear()


OF_TRAINERS: "weakref.WeakKeyDictionary[Trainer, HeldDirectory]" = weakref.WeakKeyDictionary()
"""The run directory of each Trainer of this process that has chosen one."""
