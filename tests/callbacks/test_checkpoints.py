"""``best.ckpt`` is the best policy, ``last.ckpt`` the state of training."""

import json
import math
import shutil
import types

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from esper_lightning import PPO, PPOConfig
from esper_lightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from esper_lightning.callbacks.history import History
from esper_lightning.callbacks.run_directory import (
    WritesRun,
    close_run_directory,
    open_run_directory,
)
from esper_lightning.envs import CartPole
from esper_lightning.ppo.learner import Learner
from esper_lightning.ppo.metrics import EVAL_RETURN
from esper_lightning.training import evaluation

EPOCH = 2  # iterations


@pytest.fixture
def fit(make_trainer, tmp_path, monkeypatch):
    """Train for as many epochs as there are scores, which the evaluations return."""

    def run(scores, name="run", ckpt_path=None, callbacks=(), **trainer):
        left = iter(scores)
        true = evaluation.evaluation_metrics
        monkeypatch.setattr(
            evaluation,
            "evaluation_metrics",
            lambda *arguments: true(*arguments) | {EVAL_RETURN: next(left)},
        )
        epochs = len(scores) + (0 if ckpt_path is None else iteration(ckpt_path) // EPOCH)
        ppo = PPOConfig(rollout_steps=4, minibatches=1, epochs=1)
        model = PPO(
            CartPole(num_envs=2),
            ppo=ppo,
            total_env_steps=8 * EPOCH * epochs,
            iterations_per_epoch=EPOCH,
            eval_episodes=2,
        )
        ours = [InDirectory(tmp_path / name), BestCheckpoint(EVAL_RETURN), LastCheckpoint()]
        settings = {"enable_checkpointing": True}
        settings |= {"limit_val_batches": 1, "callbacks": [*callbacks, *ours]}
        try:
            make_trainer(**{**settings, **trainer}).fit(model, ckpt_path=ckpt_path)
        finally:
            monkeypatch.undo()
        return model

    return run


class InDirectory(WritesRun):
    """A callback that names the run directory, and writes nothing."""

    def setup(self, trainer, pl_module, stage):
        open_run_directory(trainer, self)

    def teardown(self, trainer, pl_module, stage):
        close_run_directory(trainer, self)

    def on_exception(self, trainer, pl_module, exception):
        close_run_directory(trainer, self)


def iteration(path) -> int:
    return torch.load(path, weights_only=True)["esper_lightning"]["iteration"]


def names(directory):
    return sorted(path.name for path in directory.iterdir() if path.name != ".set_aside")


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([1.0, 3.0, 2.0], 2),
        ([3.0, 3.0, 2.0], 2),  # of equals the later
        ([math.nan, 1.0, 0.0], 2),
        ([2.0, math.nan, 1.0], 1),
        ([2.0, math.nan, 3.0], 3),
        ([math.inf, -5.0, -6.0], 2),
        ([-1.0, -2.0, -0.5], 3),
    ],
)
def test_which_is_the_best(fit, tmp_path, scores, best):
    fit(scores)
    assert iteration(tmp_path / "run" / "checkpoints" / "best.ckpt") == best * EPOCH
    assert iteration(tmp_path / "run" / "checkpoints" / "last.ckpt") == len(scores) * EPOCH
    assert names(tmp_path / "run" / "checkpoints") == ["best.ckpt", "last.ckpt"]


def test_no_number_is_no_best(fit, tmp_path):
    fit([math.nan, math.nan])
    assert names(tmp_path / "run" / "checkpoints") == ["last.ckpt"]


@pytest.mark.parametrize("limit", [{"max_steps": 5}, {"max_epochs": 2}])
def test_last_is_the_end_wherever_that_is(fit, tmp_path, limit):
    model = fit([3.0] * 9, **limit)
    assert model.iteration == limit.get("max_steps", 4)
    assert iteration(tmp_path / "run" / "checkpoints" / "last.ckpt") == model.iteration


def test_an_early_stop(fit, tmp_path):
    stop = EarlyStopping(monitor=EVAL_RETURN, mode="max", patience=2)
    model = fit([1.0, 9.0, 2.0, 2.0, 2.0, 2.0], callbacks=[stop])
    assert model.iteration == 4 * EPOCH
    assert iteration(tmp_path / "run" / "checkpoints" / "best.ckpt") == 2 * EPOCH
    assert iteration(tmp_path / "run" / "checkpoints" / "last.ckpt") == 4 * EPOCH


def test_the_best_is_there_as_soon_as_its_evaluation_is_over(fit, tmp_path, monkeypatch):
    def dies(*_):
        raise RuntimeError("injected")

    monkeypatch.setattr(PPO, "on_train_epoch_end", dies)
    with pytest.raises(RuntimeError, match="injected"):
        fit([1.0, 2.0])
    assert names(tmp_path / "run" / "checkpoints") == ["best.ckpt"]


@pytest.mark.parametrize("place", ["run", "another"])
@pytest.mark.parametrize(("score", "best"), [(4.0, 2), (5.0, 4), (6.0, 4)])
def test_a_resumed_run_goes_on_comparing(fit, tmp_path, place, score, best):
    fit([1.0, 5.0, 2.0])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fit([score], name=place, ckpt_path=last)
    assert iteration(tmp_path / place / "checkpoints" / "best.ckpt") == best * EPOCH
    assert iteration(tmp_path / place / "checkpoints" / "last.ckpt") == 4 * EPOCH
    assert names(tmp_path / place / "checkpoints") == ["best.ckpt", "last.ckpt"]
    third = tmp_path / place / "checkpoints" / "last.ckpt"
    fit([max(score, 5.0) - 0.5], name="third", ckpt_path=third)
    assert iteration(tmp_path / "third" / "checkpoints" / "best.ckpt") == best * EPOCH


def test_a_run_directory_may_be_moved(fit, tmp_path):
    fit([5.0, 2.0])
    shutil.move(tmp_path / "run", tmp_path / "archive")
    fit([4.0], name="another", ckpt_path=tmp_path / "archive" / "checkpoints" / "last.ckpt")
    assert iteration(tmp_path / "another" / "checkpoints" / "best.ckpt") == 1 * EPOCH


def test_a_best_that_is_gone_is_no_hindrance(fit, tmp_path, caplog):
    fit([5.0, 2.0])
    (tmp_path / "run" / "checkpoints" / "best.ckpt").unlink()
    fit([4.0], name="another", ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert "search for the best checkpoint begins anew" in caplog.text
    assert iteration(tmp_path / "another" / "checkpoints" / "best.ckpt") == 3 * EPOCH


def test_training_goes_on_from_the_best_as_it_did(fit, tmp_path):
    whole = fit([1.0, 5.0, 2.0])
    again = fit([2.0], name="b", ckpt_path=tmp_path / "run" / "checkpoints" / "best.ckpt")
    for name, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_the_checkpoint_of_another_run_is_renamed(fit, tmp_path):
    fit([9.0])
    fit([1.0, 0.0])
    assert names(tmp_path / "run" / "checkpoints") == [
        "best.ckpt",
        "best.ckpt.1",
        "last.ckpt",
        "last.ckpt.1",
    ]
    assert iteration(tmp_path / "run" / "checkpoints" / "best.ckpt") == EPOCH
    fit([2.0], name="c")
    fit([0.5], name="c", ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt")
    best = torch.load(tmp_path / "c" / "checkpoints" / "best.ckpt", weights_only=True)
    states = [state for name, state in best["callbacks"].items() if "BestCheckpoint" in name]
    assert [state["best_model_score"] for state in states] == [1.0]
    assert "best.ckpt.1" in names(tmp_path / "c" / "checkpoints")


def test_a_refused_start_keeps_all_that_another_run_has_in_the_directory(
    fit, tmp_path, monkeypatch
):
    fit([9.0])
    fit([1.0], name="b")
    rows = [{"iteration": number} for number in (1, 2, 3)]
    history = tmp_path / "b" / "rank0" / "history.jsonl"
    history.parent.mkdir()
    history.write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    before = {path: path.read_bytes() for path in (history, last)}

    def refuse(*_):
        raise ValueError("The environments do not fit.")

    monkeypatch.setattr(Learner, "start", refuse)
    with pytest.raises(ValueError, match="do not fit"):
        fit(
            [2.0],
            name="b",
            ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt",
            callbacks=[History(tmp_path / "b")],
        )
    assert {path: path.read_bytes() for path in before} == before


def test_a_second_fit_of_one_trainer_keeps_what_it_wrote(make_trainer, tmp_path):
    ppo = PPOConfig(rollout_steps=4, minibatches=1, epochs=1)
    model = PPO(CartPole(num_envs=2), ppo=ppo, iterations_per_epoch=EPOCH, eval_episodes=2)
    trainer = make_trainer(
        max_epochs=1,
        limit_val_batches=1,
        enable_checkpointing=True,
        callbacks=[BestCheckpoint(EVAL_RETURN), LastCheckpoint()],
    )
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert names(tmp_path / "checkpoints") == ["best.ckpt", "last.ckpt"]
    trainer.validate(model, ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False)
    assert names(tmp_path / "checkpoints") == ["best.ckpt", "last.ckpt"]


def test_a_moved_run_is_not_given_the_best_of_what_took_its_place(fit, tmp_path):
    fit([5.0, 4.0])
    (tmp_path / "run").rename(tmp_path / "old")
    fit([9.0])
    fit([4.5], name="old", ckpt_path=tmp_path / "old" / "checkpoints" / "last.ckpt")
    best = torch.load(tmp_path / "old" / "checkpoints" / "best.ckpt", weights_only=True)
    state = next(v for k, v in best["callbacks"].items() if k.startswith("BestCheckpoint"))
    assert state["best_model_score"] == 5.0


@pytest.mark.parametrize("way", ["another of its checkpoints", "a path with dots"])
def test_the_last_stays_until_there_is_a_newer_one(fit, tmp_path, way):
    fit([1.0, 2.0])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before, path = last.read_bytes(), tmp_path / "run" / "rank0" / "crash.ckpt"
    path.parent.mkdir()
    shutil.copy(last, path)
    if way == "a path with dots":
        path = tmp_path / "run" / ".." / "run" / "checkpoints" / "last.ckpt"
    seen = []

    class Looks(EarlyStopping):
        def on_train_batch_end(self, *_):
            seen.append(last.read_bytes() == before)

    fit([3.0], ckpt_path=path, callbacks=[Looks(EVAL_RETURN, mode="max", patience=9)])
    assert seen[0]
    assert iteration(last) == 3 * EPOCH
    assert names(last.parent) == ["best.ckpt", "last.ckpt"]


def test_whether_it_is_the_best_is_decided_together():
    """A rank that alone saves, or alone does not, would wait for the other ranks for ever."""
    asked = []

    def reduce(better):
        asked.append(better)
        return "as all have it"

    strategy = types.SimpleNamespace(reduce_boolean_decision=reduce)
    best, trainer = BestCheckpoint(EVAL_RETURN), types.SimpleNamespace(strategy=strategy)
    assert best.check_monitor_top_k(trainer, torch.tensor(1.0)) == "as all have it"
    assert best.check_monitor_top_k(trainer, None) == "as all have it"
    assert asked == [True, False]


def test_a_best_that_a_crash_checkpoint_is_not_beside_is_found(fit, tmp_path):
    fit([5.0, 2.0])
    rank = tmp_path / "run" / "rank0"
    rank.mkdir()
    shutil.copy(tmp_path / "run" / "checkpoints" / "last.ckpt", rank / "crash.ckpt")
    fit([4.0], name="another", ckpt_path=rank / "crash.ckpt")
    assert iteration(tmp_path / "another" / "checkpoints" / "best.ckpt") == 1 * EPOCH


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_an_evaluation_takes_no_checkpoint_along(fit, make_trainer, tmp_path):
    model = fit([5.0, 2.0])
    settings = {"enable_checkpointing": True, "default_root_dir": tmp_path / "elsewhere"}
    settings |= {"limit_val_batches": 1, "callbacks": [BestCheckpoint(EVAL_RETURN)]}
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    make_trainer(**settings).validate(model, ckpt_path=path, verbose=False, weights_only=True)
    assert not list((tmp_path / "elsewhere").rglob("*.ckpt"))
