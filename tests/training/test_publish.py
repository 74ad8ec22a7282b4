"""A history row reaches callbacks, bars and loggers."""

import math
from types import SimpleNamespace

import pytest

from esper_lightning.training.publish import publish

ROW = {"iteration": 4, "env_steps": 80, "loss/value": 0.5, "rollout/episode_return_mean": None}


class Logger:
    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step):
        self.logged.append((metrics, step))


def trainer(interval=1, loggers=2):
    return SimpleNamespace(
        callback_metrics={},
        progress_bar_metrics={},
        log_every_n_steps=interval,
        loggers=[Logger() for _ in range(loggers)],
    )


def test_callbacks_get_nan_for_what_is_not_known_and_loggers_do_not_get_it():
    here = trainer()
    publish(here, ROW)
    assert math.isnan(here.callback_metrics["rollout/episode_return_mean"])
    assert here.callback_metrics["loss/value"] == 0.5
    assert "rollout/episode_return_mean" not in here.progress_bar_metrics
    for logger in here.loggers:
        (metrics, step), *more = logger.logged
        assert (step, more) == (80, [])
        assert metrics == {name: value for name, value in ROW.items() if value is not None}


@pytest.mark.parametrize(("interval", "count"), [(1, 1), (2, 1), (4, 1), (3, 0), (0, 0)])
def test_loggers_get_rows_at_the_interval_of_the_trainer_alone(interval, count):
    here = trainer(interval)
    publish(here, ROW)
    assert [len(logger.logged) for logger in here.loggers] == [count, count]
    assert here.callback_metrics["iteration"] == 4


def test_a_logger_may_change_what_it_got_without_changing_what_others_get():
    here = trainer()
    here.loggers[0].log_metrics = lambda metrics, step: metrics.clear()
    publish(here, ROW)
    assert here.loggers[1].logged[0][0]["loss/value"] == 0.5
