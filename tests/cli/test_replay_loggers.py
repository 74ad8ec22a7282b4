"""A replay has the run's loggers, in its own directory and offline, or says which it lacks."""

import sys

import pytest
from lightning.pytorch.loggers import CSVLogger

from esper_lightning.cli.replay_loggers import replace_loggers

CSV, BOARD = "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"
WANDB = "lightning.pytorch.loggers.WandbLogger"
OWN = f"{__name__}.Media"


class Media(CSVLogger):
    """A logger of a user's, with a method that callbacks call."""

    def log_media(self, name, value):
        pass


def logger(path, **arguments):
    return {"class_path": path, "init_args": arguments}


@pytest.mark.parametrize("path", [CSV, BOARD, OWN])
def test_a_logger_writes_into_the_directory_of_the_replay(tmp_path, path):
    trainer = {"logger": logger(path, save_dir="lg", name="../x", version="v1", prefix="p")}
    assert replace_loggers(trainer, tmp_path) == []
    assert trainer["logger"] == logger(
        path, save_dir=str(tmp_path / "loggers" / "0"), name="", version="", prefix="p"
    )


def test_a_logger_of_a_service_is_offline_and_begins_a_run_of_its_own(tmp_path):
    arguments = {"save_dir": ".", "offline": False, "id": "a1", "project": "p", "log_model": True}
    trainer = {"logger": [logger(WANDB, **arguments)]}
    replace_loggers(trainer, tmp_path)
    (kept,) = trainer["logger"]
    own = {"offline": True, "id": None, "log_model": False}
    assert kept["init_args"] == arguments | own | {"save_dir": str(tmp_path / "loggers" / "0")}


@pytest.mark.parametrize(
    "other",
    [
        logger("lightning.pytorch.loggers.CometLogger", workspace="w"),
        logger("not_there.Logger", save_dir="x"),
        logger(OWN, place="x"),
    ],
)
def test_a_logger_that_is_replaced_is_named(tmp_path, other):
    trainer = {"logger": other}
    (remark,) = replace_loggers(trainer, tmp_path)
    assert remark.startswith(f"Without the run's {other['class_path']}:")
    assert trainer["logger"] is None
    trainer = {"logger": [other, logger(CSV, save_dir="lg")]}
    assert len(replace_loggers(trainer, tmp_path)) == 1
    assert [each["class_path"] for each in trainer["logger"]] == [CSV]


@pytest.mark.parametrize("given", [None, True, False])
def test_a_run_with_lightnings_logger_or_none_stays_so(tmp_path, given):
    trainer = {"logger": given}
    assert replace_loggers(trainer, tmp_path) == []
    assert trainer == {"logger": given}


@pytest.mark.parametrize(("given", "is_own"), [(logger(CSV, save_dir="lg"), True), (None, False)])
def test_what_is_written_into_the_root_of_the_run_is_not_written_there_again(
    tmp_path, given, is_own
):
    trainer = {"logger": given, "default_root_dir": "dr"}
    replace_loggers(trainer, tmp_path)
    assert trainer["default_root_dir"] == (str(tmp_path) if is_own else None)


def test_a_logger_is_found_where_the_run_was_started(tmp_path):
    name = "loggers_of_a_run_that_died"
    (tmp_path / f"{name}.py").write_text(
        "from lightning.pytorch.loggers import CSVLogger\nclass Own(CSVLogger): pass\n"
    )
    before = list(sys.path)
    trainer = {"logger": logger(f"{name}.Own", save_dir="lg")}
    try:
        assert replace_loggers(trainer, tmp_path, found_in=[str(tmp_path)]) == []
    finally:
        sys.modules.pop(name, None)
    assert sys.path == before
