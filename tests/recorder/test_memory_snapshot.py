"""CUDA memory that runs out is written to a snapshot before unwinding frees it."""

import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from esper_lightning import FlightRecorder
from esper_lightning.forensics.layout import RankLayout
from esper_lightning.recorder import memory_snapshot
from tests.reports import read_report


class Greedy(LightningModule):
    """A step that holds a tensor, which unwinding frees, and allocates more than there is."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        held = torch.empty(1 << 20, device=self.device)
        if batch_idx == 2:
            torch.empty(1 << 50, device=self.device)
        return self.layer(batch).sum() + 0 * held[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_snapshot_holds_what_unwinding_frees(make_trainer, tmp_path):
    recorder = FlightRecorder(watch=False)
    trainer = make_trainer(max_epochs=1, accelerator="gpu", devices=1, callbacks=[recorder])
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit(Greedy(), DataLoader(torch.ones(4, 2)))
    report = read_report(tmp_path / "rank0" / "crash.json")
    assert report["evidence"]["memory"]["state"] == "saved"
    snapshot = pickle.loads((tmp_path / "rank0" / "memory.pickle").read_bytes())
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    assert any(b["state"] == "active_allocated" and b["size"] >= 4 << 20 for b in blocks)


def test_each_time_memory_runs_out_the_run_that_goes_on_gets_a_snapshot(tmp_path, monkeypatch):
    observers, written = [], []

    def dump(name):
        written.append(name)
        folder = tmp_path / str(len(written) - 1)
        assert not (folder / "memory.pickle").exists()  # written beside its place
        Path(name).write_text("snapshot")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    name = "_cuda_attach_out_of_memory_observer"
    monkeypatch.setattr(torch._C, name, observers.append, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    memory_snapshot._attach.cache_clear()
    for number in range(2):
        files = RankLayout(tmp_path / str(number))
        memory_snapshot.watch_memory(files)
        observers[0](0, 1, 2, 3)
        memory_snapshot.forget_memory(files)
    memory_snapshot._attach.cache_clear()
    observers[0](0, 1, 2, 3)
    assert len(observers) == 1
    assert len(written) == 2
    assert {path.parent.name: path.read_text() for path in tmp_path.glob("*/*")} == {
        "0": "snapshot",
        "1": "snapshot",
    }
