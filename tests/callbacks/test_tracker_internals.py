"""What is known of Lightning's loggers for W&B and MLflow, whose packages may be absent."""

import inspect

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger

from esper_lightning.callbacks.tracker_internals import (
    continue_run,
    run_of_tracker,
    service_of,
    write_below,
)


@pytest.mark.parametrize(("kind", "names"), [
    (WandbLogger, ("_wandb_init", "_experiment", "_id", "_save_dir")),
    (MLFlowLogger, ("_mlflow_client", "_run_id")),
])  # fmt: skip
def test_lightnings_loggers_set_these_attributes(kind, names):
    source = inspect.getsource(kind.__init__)
    assert [name for name in names if f"self.{name}" not in source] == []


def logger(kind, **attributes):
    made = kind.__new__(kind)
    vars(made).update(attributes)
    return made


def test_a_logger_of_files_is_of_no_service(tmp_path):
    assert service_of(CSVLogger(tmp_path)) is None


def test_a_run_of_wandb_is_continued_below_a_directory():
    own = logger(WandbLogger, _wandb_init={"id": None, "dir": "."}, _experiment=None)
    assert (service_of(own), run_of_tracker(own)) == ("wandb", None)
    continue_run(own, "abc")
    write_below(own, "runs/a")
    assert run_of_tracker(own) == own.version == "abc"
    assert own._wandb_init["dir"] == own.save_dir == "runs/a"


def test_a_directory_of_the_user_stays():
    own = logger(WandbLogger, _wandb_init={"id": None, "dir": "mine"}, _experiment=None)
    write_below(own, "runs/a")
    assert own._wandb_init["dir"] == "mine"


def test_a_run_of_mlflow_is_continued():
    own = logger(MLFlowLogger, _mlflow_client=None, _run_id=None)
    assert (service_of(own), run_of_tracker(own)) == ("mlflow", None)
    continue_run(own, "abc")
    write_below(own, "runs/a")  # MLflow has a place of its own
    assert run_of_tracker(own) == "abc"
