"""A checkpoint of the moment of death: of this rank alone, whole, and honest about NaN."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy

from esper_lightning.recorder import crash_checkpoint
from esper_lightning.recorder.crash_checkpoint import CRASH_KEY, save_crash_checkpoint
from tests.recorder.test_flight_recorder import Plain, data


class Collects(Plain):
    """A module that calls a collective when it saves, unless ``saves_alone`` is set."""

    saves_alone = False

    def on_save_checkpoint(self, checkpoint):
        assert self.saves_alone, "a collective"
        if checkpoint.get("fails"):
            raise RuntimeError("injected")


@pytest.fixture
def trained(make_trainer):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Collects(), data())
    return trainer


def test_no_other_rank_is_asked_and_the_next_checkpoint_asks_again(trained, tmp_path):
    path, module = tmp_path / "crash.ckpt", trained.lightning_module
    assert save_crash_checkpoint(trained, path, "why") == "all weights finite"
    assert not module.saves_alone
    saved = torch.load(path, weights_only=True)
    assert (saved[CRASH_KEY]["reason"], saved[CRASH_KEY]["finite"]) == ("why", True)
    assert torch.equal(saved["state_dict"]["layer.weight"], module.layer.weight)
    module.on_save_checkpoint = lambda checkpoint: 1 / 0
    with pytest.raises(ZeroDivisionError):
        save_crash_checkpoint(trained, path, "why")
    assert not module.saves_alone


def test_what_is_not_finite_is_named(trained, tmp_path):
    with torch.no_grad():
        trained.lightning_module.layer.weight[0, 2] = torch.nan
    said = save_crash_checkpoint(trained, tmp_path / "crash.ckpt", "why")
    assert said == "NOT FINITE: weights.layer.weight"
    crash = torch.load(tmp_path / "crash.ckpt", weights_only=True)[CRASH_KEY]
    assert (crash["finite"], crash["non_finite"]) == (False, ["weights.layer.weight"])


def test_weights_that_only_all_ranks_have_are_not_collected(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "strategy", FSDPStrategy())
    with pytest.raises(ValueError, match="FSDPStrategy may shard the weights"):
        save_crash_checkpoint(trained, tmp_path / "crash.ckpt", "why")


def test_a_disk_that_takes_no_more_leaves_the_file_that_was_there(trained, tmp_path, monkeypatch):
    path = tmp_path / "run" / "crash.ckpt"
    save_crash_checkpoint(trained, path, "first")

    def full(checkpoint, place):
        place.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(crash_checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_crash_checkpoint(trained, path, "second")
    monkeypatch.undo()
    assert torch.load(path, weights_only=True)[CRASH_KEY]["reason"] == "first"
    assert list(path.parent.iterdir()) == [path]
