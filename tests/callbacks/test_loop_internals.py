"""What Lightning's loops count and log, in a run of a plain module."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from esper_lightning.callbacks.loop_internals import (
    accumulates_gradients,
    batches_of_epoch,
    finished_batches,
    lift_time_limit,
    metrics_of_step,
    train_loaders,
)


class Logs(BoringModel):
    def training_step(self, batch, batch_idx):
        self.log("loss", torch.tensor(float(batch_idx)), on_step=True, on_epoch=True)
        if batch_idx == 1:
            self.log("second", torch.tensor(2.0), on_step=True, on_epoch=False)
        return super().training_step(batch, batch_idx)


class Watches(Callback):
    def __init__(self):
        self.seen, self.loaders = [], []

    def on_train_batch_start(self, trainer, *_):
        assert finished_batches(trainer) == len(self.seen)

    def on_train_batch_end(self, trainer, *_):
        counts = finished_batches(trainer), batches_of_epoch(trainer)
        self.seen.append((*counts, accumulates_gradients(trainer), metrics_of_step(trainer)))
        self.loaders = train_loaders(trainer)


@pytest.fixture
def watched(make_trainer):
    watches = Watches()
    trainer = make_trainer(
        callbacks=[watches],
        max_steps=-1,
        max_epochs=2,
        limit_train_batches=3,
        limit_val_batches=1,
        accumulate_grad_batches=2,
    )
    module = Logs()
    trainer.fit(module, DataLoader(torch.zeros(6, 32), batch_size=2))
    return watches


def test_batches_are_counted_over_epochs_and_gradients_wait_within(watched):
    assert [seen[:3] for seen in watched.seen] == [
        *((1, 1, True), (2, 2, False), (3, 3, False)),  # the last batch of an epoch steps
        *((4, 1, True), (5, 2, False), (6, 3, False)),
    ]
    assert len(watched.loaders) == 1


def test_a_step_has_no_value_of_an_earlier_epoch(watched):
    names = [set(seen[3]) for seen in watched.seen]
    assert names[0] == names[3] == {"loss", "loss_step"}
    assert names[1] == names[4] == {"loss", "loss_step", "second"}


def test_a_limit_of_time_is_lifted(make_trainer):
    trainer = make_trainer(max_steps=2, max_time={"seconds": 0})
    lift_time_limit(trainer)
    trainer.fit(BoringModel())
    assert trainer.global_step == 2
