"""A callback that monitors a metric finds it, or a run says early that it will not."""

import logging
import re

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint

from esper_lightning import MLP, PPO, PPOConfig
from esper_lightning.callbacks.checkpoints import BestCheckpoint
from esper_lightning.envs import CartPole
from esper_lightning.ppo.metrics import EVALUATION_METRICS
from esper_lightning.ppo.random_distillation import RND
from esper_lightning.training.monitors import refuse_monitors
from esper_lightning.training.progress import ROW_METRICS

pytestmark = pytest.mark.filterwarnings("ignore:.*could not find the monitored key")


class Module(PPO):
    """A user's module, which may log what it likes."""


class Logs(Callback):
    """Logs a metric of its own in one hook."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, module, *_: module.log("mine", 1.0))


def module(kind=PPO, **settings):
    ppo = PPOConfig(rollout_steps=4, minibatches=1, epochs=1)
    defaults = {"total_env_steps": 4 * 4 * 6, "iterations_per_epoch": 2, "eval_episodes": 2}
    policy = MLP(hidden_sizes=(4,))
    return kind(CartPole(num_envs=4), policy, ppo, **{**defaults, **settings})


def patient(monitor, **settings):
    return EarlyStopping(monitor, patience=1000, check_finite=False, **settings)


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.endswith("training.monitors")]


def test_the_known_metrics_are_those_of_every_history_row(make_trainer):
    rows = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rows.append(outputs["row"])

        def on_validation_end(self, trainer, pl_module):
            rows.append({k: v for k, v in trainer.callback_metrics.items() if "eval" in k})

    make_trainer(callbacks=[Looks()], limit_val_batches=1).fit(module())
    assert set(rows[0]) == set(ROW_METRICS)
    assert set(rows[2]) == set(EVALUATION_METRICS)


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (patient("loss"), "EarlyStopping.monitor must be a metric of this run, got 'loss'. The"),
        (patient("loss/valu"), "got 'loss/valu'. The nearest are 'loss/value', 'loss/policy'."),
        (patient("nothing", strict=False), "got 'nothing'. Known are rollout/episode_return_mean,"),
        (ModelCheckpoint(monitor="x"), "ModelCheckpoint.monitor must be a metric of this run"),
        (BestCheckpoint("reward"), "BestCheckpoint.monitor must be a metric of this run"),
    ],
    ids=lambda value: str(value)[-40:] if isinstance(value, str) else "",
)
def test_a_metric_that_the_run_cannot_have_is_refused_at_once(make_trainer, callback, said):
    trainer = make_trainer(callbacks=[callback], enable_checkpointing=True, limit_val_batches=1)
    model = module()
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        trainer.fit(model)
    assert len(str(caught.value).splitlines()) == 1
    assert model.iteration == 0


def test_a_metric_of_evaluations_is_refused_where_nothing_is_evaluated(make_trainer):
    callbacks = [patient("eval/episode_return_mean")]
    said = r"Trainer\(limit_val_batches=0\). The nearest are 'rollout/episode_return_mean'"
    with pytest.raises(ValueError, match=said):
        make_trainer(callbacks=callbacks).fit(module())
    refuse_monitors(
        make_trainer(callbacks=callbacks, limit_val_batches=1), module().settings, logs_more=False
    )


@pytest.mark.parametrize("name", [*ROW_METRICS, "env/of_the_user", "epoch", "step"])
def test_a_metric_that_may_come_is_not_refused(make_trainer, name):
    trainer = make_trainer(callbacks=[ModelCheckpoint(monitor=name)], enable_checkpointing=True)
    refuse_monitors(trainer, module().settings, logs_more=False)


def test_names_of_extensions_are_not_refused(make_trainer):
    trainer = make_trainer(callbacks=[patient("loss/distillation")])
    refuse_monitors(trainer, module(extensions=(RND(),)).settings, logs_more=False)
    with pytest.raises(ValueError, match="got 'loss/distillation'"):
        refuse_monitors(trainer, module().settings, logs_more=False)


def test_checkpoints_that_save_nothing_monitor_nothing(make_trainer):
    idle = ModelCheckpoint(monitor="nothing", save_top_k=0)
    trainer = make_trainer(callbacks=[idle], enable_checkpointing=True)
    refuse_monitors(trainer, module().settings, logs_more=False)


@pytest.mark.parametrize(
    "hook",
    ["on_train_batch_end", "on_train_epoch_end", "on_validation_epoch_end", "on_train_epoch_start"],
)
def test_what_a_user_logs_is_found_without_a_word(make_trainer, caplog, hook):
    callbacks = [Logs(hook), patient("mine", check_on_train_epoch_end=True)]
    make_trainer(callbacks=callbacks, limit_val_batches=1).fit(module())
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("kind", ["callback", "lambda", "module"])
def test_a_user_may_log_anything_so_the_warning_waits_for_the_first_epoch(
    make_trainer, caplog, kind
):
    added = {"callback": [Logs("on_fit_start_")], "lambda": [LambdaCallback()], "module": []}[kind]
    model = module(Module if kind == "module" else PPO)
    said_at = []

    class Notes(logging.Handler):
        def emit(self, record):
            said_at.append(model.iteration)

    logger = logging.getLogger("esper_lightning.training.monitors")
    logger.addHandler(notes := Notes())
    try:
        make_trainer(callbacks=[*added, patient("loss/valeu", strict=False)]).fit(model)
    finally:
        logger.removeHandler(notes)
    assert said_at == [2, 6]
    first, last = warnings_of(caplog)
    assert first == (
        "EarlyStopping.monitor must be a metric, got 'loss/valeu', which nothing has logged so far."
        " The nearest are 'loss/value', 'loss/policy'."
    )
    assert last.startswith("EarlyStopping.monitor named 'loss/valeu', which nothing logged in the")


def test_an_environment_without_the_metric_is_told_of_after_the_first_iteration(
    make_trainer, caplog
):
    stop = patient("env/nothing", strict=False)
    make_trainer(callbacks=[stop], max_steps=1).fit(module())
    first, last = warnings_of(caplog)
    assert "got 'env/nothing', which nothing has logged so far" in first
    assert "in the whole run" in last


@pytest.mark.parametrize("sanity_checks", [0, 1])
def test_an_evaluation_that_never_came_is_told_of_at_the_end(make_trainer, caplog, sanity_checks):
    settings = {"limit_val_batches": 1, "check_val_every_n_epoch": 9}
    settings["num_sanity_val_steps"] = sanity_checks  # which are no evaluations
    make_trainer(callbacks=[patient("eval/episodes")], **settings).fit(module())
    (line,) = warnings_of(caplog)
    assert line == (
        "EarlyStopping.monitor named 'eval/episodes', which nothing logged in the whole run. "
        "Nothing was evaluated."
    )


def test_a_run_without_an_iteration_has_nothing_to_say(make_trainer, caplog):
    model = module()
    make_trainer().fit(model)
    make_trainer(callbacks=[patient("eval/episodes")], limit_val_batches=1).fit(model)
    assert model.iteration == 6
    assert warnings_of(caplog) == []
