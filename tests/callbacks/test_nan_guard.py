"""NanGuard: the first NaN ends the run, and can be reproduced."""

import contextlib
import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from esper_lightning import PPO, FlightRecorder, NanGuard, PPOConfig
from esper_lightning.callbacks import nan_guard
from esper_lightning.core.errors import NonFiniteError
from esper_lightning.core.types import Samples
from esper_lightning.envs import CartPole
from esper_lightning.ppo.learner import Learner
from esper_lightning.ppo.objective import ppo_loss_terms


class Fragile(LightningModule):
    """Row 3 is negative: its root is NaN, or has a gradient that is not finite where it is 0."""

    def __init__(self, root_of_zero=False, manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        self.layer = torch.nn.Linear(2, 1, bias=False)
        self.root_of_zero = root_of_zero
        torch.nn.init.constant_(self.layer.weight, 1.0)

    def training_step(self, batch, batch_idx):
        out = self.layer(batch)
        root = (out * 0 if self.root_of_zero and batch_idx == 3 else out).sqrt()
        if not self.automatic_optimization:
            self.manual_backward(root.sum())
            self.optimizers().step()
        return root.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def data(bad=-1.0):
    rows = torch.ones(6, 2)
    rows[3] = bad
    return DataLoader(rows)


@pytest.mark.parametrize(
    ("module", "rows", "tensors"),
    [
        (Fragile(), data(), ["loss"]),
        (Fragile(manual=True), data(), ["loss"]),
        (Fragile(manual=True, root_of_zero=True), data(1.0), ["gradient of layer.weight"]),
        (Fragile(root_of_zero=True), data(1.0), ["gradient of layer.weight"]),
        (Fragile(), data(math.inf), ["batch", "loss"]),
    ],
)
def test_stops_before_the_optimizer_does(make_trainer, tmp_path, module, rows, tensors):
    trainer = make_trainer(max_epochs=1, callbacks=[NanGuard(), FlightRecorder(watch=False)])
    with pytest.raises(NonFiniteError, match=r"in step 4: ") as caught:
        trainer.fit(module, rows)
    assert caught.value.tensors == tensors
    assert module.layer.weight.isfinite().all()
    saved = torch.load(tmp_path / "rank0" / "nan.pt", weights_only=True)
    assert torch.equal(saved["batch"], list(rows)[3])


def test_names_the_batch_that_spoiled_an_accumulated_gradient(make_trainer, tmp_path):
    callbacks = [NanGuard(), FlightRecorder(watch=False)]
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=6, callbacks=callbacks)
    rows = data()
    with pytest.raises(NonFiniteError, match=r"in step 1: loss"):
        trainer.fit(Fragile(), rows)
    saved = torch.load(tmp_path / "rank0" / "nan.pt", weights_only=True)
    assert torch.equal(saved["batch"], list(rows)[3])


def test_leaves_a_healthy_run_alone(make_trainer):
    def weights(callbacks):
        torch.manual_seed(0)
        module = Fragile()
        make_trainer(max_epochs=1, callbacks=callbacks).fit(module, data(1.0))
        return module.layer.weight

    assert torch.equal(weights([]), weights([NanGuard()]))


class Unusual(LightningModule):
    """A healthy module with a sparse gradient and with empty tensors in its batch."""

    def __init__(self, gradient=1.0):
        super().__init__()
        self.table = torch.nn.Embedding(4, 2, sparse=True)
        self.gradient = gradient

    def training_step(self, batch, batch_idx):
        out = self.table(batch["row"])
        out.register_hook(lambda gradient: gradient * self.gradient)
        return out.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def unusual():
    batch = {"row": torch.tensor([1, 1, 2]), "boxes": torch.empty(0, 4)}
    return DataLoader([batch] * 4, batch_size=None)


def test_empty_tensors_and_sparse_gradients_are_no_fault(make_trainer):
    trainer = make_trainer(max_epochs=1, callbacks=[NanGuard()])
    trainer.fit(Unusual(), unusual())
    assert trainer.global_step == 4


def test_a_sparse_gradient_is_looked_at(make_trainer):
    trainer = make_trainer(max_epochs=1, callbacks=[NanGuard()])
    with pytest.raises(NonFiniteError, match=r"gradient of table\.weight"):
        trainer.fit(Unusual(gradient=math.inf), unusual())


def test_a_gradient_scaler_finds_its_scale(make_trainer):
    """The first scale is far too large: gradients overflow, as they do in half precision."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-8)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = make_trainer(max_epochs=1, callbacks=[NanGuard()], plugins=[plugin])
    trainer.fit(Fragile(), DataLoader(torch.full((6, 2), 0.01)))
    assert scaler.get_scale() < 2.0**126


def test_ppo_names_the_gradient_step_and_keeps_its_minibatch(make_trainer, tmp_path, monkeypatch):
    """A log-probability of minus infinity in the rollout makes ratios of infinity."""
    config = PPOConfig(rollout_steps=8, minibatches=2)
    model = PPO(CartPole(num_envs=4), ppo=config, total_env_steps=320)
    prepare = Learner.compute_targets

    def poisoned(self, rollout):
        targets = prepare(self, rollout)
        if model.iteration == 2:
            targets.samples.value_target[5] = math.nan
        return targets

    monkeypatch.setattr(Learner, "compute_targets", poisoned)
    trainer = make_trainer(callbacks=[FlightRecorder(watch=False)])
    with pytest.raises(NonFiniteError, match=r"in iteration 3, gradient step [12]: ") as caught:
        trainer.fit(model)
    assert caught.value.phase == "update"
    assert "loss/value" in caught.value.tensors
    minibatch = torch.load(tmp_path / "rank0" / "nan.pt", weights_only=True)
    assert minibatch["value_target"].isnan().any()
    batch = Samples(**minibatch, action_mask=None)
    evaluation = model.policy.evaluate(batch.obs, batch.action, None)
    assert not ppo_loss_terms(evaluation, batch, config).value.isfinite().all()


@pytest.mark.parametrize("finite", [True, False])
def test_what_a_device_has_not_yet_told_is_waited_for_at_the_end(make_trainer, finite):
    waited = []

    class Event:
        """An event of a device that has not caught up yet."""

        def query(self):
            return False

        def synchronize(self):
            waited.append(True)

    guard, trainer = NanGuard(), make_trainer()
    guard._looks.append(nan_guard._Look(torch.tensor([finite]), Event(), ["loss"], None, 6))
    guard._judge(ahead=1)
    assert waited == []
    expected = contextlib.nullcontext() if finite else pytest.raises(NonFiniteError, match="step 7")
    with expected:
        guard.on_train_end(trainer, Fragile())
    assert waited == [True]


def test_a_gradient_of_a_bias_is_looked_at(make_trainer):
    class Biased(Fragile):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch, batch_idx):
            bad = 0.0 * self.bias if batch_idx == 3 else self.bias
            return self.layer(batch).sum() + (bad + (batch_idx != 3)).sqrt().sum()

    trainer = make_trainer(max_epochs=1, callbacks=[NanGuard()])
    with pytest.raises(NonFiniteError, match=r"in step 4: gradient of bias\."):
        trainer.fit(Biased(), data(1.0))
