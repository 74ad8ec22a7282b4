"""Playing a dead run again in the calling process, for PPO and for a module of another kind."""

import functools
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from esper_lightning import (
    MLP,
    PPO,
    AtomicCheckpointIO,
    FlightRecorder,
    LastCheckpoint,
    PPOConfig,
    replay,
    replaying,
)
from esper_lightning.envs import CartPole
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.remains import examine
from esper_lightning.forensics.replay import ReplayRecord, compared
from esper_lightning.replaying import ReplayPlan, plan_replay, replay_directory

PPO_CONFIG = PPOConfig(rollout_steps=4, minibatches=1, epochs=1)


class Dies(Callback):
    """Dies at the end of an iteration."""

    def __init__(self, at: int, error: Exception | None = None) -> None:
        self.at, self.error = at, error or RuntimeError("injected")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            raise self.error


class Regression(LightningModule):
    """A module whose data are in a fixed order, so that a checkpoint restores it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


def make_trainer_of(root: Path, *callbacks, directory=None, **how) -> Trainer:
    """A Trainer that records; the run directory is given, or that of a replay."""
    recorder = FlightRecorder(
        directory, watch=False, print_profile=False, keeps_state=how.pop("keeps_state", False)
    )
    settings = {"max_epochs": -1, "max_steps": 9, "log_every_n_steps": 1, "limit_val_batches": 0}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        callbacks=[*callbacks, recorder, LastCheckpoint()],
        plugins=[AtomicCheckpointIO()],
        accelerator="cpu",
        default_root_dir=root,
        **{**settings, **quiet, "num_sanity_val_steps": 0, **how},
    )


@pytest.fixture
def trainer(tmp_path, monkeypatch) -> Callable[..., Trainer]:
    plain = ReplayPlan.settings_of_profiler
    # Source lines take most of the time of a window.
    monkeypatch.setattr(
        ReplayPlan, "settings_of_profiler", lambda plan: plain(plan) | {"with_stack": False}
    )
    return functools.partial(make_trainer_of, tmp_path)


def ppo(**settings) -> PPO:
    own = {"env": CartPole(num_envs=4), "policy": MLP(hidden_sizes=(4,)), "ppo": PPO_CONFIG}
    return PPO(**{**own, "iterations_per_epoch": 2, "compile": "off", **settings})


@pytest.fixture(scope="module")
def died(tmp_path_factory) -> Path:
    """The directory of a run that died in iteration 6, and has a checkpoint of iteration 4."""
    root = tmp_path_factory.mktemp("died")
    with pytest.raises(RuntimeError, match="injected"):
        make_trainer_of(root, Dies(6), directory=root / "run").fit(ppo())
    return root / "run"


@pytest.fixture
def dead(died, tmp_path) -> Path:
    return shutil.copytree(died, tmp_path / "run")


def rows_of(directory: Path) -> dict[int, dict[str, str]]:
    rows = read_json_lines(RunLayout(directory).rank(0).history)
    return {row["iteration"]: compared(row) for row in rows}


def test_a_death_is_reproduced_from_the_latest_checkpoint(dead, trainer):
    kept = {path: path.read_bytes() for path in dead.rglob("*") if path.is_file()}
    verdict = replay(trainer(Dies(6)), ppo(), dead)
    assert (verdict.outcome, verdict.iteration, verdict.rows) == ("reproduced", 6, 2)
    assert verdict.lines[0].startswith("Reproduced: iteration 6, rank 0: RuntimeError: injected at")
    again = replay_directory(dead).with_name("replay_of_run")
    assert rows_of(again) == {k: row for k, row in rows_of(dead).items() if k > 4}
    assert {path: path.read_bytes() for path in dead.rglob("*") if path.is_file()} == kept
    before = torch.load(RunLayout(again).before_fault, weights_only=True)
    assert before["esper_lightning"]["iteration"] == 5
    assert plan_replay(dead).start == RunLayout(again).before_fault
    assert any((again / "rank0" / "trace").iterdir())


def test_a_run_directory_may_have_a_name_that_is_a_pattern(tmp_path, monkeypatch):
    before = RunLayout(tmp_path / "replay_of_lr[0.1]").before_fault
    before.parent.mkdir(parents=True)
    before.touch()
    monkeypatch.setattr(replaying, "_went_alike", lambda *_: True)
    assert list(replaying._candidates(tmp_path / "lr[0.1]", (), None)) == [before]


def test_before_ckpt_is_one_iteration_before_the_fault_also_in_the_next_replay(dead, trainer):
    replay(trainer(Dies(6)), ppo(), dead)
    verdict = replay(trainer(Dies(6)), ppo(), dead, deep=True)
    assert verdict.outcome == "reproduced"
    record = ReplayRecord.read(dead.with_name("replay_of_run_2"))
    assert (record.begins, record.deep) == (5, True)
    assert RunLayout(dead.with_name("replay_of_run_2")).before_fault.exists()


def test_a_cause_outside_of_the_program_does_not_happen_again(dead, trainer):
    verdict = replay(trainer(), ppo(), dead)
    assert (verdict.outcome, verdict.iteration, verdict.rows) == ("did not happen again", 6, 2)
    assert rows_of(dead.with_name("replay_of_run")).keys() == {5, 6}  # and no iteration more


@pytest.mark.parametrize(
    ("callback", "outcome", "said"),
    [
        (Dies(6, ValueError("injected")), "different", "ValueError: injected at"),
        (Dies(5), "different", "iteration 5, rank 0: RuntimeError: injected"),
    ],
)
def test_another_death_is_another_verdict(dead, trainer, callback, outcome, said):
    verdict = replay(trainer(callback), ppo(), dead)
    assert verdict.outcome == outcome
    assert said in verdict.lines[0]


def test_rows_are_compared_as_they_come_and_conditions_are_named(
    dead, trainer, caplog, monkeypatch
):
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    with caplog.at_level(logging.WARNING):
        verdict = replay(
            trainer(Dies(6)),
            ppo(ppo=PPOConfig(rollout_steps=4, minibatches=1, epochs=1, learning_rate=0.1)),
            dead,
        )
    assert (verdict.outcome, verdict.iteration) == ("different", 5)
    assert "it died in the same way all the same" in verdict.reason
    assert verdict.conditions == ("OMP_DYNAMIC not set -> true",)
    found = [r for r in caplog.records if "Different from iteration 5 on" in r.getMessage()]
    assert len(found) == 1


def test_a_death_before_the_first_checkpoint_is_replayed_from_the_beginning(trainer, tmp_path):
    with pytest.raises(RuntimeError, match="injected"):
        trainer(Dies(2), directory=tmp_path / "run").fit(ppo(iterations_per_epoch=5))
    verdict = replay(trainer(Dies(2)), ppo(iterations_per_epoch=5), tmp_path / "run")
    assert (verdict.outcome, verdict.rows) == ("reproduced", 2)


def test_with_stored_states_a_death_is_one_iteration_away(trainer, tmp_path):
    with pytest.raises(RuntimeError, match="injected"):
        trainer(Dies(4), directory=tmp_path / "run", keeps_state=True).fit(ppo())
    verdict = replay(trainer(Dies(4)), ppo(), tmp_path / "run")
    assert (verdict.outcome, verdict.rows) == ("reproduced", 1)
    assert RunLayout(tmp_path / "replay_of_run").before_fault.exists()


def test_a_module_of_another_kind_is_replayed_too(trainer, tmp_path):
    data = DataLoader(torch.arange(24.0).reshape(12, 2), batch_size=4)
    how = {"max_epochs": 9, "max_steps": -1}
    with pytest.raises(RuntimeError, match="injected"):
        trainer(Dies(8), directory=tmp_path / "run", **how).fit(Regression(), data)
    verdict = replay(
        trainer(Dies(8), **how), Regression(), tmp_path / "run", train_dataloaders=data
    )
    assert (verdict.outcome, verdict.iteration, verdict.rows) == ("reproduced", 8, 2)
    assert ReplayRecord.read(tmp_path / "replay_of_run").begins == 6


def test_a_replay_that_went_differently_is_no_start_of_the_next(dead, trainer):
    other = PPOConfig(rollout_steps=4, minibatches=1, epochs=1, learning_rate=0.1)
    assert replay(trainer(Dies(6)), ppo(ppo=other), dead).outcome == "different"
    assert RunLayout(dead.with_name("replay_of_run")).before_fault.exists()
    assert plan_replay(dead).start == RunLayout(dead).last_checkpoint


def store(dead: Path, path: Path, *, has_envs: bool = True, age_s: float = 0.0) -> Path:
    """A file with the state after iteration 5 of a run, older than the run if it has an age."""
    checkpoint = torch.load(RunLayout(dead).last_checkpoint, weights_only=True)
    own = checkpoint["esper_lightning"]
    rank = own["ranks"][0] if has_envs else own["ranks"][0] | {"env": None}
    torch.save(
        checkpoint | {"esper_lightning": own | {"iteration": 5, "ranks": {0: rank}}},
        path,
    )
    if age_s:
        began_s = examine(dead)[0].started_s
        os.utime(path, (began_s - age_s, began_s - age_s))
    return path


def test_a_stored_state_without_environments_is_no_start(dead):
    state = RunLayout(dead).rank(0).states[0]
    store(dead, state)
    assert plan_replay(dead).begins == 5
    store(dead, state, has_envs=False)
    assert plan_replay(dead).start == RunLayout(dead).last_checkpoint


def test_what_an_earlier_run_in_the_directory_has_left_is_no_start(dead):
    users = store(dead, RunLayout(dead).checkpoints / "epoch=5.ckpt")
    assert plan_replay(dead).start == users
    store(dead, users, age_s=9.0)
    store(dead, RunLayout(dead).rank(0).states[0], age_s=9.0)
    assert plan_replay(dead).start == RunLayout(dead).last_checkpoint


def test_a_run_that_was_resumed_is_replayed_from_its_start(dead, trainer, tmp_path):
    start = RunLayout(dead).last_checkpoint
    with pytest.raises(RuntimeError, match="injected"):
        trainer(Dies(5), directory=tmp_path / "later").fit(
            ppo(), ckpt_path=start, weights_only=True
        )
    verdict = replay(trainer(Dies(5)), ppo(), tmp_path / "later")
    assert (verdict.outcome, verdict.rows) == ("reproduced", 1)
    assert ReplayRecord.read(tmp_path / "replay_of_later").start == str(start)
    shutil.rmtree(tmp_path / "replay_of_later")
    # A best.ckpt that a resumed run has copied is that of an iteration before its first.
    RunLayout(tmp_path / "later").checkpoints.mkdir(exist_ok=True)
    older = store(dead, RunLayout(tmp_path / "later").best_checkpoint)
    checkpoint = torch.load(older, weights_only=True)
    checkpoint["esper_lightning"]["iteration"] = 3
    torch.save(checkpoint, older)
    os.utime(start)
    for _ in "changed", "gone":
        with pytest.raises(ValueError, match=r"The start of the run must be as it was .* got '"):
            plan_replay(tmp_path / "later")
        start.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["cartpole", "terminated"])
def test_what_did_not_die_is_refused(name, trainer, tmp_path):
    runs = Path(__file__).parent / "fixtures/runs"
    if name == "cartpole":
        with pytest.raises(ValueError, match="RUN_DIR must hold a run that died, got"):
            plan_replay(runs / name)
    else:
        assert plan_replay(runs / name).start is None


def test_checkpoints_of_a_replay_replace_none_of_the_user(dead, trainer, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "last.ckpt").write_text("newer")
    callbacks = Dies(6), ModelCheckpoint(mine, save_last=True)
    assert replay(trainer(*callbacks), ppo(), dead).outcome == "reproduced"
    assert [path.read_text() for path in mine.iterdir()] == ["newer"]


@pytest.mark.parametrize("content", [{"iteration": "5"}, [5], {"ranks": {0: 5}}])
def test_a_checkpoint_with_wrong_content_is_not_used(dead, content, caplog):
    path = RunLayout(dead).checkpoints / "wrong.ckpt"
    checkpoint = torch.load(RunLayout(dead).last_checkpoint, weights_only=True)
    own = checkpoint["esper_lightning"]
    wrong = own | content if isinstance(content, dict) else content
    torch.save(checkpoint | {"esper_lightning": wrong}, path)
    assert plan_replay(dead).start == RunLayout(dead).last_checkpoint
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(ValueError, match="ckpt_path must name a checkpoint of a run, got"):
        plan_replay(dead, ckpt_path=path)


def test_a_replay_never_writes_where_the_evidence_is(dead, trainer):
    with pytest.raises(
        ValueError, match="dirpath of a callback must name a new or empty directory"
    ):
        replay(trainer(Dies(6), directory=dead), ppo(), dead)
    with pytest.raises(ValueError, match="ckpt_path must name an existing checkpoint"):
        plan_replay(dead, ckpt_path=dead / "config.yaml")


def test_a_leading_tilde_is_the_home_folder(dead, trainer, monkeypatch):
    monkeypatch.setenv("HOME", str(dead.parent))
    (dead.parent / "wrong.ckpt").write_text("")
    with pytest.raises(ValueError, match=re.escape(str(dead.parent / "wrong.ckpt"))):
        replay(trainer(), ppo(), f"~/{dead.name}", ckpt_path="~/wrong.ckpt")
