"""Loggers with a folder for each run get the folder of the run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from esper_lightning.callbacks.held_directory import HeldDirectory
from esper_lightning.callbacks.logger_folders import (
    announced_directory,
    begin_files,
    numbered_logger,
    remove_events,
    take_next_number,
    write_into,
)
from esper_lightning.forensics.claims import claim, claim_for_logger

KINDS = [TensorBoardLogger, CSVLogger]
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_the_first_logger_with_a_folder_is_found_among_others(kind, tmp_path):
    logger = kind(tmp_path)
    other = SimpleNamespace(save_dir=tmp_path / "other")
    trainer = SimpleNamespace(loggers=[other, logger], default_root_dir=tmp_path)
    assert numbered_logger(trainer) is logger
    assert announced_directory(trainer) == tmp_path / "other"
    trainer.loggers = []
    assert numbered_logger(trainer) is None
    assert announced_directory(trainer) == tmp_path


@each_kind
def test_a_logger_beside_the_run_gets_its_number_and_another_keeps_its_own(kind, tmp_path):
    beside, elsewhere = kind(tmp_path, name="a"), kind(tmp_path, name="b")
    named = kind(tmp_path, name="a", version="mine")
    for logger in (beside, elsewhere, named):
        write_into(logger, tmp_path / "a" / "version_7")
    assert beside.version == 7
    assert elsewhere.version == 0
    assert named.version == "mine"


@each_kind
def test_the_next_number_is_one_that_no_folder_has(kind, tmp_path):
    logger = kind(tmp_path, name="a")
    assert logger.version == 0
    _ = logger.experiment
    for taken in (0, 1, 2):
        (tmp_path / "a" / f"version_{taken}").mkdir(parents=True, exist_ok=True)
    take_next_number(logger)
    left = [path.name for path in (tmp_path / "a" / "version_0").iterdir()]
    assert not any(name.startswith("events.") for name in left)
    assert logger.version == 3
    assert (tmp_path / "a" / "version_3").is_dir()
    remove_events(logger)


def test_a_logger_beside_a_replay_writes_into_it(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="task")
    write_into(logger, tmp_path / "task" / "replay_of_version_0")
    assert logger.log_dir == str(tmp_path / "task" / "replay_of_version_0")


def test_the_events_of_a_logger_that_logged_nothing_are_removed(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="a")
    _ = logger.experiment
    assert list((tmp_path / "a" / "version_0").iterdir())
    remove_events(logger)
    assert not list((tmp_path / "a" / "version_0").iterdir())


def test_the_table_of_an_earlier_run_is_renamed_and_not_lost(tmp_path):
    directory = tmp_path / "a" / "version_0"
    directory.mkdir(parents=True)
    (directory / "metrics.csv").write_text("step\n1\n")
    logger = CSVLogger(tmp_path, name="a", version=0)
    elsewhere = HeldDirectory(tmp_path / "elsewhere", claim(tmp_path / "elsewhere"))
    begin_files(logger, elsewhere)
    assert (directory / "metrics.csv").exists()
    elsewhere.of_loggers.append(claim_for_logger(directory, []))
    begin_files(logger, elsewhere)
    (kept,) = directory.glob("metrics*.csv*")
    assert kept.read_text() == "step\n1\n"
    assert kept.name != "metrics.csv"
    kept.rename(directory / "metrics.csv")
    elsewhere.release()
    found = HeldDirectory(directory, claim(directory))
    begin_files(logger, found)
    (kept,) = directory.glob("metrics*.csv*")
    assert kept.name != "metrics.csv"
    found.release()


@each_kind
def test_hyperparameters_of_an_earlier_run_are_renamed(kind, tmp_path):
    directory = tmp_path / "a" / "version_0"
    for width in (1, 2):
        logger = kind(tmp_path, name="a", version=0)
        found = HeldDirectory(directory, claim(directory))
        begin_files(logger, found)
        logger.log_hyperparams({"width": width})
        logger.save()
        found.is_used = True
        found.release()
    assert yaml.safe_load((directory / "hparams.yaml").read_text()) == {"width": 2}
    assert yaml.safe_load((directory / "hparams.yaml.1").read_text()) == {"width": 1}


def test_hyperparameters_that_no_run_wrote_are_left_alone(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="a", version=0)
    directory = Path(logger.log_dir)
    directory.mkdir(parents=True)
    (directory / "hparams.yaml").write_text("mine: 1\n")
    found = HeldDirectory(tmp_path / "run", claim(tmp_path / "run"))
    found.of_loggers.append(claim_for_logger(directory, []))
    begin_files(logger, found)
    found.release()
    assert (directory / "hparams.yaml").read_text() == "mine: 1\n"
