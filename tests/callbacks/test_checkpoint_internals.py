"""How runs find and load checkpoints through private attributes of Lightning."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel

from esper_lightning.callbacks import checkpoint_internals as internals


class LoadsInPlace(Callback):
    """Makes a run load a file, and notes what the run resumes from."""

    def __init__(self, path):
        self.path, self.seen = path, []

    def setup(self, trainer, pl_module, stage):
        self.seen = [internals.resumes_last(trainer), internals.checkpoint_to_load(trainer)]
        if internals.resumes_last(trainer):
            internals.load_in_place_of_last(trainer, self.path)
        self.seen.append(internals.checkpoint_to_load(trainer))

    def on_train_start(self, trainer, pl_module):
        self.seen += [trainer.ckpt_path, pl_module.layer.bias[0].item()]


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning")
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_only_a_run_that_resumes_the_last_checkpoint_loads_another(make_trainer, tmp_path):
    paths = []
    for value in (1.0, 2.0):
        model, trainer = BoringModel(), make_trainer(max_steps=1)
        trainer.fit(model)
        torch.nn.init.constant_(model.layer.bias, value)
        paths.append(str(tmp_path / f"{value}.ckpt"))
        trainer.save_checkpoint(paths[-1])
    callback = LoadsInPlace(paths[0])
    trainer = make_trainer(max_steps=2, callbacks=[callback])
    trainer.fit(BoringModel(), ckpt_path="last")
    assert callback.seen == [True, None, paths[0], paths[0], 1.0]
    trainer.fit(BoringModel(), ckpt_path=paths[1])  # the same Trainer
    assert callback.seen == [False, paths[1], paths[1], paths[1], 2.0]
    assert internals.checkpoint_to_load(trainer) is None
