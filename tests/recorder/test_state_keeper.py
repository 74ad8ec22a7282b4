"""The state after an iteration is on disk, whole, and costs what it may cost."""

import contextlib
import itertools
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from esper_lightning import MLP, PPO, FlightRecorder, PPOConfig
from esper_lightning.envs import CartPole
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.replay import compared
from esper_lightning.recorder.state_keeper import MOST_SHARE, StateKeeper
from esper_lightning.training.checkpoint.kept import latest_state


class Watches(Callback):
    """Notes what is stored before each iteration; dies at the end of iteration ``dies_at``."""

    def __init__(self, directory, dies_at=None, step_s=0.0):
        self.directory, self.dies_at, self.step_s = directory, dies_at, step_s
        self.stored: list[int | None] = []
        self.began_s: list[float] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.began_s.append(time.perf_counter())
        found = latest_state(self.directory)
        self.stored.append(None if found is None else found.iteration)
        time.sleep(self.step_s)

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.dies_at:
            raise RuntimeError("injected")


def ppo(**settings) -> PPO:
    config = PPOConfig(rollout_steps=4, minibatches=1, epochs=1)
    own = {"env": CartPole(num_envs=4), "policy": MLP(hidden_sizes=(4,)), "ppo": config}
    return PPO(**{**own, "iterations_per_epoch": 2, "compile": "off", **settings})


@pytest.fixture
def fit(make_trainer, tmp_path):
    def fit(module, watches, *, keeps_state=None, ckpt_path=None, **how):
        recorder = FlightRecorder(watches.directory, watch=False, keeps_state=keeps_state)
        trainer = make_trainer(callbacks=[watches, recorder], **{"max_steps": 6, **how})
        trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return fit


def test_the_state_after_each_iteration_is_on_disk_and_removed_at_the_end(fit, tmp_path):
    watches = Watches(tmp_path / "run")
    fit(ppo(), watches, keeps_state=True)
    assert watches.stored == [None, 1, 2, 3, 4, 5]
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_a_run_goes_on_from_the_stored_state_bit_for_bit(fit, tmp_path):
    whole = ppo()
    fit(whole, Watches(tmp_path / "whole"))
    directory = tmp_path / "run"
    with pytest.raises(RuntimeError, match="injected"):
        fit(ppo(), Watches(directory, dies_at=5), keeps_state=True)
    found = latest_state(directory)
    assert found.iteration == 4  # the callback died before the state after 5 was stored
    assert latest_state(directory, before=4).iteration == 3
    torch.save(found.checkpoint, tmp_path / "state.ckpt")
    again = ppo()
    fit(again, Watches(tmp_path / "again"), ckpt_path=tmp_path / "state.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    rows = [
        {row["iteration"]: compared(row) for row in read_json_lines(RunLayout(d).rank(0).history)}
        for d in (tmp_path / "whole", tmp_path / "again")
    ]
    assert rows[1] == {k: row for k, row in rows[0].items() if k > 4}


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning")
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("make", [ppo, BoringModel])
@pytest.mark.parametrize("attempts", [1, 2])
def test_last_goes_on_from_the_state_with_the_trainer_of_lightning(fit, tmp_path, make, attempts):
    directory, how = tmp_path / "run", {"max_steps": 6, "limit_train_batches": 8, "max_epochs": 3}
    with pytest.raises(RuntimeError, match="injected"):
        fit(make(), Watches(directory, dies_at=4), keeps_state=True, **how)
    if attempts == 2:  # which dies before it has stored a state of its own
        with pytest.raises(RuntimeError, match="injected"):
            fit(make(), Watches(directory, dies_at=4), keeps_state=True, ckpt_path="last", **how)
    watches = Watches(directory)
    trainer = fit(make(), watches, keeps_state=True, ckpt_path="last", **how)
    assert watches.stored[0] == 3
    assert trainer.global_step == 6
    rows = read_json_lines(RunLayout(directory).rank(0).history)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    fit(make(), watches, keeps_state=True, ckpt_path=None, **how)  # a new run is a new run
    assert watches.stored[-6:-4] == [None, 1]


class AfterIteration(Checkpoint):
    """Notes the iterations that a hook follows, and dies at the first or second one."""

    def __init__(self, hook, dies_at):
        self.seen: list[int] = []
        self.hook, self.dies_at = hook, dies_at
        setattr(self, hook, self.note)

    def note(self, trainer, module):
        if trainer.sanity_checking:
            return
        self.seen.append(module.iteration)
        if len(self.seen) == self.dies_at:
            raise RuntimeError("injected")


@pytest.mark.parametrize("dies_at", [2, 3])
@pytest.mark.parametrize("hook", ["on_validation_start", "on_train_epoch_end"])
def test_what_follows_an_iteration_is_not_skipped_by_a_run_that_goes_on(
    make_trainer, tmp_path, hook, dies_at
):
    directory, evaluates = tmp_path / "run", int(hook == "on_validation_start")
    budget = 6 * 4 * 4
    for dies in (dies_at, None):
        after = AfterIteration(hook, dies)
        recorder = FlightRecorder(directory, watch=False, keeps_state=True)
        how = {"enable_checkpointing": True, "limit_val_batches": evaluates}
        trainer = make_trainer(callbacks=[after, recorder], **how)
        found = latest_state(directory)
        path = None
        if found is not None:
            path = tmp_path / "state.ckpt"
            torch.save(found.checkpoint, path)
        model = ppo(eval_episodes=1, total_env_steps=budget)
        with pytest.raises(RuntimeError, match="injected") if dies else contextlib.nullcontext():
            trainer.fit(model, ckpt_path=path, weights_only=True)
    assert after.seen == [4, 6][dies_at - 2 :]


def test_storing_takes_at_most_its_share_of_the_time(fit, tmp_path, monkeypatch):
    store, took_s = StateKeeper._store, 10.0  # so long that one is enough, on a busy machine too

    def slow(keeper, trainer, module):
        store(keeper, trainer, module)
        keeper._took_s[-1] = took_s

    monkeypatch.setattr(StateKeeper, "_store", slow)
    watches = Watches(tmp_path / "run", step_s=0.01)
    trainer = fit(ppo(iterations_per_epoch=100), watches, max_steps=12)
    keeper = next(each for each in trainer.callbacks if isinstance(each, StateKeeper))
    each_s = [end - begin for begin, end in itertools.pairwise(watches.began_s)]
    least, most = (took_s / each / MOST_SHARE for each in (max(each_s), min(each_s)))
    assert least <= keeper.every <= most + 1
    assert watches.stored[-1] == 4  # until it was known what a state costs


def test_a_disk_that_takes_no_state_ends_no_run(fit, tmp_path, monkeypatch, caplog):
    def refuse(keeper, slot, content):
        raise OSError("no space")

    monkeypatch.setattr(StateKeeper, "_write", refuse)
    fit(ppo(), Watches(tmp_path / "run"), keeps_state=True)
    said = [r.getMessage() for r in caplog.records if "not stored any more" in r.getMessage()]
    assert said == ["The state after an iteration is not stored any more: OSError: no space."]


def test_a_rank_that_cannot_store_still_decides_with_the_others(fit, tmp_path, monkeypatch):
    def refuse(keeper, slot, content):
        raise OSError("no space")

    decided, decide = [], StateKeeper._decide

    def noted(keeper, trainer):
        decide(keeper, trainer)
        decided.append((keeper._count, keeper._is_off))

    monkeypatch.setattr(StateKeeper, "_write", refuse)
    monkeypatch.setattr(StateKeeper, "_decide", noted)
    fit(ppo(iterations_per_epoch=10), Watches(tmp_path / "run"), max_steps=9)
    assert decided == [(4, True)]  # the first decision of all ranks, and then none


def test_a_folder_that_keeps_its_states_ends_no_run(fit, tmp_path, monkeypatch, caplog):
    plain = Path.unlink

    def refuse(path, missing_ok=False):
        if path.name.startswith("state."):
            raise PermissionError(13, "denied", str(path))
        plain(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    fit(ppo(), Watches(tmp_path / "run"), keeps_state=True, max_steps=2)
    said = [r.getMessage() for r in caplog.records if "are not removed" in r.getMessage()]
    assert len(said) == 1
    assert "PermissionError" in said[0]


@pytest.mark.parametrize(("keeps_state", "stored"), [(None, False), (False, False), (True, True)])
def test_states_of_other_modules_are_stored_only_where_that_is_asked_for(
    fit, tmp_path, keeps_state, stored
):
    watches = Watches(tmp_path / "run")
    fit(BoringModel(), watches, keeps_state=keeps_state, limit_train_batches=3, max_epochs=1)
    assert (watches.stored[-1] == 2) == stored


class Saves(Callback):
    """Counts the calls of its hook."""

    calls = 0

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.calls += 1


@pytest.mark.parametrize("keeps_state", [None, True])
def test_hooks_of_users_are_called_for_states_only_where_states_are_asked_for(
    make_trainer, tmp_path, keeps_state
):
    saves = Saves()
    recorder = FlightRecorder(tmp_path / "run", watch=False, keeps_state=keeps_state)
    make_trainer(callbacks=[saves, recorder], max_steps=4).fit(ppo(iterations_per_epoch=10))
    assert (saves.calls > 0) == bool(keeps_state)


def test_a_new_run_in_the_directory_removes_the_states_of_the_one_before(fit, tmp_path):
    directory = tmp_path / "run"
    with pytest.raises(RuntimeError, match="injected"):
        fit(ppo(), Watches(directory, dies_at=5), keeps_state=True)
    watches = Watches(directory)
    fit(ppo(), watches, keeps_state=True)
    assert watches.stored[0] is None
