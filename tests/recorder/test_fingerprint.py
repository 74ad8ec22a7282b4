"""A run's fingerprint is on disk from the start, in checkpoints too, and differences are told."""

import logging

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from esper_lightning import FlightRecorder
from esper_lightning.cli.crash import examine, run
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.recorder.fingerprint import FINGERPRINT_KEY


class Settled(BoringModel):
    def __init__(self, width=1):
        super().__init__()
        self.save_hyperparameters()


@pytest.fixture
def fit(make_trainer, tmp_path):
    """Fit a module in the directory ``tmp_path / "run"``; returns the record at its first step."""

    def fit(module=None, *, raises=False, **how):
        path, seen = tmp_path / "run" / "rank0" / "process.json", []

        class Looks(BoringModel if module is None else type(module)):
            def training_step(self, batch, batch_idx):
                seen.append(ProcessRecord.load(path))
                if raises:
                    raise RuntimeError("injected")
                return super().training_step(batch, batch_idx)

            def on_train_epoch_end(self):
                self.trainer.save_checkpoint(tmp_path / "end.ckpt")

        trainer = make_trainer(
            callbacks=[FlightRecorder(tmp_path / "run", watch=False)],
            max_epochs=how.pop("epochs", 1),
            limit_train_batches=1,
        )
        trainer.fit(Looks(**(module.hparams if module else {})), **how)
        return seen[0]

    return fit


def test_the_fingerprint_is_on_disk_before_the_first_step(fit):
    record = fit(Settled())
    found = record.fingerprint
    assert found.versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found.versions["lightning"]
    assert found.threads["torch threads"] == torch.get_num_threads()
    assert found.hardware["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found.config
    assert record.differences == ()


def test_what_differs_from_the_run_before_is_shown(fit, tmp_path, monkeypatch, capsys):
    fit(Settled())
    monkeypatch.setenv("XLA_FLAGS", "--new")
    with pytest.raises(RuntimeError, match="injected"):
        fit(Settled(2), raises=True)
    changed = ("another config", "XLA_FLAGS not set -> --new")
    assert examine(tmp_path / "run")[0].differences == changed
    run([str(tmp_path / "run")])
    lines = "".join(f"\n    {each}" for each in changed)
    assert f"Other than in the run before:{lines}\n" in capsys.readouterr().out


def test_resuming_says_what_differs_from_the_checkpoint(fit, tmp_path, monkeypatch, caplog):
    fit()
    path = tmp_path / "end.ckpt"
    stored = torch.load(path, weights_only=True)
    monkeypatch.setenv("OMP_SCHEDULE", "static")  # and the run before did not die
    with caplog.at_level(logging.WARNING):
        record = fit(ckpt_path=path, epochs=2, weights_only=True)
    assert stored[FINGERPRINT_KEY]["variables"].get("OMP_SCHEDULE") is None
    assert record.differences == ("OMP_SCHEDULE not set -> static",)
    said = "Resumed under other conditions: OMP_SCHEDULE not set -> static."
    assert [r.getMessage() for r in caplog.records if "conditions" in r.getMessage()] == [said]
