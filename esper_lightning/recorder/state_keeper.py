"""The state after the latest finished iteration, in two files that outlive SIGKILL.

Each rank writes what a checkpoint of it alone would hold into ``state.0.ckpt`` and ``state.1.ckpt``
of its folder, in turn: while one is written, the other is whole. A file is overwritten in place and
not flushed: what a process has written belongs to the kernel, and only a power failure loses it.

An iteration after which an evaluation is due, or an epoch ends, is stored after that: a run that is
resumed would skip it, and lack the row of the evaluation or a checkpoint. Where gradients of
several batches are summed, states are stored after steps of the optimizer: none holds gradients.
``training.checkpoint.kept`` reads the files and joins those of all ranks.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import io
import logging
import math
import os
import shutil
import statistics
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from typing_extensions import override

from esper_lightning.callbacks.checkpoint_internals import (
    checkpoint_to_load,
    dump_checkpoint,
    load_in_place_of_last,
    parse_checkpoint_path,
    resumes_last,
)
from esper_lightning.callbacks.history import finished_iterations
from esper_lightning.callbacks.lightning_internals import evaluates_next
from esper_lightning.callbacks.loop_internals import accumulates_gradients
from esper_lightning.forensics.files import replacing
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.recorder.crash_checkpoint import saving_alone
from esper_lightning.recorder.death import in_words

__all__ = ["MOST_SHARE", "StateKeeper", "load_later_state"]

_log = logging.getLogger(__name__)
MOST_SHARE = 0.005
"""Greatest share of the time of training that storing takes where nobody asked for states."""
_FIRST_DECISION = 4  # iterations of a run before it is known what storing costs
_MOST_BYTES = 64 << 20  # of a state that nobody asked for: the disk must write it, too
_NEVER = 1 << 40  # iterations between two states of a rank that stores none any more


def load_later_state(trainer: Trainer, layout: RunLayout) -> None:
    """Make a run with ``ckpt_path="last"`` resume from a state that is later than its checkpoints.

    This is a collective for such a run. Of a module that is not ``PPO``, whose states
    ``training.checkpoint.start`` joins, the state of the first rank is a whole checkpoint.

    Args:
        trainer: Trainer of a fit, which has loaded nothing yet.
        layout: Run directory, which the run owns.

    Raises:
        OSError: If the disk does not take a copy of the state.
    """
    if not resumes_last(trainer):
        return
    load_in_place_of_last(trainer, None)
    path: str | None = None
    if trainer.is_global_zero:
        last = parse_checkpoint_path(trainer, "last", layout.checkpoints)
        states = (layout.joined_state, *layout.rank(0).states)
        found = [*([] if last is None else [Path(last)]), *filter(zipfile.is_zipfile, states)]
        latest = max(found, key=lambda each: each.stat().st_mtime_ns, default=None)
        if latest in layout.rank(0).states:  # which the run will write again
            layout.checkpoints.mkdir(exist_ok=True)
            with replacing(layout.joined_state) as temporary:
                shutil.copy2(latest, temporary)
            latest = layout.joined_state
        path = None if latest is None else str(latest)
    if trainer.world_size > 1:
        path = trainer.strategy.broadcast(path)
    if path is not None and path != str(checkpoint_to_load(trainer)):
        load_in_place_of_last(trainer, path)
        if trainer.is_global_zero:
            _log.warning("Resuming from %s, which is later than what Lightning found.", path)


class StateKeeper(Checkpoint):
    """Stores the state after an iteration, after all other callbacks.

    At the end of an epoch, Lightning calls callbacks that are a ``Checkpoint`` last.

    Args:
        layout: Run directory.
        rank: Global rank of this process.
        always: Whether every state is stored. Otherwise states are stored as often as takes at most
            ``MOST_SHARE`` of the time, all ranks after the same iterations, and none that is larger
            than 64 MB; where one rank cannot store its state, all ranks soon stop together.

    Attributes:
        is_storing: Whether a state is being collected; it is no checkpoint of the run.
        every: Number of iterations from one stored state to the next.
        seconds: Seconds that storing the latest state took.
    """

    def __init__(self, layout: RunLayout, rank: int, *, always: bool) -> None:
        self._layout, self._files, self._always = layout, layout.rank(rank), always
        self.is_storing, self.every, self.seconds = False, 1, 0.0
        self._is_off = False  # the same on all ranks, which then decide nothing more together
        self._fails = False  # whether this rank cannot store its state
        self._is_due = False  # whether the iteration is stored after what follows it
        self._descriptors: dict[int, int] = {}
        self._slot, self._stored = 1, -1  # of the latest state, and the iteration that it follows
        self._count = 0
        # Since the latest decision: begin, iterations finished by then, and what storing took.
        self._begun_s, self._since, self._took_s = 0.0, 0, list[float]()

    def begin(self, trainer: Trainer) -> None:
        """Remove the states of an earlier run; that from which this run resumes stays.

        The recorder calls this before the first iteration, not earlier: a run whose start is
        refused, the last thing in ``on_train_start``, has removed nothing.
        """
        if self._begun_s:
            return
        resumes = str(trainer.ckpt_path) == str(self._layout.joined_state)
        self._remove_states(joined=trainer.is_global_zero and not resumes)
        alone = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        self._is_off = not alone  # other strategies may shard the weights
        self._begun_s = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the state after the iteration, if its turn has come."""
        self._count += 1
        if self._is_off:
            return
        if self._always or self._count % self.every == 0:
            self._is_due = True
            later = _ends_epoch(trainer) or evaluates_next(trainer)
            if not (later or accumulates_gradients(trainer)):
                self._store(trainer, pl_module)
        is_power = self._count & (self._count - 1) == 0
        if not self._always and is_power and self._count >= _FIRST_DECISION:
            self._decide(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the state after an evaluation within an epoch."""
        if not _ends_epoch(trainer):
            self._store_after(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the state at the end of an epoch, after its evaluation and its checkpoints."""
        self._store_after(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the states of a run that ended well."""
        if stage == "fit":
            self.close()
            self._remove_states(joined=trainer.is_global_zero)

    def close(self) -> None:
        """Close the files, which stay."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _store_after(self, trainer: Trainer, module: LightningModule) -> None:
        """Store the state after an evaluation or an epoch, if it is due or was stored before."""
        is_stored = self._stored == finished_iterations(trainer, module)
        if accumulates_gradients(trainer) or self._is_off or trainer.sanity_checking:
            return
        if self._is_due or is_stored:
            self._store(trainer, module)

    def _store(self, trainer: Trainer, module: LightningModule) -> None:
        """Store the state in the file that does not hold the latest state of another iteration."""
        if self._fails:
            return
        began, iteration = time.perf_counter(), finished_iterations(trainer, module)
        self.is_storing, self._is_due = True, False
        try:
            with saving_alone(module):
                checkpoint = dump_checkpoint(trainer)
            content = io.BytesIO()
            torch.save(checkpoint, content)
            if not self._always and content.tell() > _MOST_BYTES:
                self._fails = True
                return
            slot = self._slot if iteration == self._stored else 1 - self._slot
            self._write(slot, content.getbuffer())
            self._slot, self._stored = slot, iteration
        except Exception as error:  # of a disk or of a user's object: the run continues
            self._fails = True
            text = "The state after an iteration is not stored any more: %s."
            _log.warning(text, in_words(error))
        finally:
            self.is_storing = False
        self.seconds = time.perf_counter() - began
        if not self._always:
            self._took_s.append(self.seconds)

    def _write(self, slot: int, content: memoryview) -> None:
        descriptor = self._descriptors.get(slot)
        if descriptor is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self._files.states[slot], flags, 0o644)
            self._descriptors[slot] = descriptor
        os.ftruncate(descriptor, 0)  # a torn file has no end by which it could be read
        offset = 0
        while offset < len(content):
            offset += os.pwrite(descriptor, content[offset:], offset)

    def _decide(self, trainer: Trainer) -> None:
        """Decide how often states are stored from now on; all ranks decide the same.

        This is a collective where there are several ranks. A rank that cannot store takes part.
        """
        now = time.perf_counter()
        each_s = (now - self._begun_s) / (self._count - self._since)
        self._begun_s, self._since = now, self._count
        every = self.every
        if self._took_s:
            share = statistics.mean(self._took_s) / max(each_s, 1e-9)
            every = max(1, math.ceil(min(share / MOST_SHARE, 1e6)))
            self._took_s.clear()
        every = _NEVER if self._fails else every
        device = trainer.strategy.root_device
        reduced = trainer.strategy.reduce(torch.tensor(every, device=device), reduce_op="max")
        self.every = int(reduced)
        self._is_off = self.every >= _NEVER

    def _remove_states(self, *, joined: bool) -> None:
        """Remove the stored states of this rank, and maybe the one that was joined from all."""
        try:
            for path in (*self._files.states, *([self._layout.joined_state] if joined else [])):
                path.unlink(missing_ok=True)
        except OSError as error:  # the run continues
            if not self._fails:
                _log.warning("The states after iterations are not removed: %s.", in_words(error))
            self._fails = True


def _ends_epoch(trainer: Trainer) -> bool:
    return trainer.is_last_batch or trainer.should_stop
