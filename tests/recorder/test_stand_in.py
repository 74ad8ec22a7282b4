"""After a death the profiler rests until Lightning has shut down the run."""

import signal

import pytest
from lightning.pytorch.profilers import SimpleProfiler

from esper_lightning.recorder.stand_in import own_profiler, stand_in


@pytest.mark.parametrize("fails", [False, True])
def test_the_profiler_is_restored_by_the_shutdown_even_one_that_fails(make_trainer, fails):
    profiler, returned = SimpleProfiler(), []
    trainer = make_trainer(profiler=profiler)
    teardown = trainer._teardown
    if fails:
        trainer._teardown = lambda: 1 / 0
        teardown = trainer._teardown
    stand_in(trainer, profiler, lambda: returned.append(trainer.profiler))
    with trainer.profiler.profile("after the death"):
        pass
    assert profiler.recorded_durations == {}
    if fails:
        with pytest.raises(ZeroDivisionError):
            trainer._teardown()
    else:
        trainer._teardown()
    assert returned == [profiler]
    assert trainer.profiler is profiler
    assert trainer._teardown == teardown


@pytest.mark.parametrize("fails", [False, True])
def test_the_handlers_that_lightning_replaced_are_restored_by_either(
    make_trainer, monkeypatch, fails
):
    def users_own(*_):
        pass

    trainer, before = make_trainer(), signal.getsignal(signal.SIGTERM)
    trainer._signal_connector._original_handlers = {signal.SIGTERM: users_own}
    if fails:  # as on a GPU after an assertion: weights cannot be moved to the host
        monkeypatch.setattr(trainer.strategy, "teardown", lambda: 1 / 0)
    stand_in(trainer, SimpleProfiler(), list)
    try:
        if fails:
            with pytest.raises(ZeroDivisionError):
                trainer._teardown()
        else:
            trainer._teardown()
        assert signal.getsignal(signal.SIGTERM) is users_own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_next_run_finds_the_users_own_profiler(make_trainer):
    profiler = SimpleProfiler()
    trainer = make_trainer(profiler=profiler)
    assert own_profiler(trainer) is profiler
    stand_in(trainer, profiler, list)
    assert own_profiler(trainer) is trainer.profiler is profiler
