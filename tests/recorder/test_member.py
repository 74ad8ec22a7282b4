"""A recording as the registry knows it: which signals are Lightning's, and when one unwinds."""

import signal
import threading
from types import SimpleNamespace

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from esper_lightning.recorder.member import Member


def recording(environment=None, world_size=1):
    connector = SimpleNamespace(cluster_environment=environment)
    trainer = SimpleNamespace(_accelerator_connector=connector, world_size=world_size)
    return SimpleNamespace(trainer=trainer)


@pytest.mark.parametrize(
    ("environment", "world_size", "expected"),
    [
        (SLURMEnvironment(auto_requeue=True), 1, {signal.SIGUSR1, signal.SIGTERM}),
        (SLURMEnvironment(auto_requeue=True), 2, {signal.SIGUSR1}),
        (SLURMEnvironment(requeue_signal=signal.SIGUSR2), 2, {signal.SIGUSR2}),
        (SLURMEnvironment(auto_requeue=False), 1, set()),
        (LightningEnvironment(), 1, set()),
        (None, 1, set()),
    ],
)
def test_lightning_keeps_the_signals_by_which_slurm_requeues(environment, world_size, expected):
    assert Member(recording(environment, world_size)).left_to_lightning == expected


@pytest.mark.parametrize(
    ("ended", "by_signal", "expected"),
    [(False, False, True), (True, False, False), (True, True, True)],
)
def test_a_signal_unwinds_a_run_of_the_main_thread_that_lives_or_dies_of_one(
    ended, by_signal, expected
):
    member = Member(recording())
    member.ended, member.ended_by_signal = ended, by_signal
    assert member.unwinds == expected


def test_a_signal_never_unwinds_a_run_of_another_thread():
    made = []
    thread = threading.Thread(target=lambda: made.append(Member(recording())))
    thread.start()
    thread.join()
    assert not made[0].unwinds
    assert made[0].thread != threading.get_ident()
