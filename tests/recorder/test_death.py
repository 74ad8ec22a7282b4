"""The description of a death in a report."""

import math
import types

import pytest
import torch

from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.report import CrashReport
from esper_lightning.recorder.death import (
    Death,
    _known_metrics,
    describe,
    describe_error,
    exit_status,
    in_words,
)
from esper_lightning.recorder.signals import SignalExit
from tests.recorder.test_flight_recorder import Plain, UnspeakableError, data


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, None),
        (ValueError("no"), 1),
        (KeyboardInterrupt(), 1),
        (SystemExit(), 0),
        (SystemExit(None), 0),
        (SystemExit(0), 0),
        (SystemExit(3), 3),
        (SystemExit("a text on stderr"), 1),
        (SystemExit(""), 1),
        (SignalExit(15), 143),
    ],
    ids=repr,
)
def test_the_exit_status_is_the_one_that_python_gives(error, status):
    assert exit_status(error) == status


def test_errors_are_told_in_words_whatever_they_say_of_themselves():
    assert in_words(ValueError("no")) == "ValueError: no"
    assert "cannot be shown: RuntimeError" in in_words(UnspeakableError())
    assert Death(cause="peer", peer=(3, "it failed")).reason == "rank 3: it failed"
    assert Death(cause="signal", signal="SIGHUP").reason == "SIGHUP"
    assert Death(cause="exit").reason == "exit"


def test_a_long_traceback_keeps_its_end():
    def deep(n):
        return 1 / n if n == 0 else deep(n - 1)

    with pytest.raises(ZeroDivisionError) as caught:
        deep(200)
    lines = describe_error(caught.value).traceback
    assert "division by zero" in lines[-1]
    assert len(lines) < 200


@pytest.fixture
def described(make_trainer, tmp_path):
    """The description of a death after a step of a module that logs."""

    def fit(act) -> CrashReport:
        told = []

        def act_and_look(module, batch_idx):
            act(module, batch_idx)
            if batch_idx == 1:
                death = Death(cause="exception", error=ValueError("no"))
                told.append(describe(CrashReport(), death, module.trainer, ring))

        ring = PhaseRing(tmp_path / "phases.ring")
        ring.iteration = 7
        ring.enter("update")
        make_trainer(max_epochs=1, limit_train_batches=2).fit(Plain(act_and_look), data())
        ring.close()
        return told[0]

    return fit


def test_where_it_was_and_what_was_known_is_told(described):
    def act(module, batch_idx):
        module.log("nan", torch.tensor(math.nan), on_step=True, on_epoch=False)
        module.log("mean", torch.tensor(2.0), on_step=False, on_epoch=True)
        module.log_dict({"inf": torch.tensor(-math.inf), "number": float(batch_idx)})

    told = described(act)
    assert (told.cause, told.iteration, told.phases) == ("exception", 7, ("update",))
    assert (told.rank, told.world_size, told.stage) == (0, 1, "fit")
    assert told.global_step == 1
    # That of the epoch is not computed.
    assert told.metrics.keys() == {"nan", "inf", "number", "loss"}
    assert told.metrics["number"] == 1.0  # of this step
    assert (told.metrics["nan"], told.metrics["inf"]) == ("nan", "-inf")  # JSON has no NaN
    assert not told.failed_fields


def test_no_device_is_waited_for():
    metrics = {"here": torch.tensor(2.0), "there": torch.tensor(3.0, device="meta")}
    connector = types.SimpleNamespace(_callback_metrics=metrics)
    trainer = types.SimpleNamespace(_logger_connector=connector, _results=None)
    assert _known_metrics(trainer) == {"here": 2.0}


def test_a_field_that_cannot_be_told_costs_no_other(described, monkeypatch):
    monkeypatch.setattr(PhaseRing, "open_names", property(lambda ring: 1 / 0))
    monkeypatch.setattr(Plain, "env_steps", property(lambda module: 1 / 0), raising=False)
    told = described(lambda *_: None)
    assert told.failed_fields == {"phases": "ZeroDivisionError: division by zero"}
    assert (told.iteration, told.global_step) == (7, 1)
    assert told.env_steps is None
