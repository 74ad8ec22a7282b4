"""Errors of a run: those about a class that the settings name are a line, a user's own are not."""

from unittest.mock import Mock

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelPruning
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from esper_lightning import PPO
from esper_lightning.cli.refusals import refusal
from esper_lightning.envs import CartPole


@pytest.fixture
def error_of(make_trainer):
    """The error of a fit, with a traceback that begins below the test."""

    def fit(*callbacks: Callback, model=None, **settings):
        trainer = make_trainer(callbacks=list(callbacks), max_steps=1, **settings)
        return raised(lambda: trainer.fit(model or BoringModel()))

    return fit


def raised(call) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each test looks at the error
        call()
    error = caught.value
    while error.__traceback__.tb_frame.f_code.co_filename == __file__:
        error.__traceback__ = error.__traceback__.tb_next
    return error


def pruning(kind: type[ModelPruning] = ModelPruning) -> ModelPruning:
    return kind("l1_unstructured", amount=5.5, use_lottery_ticket_hypothesis=False)


def test_what_torch_refuses_of_a_callback_is_named_until_the_first_iteration_is_done(error_of):
    error = error_of(pruning())
    assert refusal(error, began=False).startswith("ModelPruning: ValueError: amount=")
    assert refusal(error, began=True) is None


def test_what_refuses_a_logger_is_named(tmp_path):
    logger = TensorBoardLogger(tmp_path, max_queue="a")
    assert refusal(raised(lambda: logger.experiment), began=False).startswith(
        "TensorBoardLogger: TypeError: "
    )


def test_an_error_that_came_through_code_of_the_user_keeps_its_traceback(error_of):
    def fails(*_):
        raise TypeError("of the user")

    class Mine(ModelPruning):
        def apply_pruning(self, amount):
            super().apply_pruning(amount)

    assert refusal(error_of(LambdaCallback(on_fit_start=fails)), began=False) is None
    assert refusal(error_of(pruning(Mine)), began=False) is None


def test_an_error_of_this_package_keeps_its_traceback(error_of):
    model = PPO(CartPole(num_envs=4), total_env_steps=64)
    assert refusal(error_of(model=model, gradient_clip_val=1.0), began=False) is None


@pytest.mark.filterwarnings("ignore:.*world_size")
def test_what_the_device_or_other_ranks_may_cause_keeps_its_traceback(error_of, monkeypatch):
    full = Mock(side_effect=torch.OutOfMemoryError("of memory"))
    monkeypatch.setattr(ModelPruning, "sanitize_parameters_to_prune", full)
    assert refusal(error_of(pruning()), began=False) is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(DDPStrategy, "_get_process_group_backend", Mock(return_value="foo"))
    error = error_of(strategy=DDPStrategy(), devices=1, accelerator="cpu")
    assert refusal(error, began=False) is None


def test_a_metric_that_a_callback_lacks_is_a_line_at_any_time(error_of):
    error = error_of(EarlyStopping("nothing", check_on_train_epoch_end=True))
    assert "nothing" in refusal(error, began=True)


def test_what_lightning_calls_a_mistake_is_one_before_the_first_iteration():
    error = raised(Mock(side_effect=MisconfigurationException("no such thing")))
    assert refusal(error, began=False) == "no such thing"
    assert refusal(error, began=True) is None


def test_an_environment_may_refuse_to_be_measured():
    error = raised(Mock(side_effect=ValueError("too few")))
    assert refusal(error, began=False, measures=True) == "too few"
    assert refusal(error, began=False) is None


def test_the_traceback_can_be_asked_for(error_of, monkeypatch):
    error = error_of(pruning())
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    assert refusal(error, began=False) is None
