"""Where a run writes, on every rank."""

from types import SimpleNamespace

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from esper_lightning.callbacks.run_directory import agree_on_run_directory, run_directory


def trainer(*loggers, **others):
    defaults = {"fast_dev_run": False, "default_root_dir": "root", "world_size": 1}
    return SimpleNamespace(loggers=list(loggers), **{**defaults, **others})


def test_a_fast_dev_run_has_none(tmp_path):
    assert run_directory(trainer(CSVLogger(tmp_path), fast_dev_run=1)) is None
    assert run_directory(trainer(fast_dev_run=1)) is None


def test_every_rank_writes_where_the_first_one_does(tmp_path):
    for logger in (CSVLogger(tmp_path, name="a"), TensorBoardLogger(tmp_path, name="a")):
        strategy = SimpleNamespace(broadcast=lambda version: 7)
        agree_on_run_directory(trainer(logger, world_size=2, strategy=strategy))
        assert run_directory(trainer(logger)) == tmp_path / "a" / "version_7"
