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
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch.utils.data import DataLoader, TensorDataset

from esper_lightning import (
    MLP,
    PPO,
    AtomicCheckpointIO,
    FlightRecorder,
    LastCheckpoint,
    PPOConfig,
    replay,
)
from esper_lightning.callbacks.loop_internals import finished_batches
from esper_lightning.envs import CartPole
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.remains import examine
from esper_lightning.forensics.replay import ReplayRecord, compared
from esper_lightning.replaying import ReplayPlan, plan_replay, replay_directory
from esper_lightning.training.checkpoint.kept import iteration_in, latest_state

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


class DiesInSetup(Callback):
    """Dies before the callbacks that follow it have begun."""

    def setup(self, trainer, pl_module, stage):
        raise RuntimeError("injected")


@pytest.mark.parametrize("directory", [None, "new"])
def test_a_death_in_setup_is_reproduced(trainer, tmp_path, directory):
    with pytest.raises(RuntimeError, match="injected"):
        trainer(DiesInSetup(), directory=tmp_path / "run").fit(ppo())
    given = None if directory is None else tmp_path / directory
    verdict = replay(trainer(DiesInSetup(), directory=given), ppo(), tmp_path / "run")
    assert (verdict.outcome, verdict.iteration) == ("reproduced", 0)
    assert ReplayRecord.read(given or tmp_path / "replay_of_run").run_dir == str(tmp_path / "run")


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


class Recipe(Regression):
    """A module as users have them: metrics of epochs and validations, and summed gradients.

    Args:
        kind: ``validates``, ``sums`` gradients of two batches, or steps ``two`` optimizers.
        logs: Whether the loss is logged.
    """

    def __init__(self, kind: str = "validates", *, logs: bool = True) -> None:
        super().__init__()
        self.logs, self.automatic_optimization = logs, kind != "two"

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        if self.logs:
            self.log("loss", loss, on_step=True, on_epoch=True)
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self):
        one = super().configure_optimizers()
        return one if self.automatic_optimization else [one, super().configure_optimizers()]


class DiesInBatch(Callback):
    """Dies at the end of a batch, counted over all epochs, or of a call of a counter of its own."""

    def __init__(self, at: int, *, counts: bool = False) -> None:
        self.at, self.counts, self.calls = at, counts, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.calls += 1
        if self.at == (self.calls if self.counts else finished_batches(trainer)):
            raise RuntimeError("injected")


def batches(*, shuffle: bool = False) -> DataLoader:
    data = TensorDataset(torch.arange(24.0).reshape(12, 2) / 24)
    return DataLoader(data, batch_size=2, shuffle=shuffle)


def die_and_replay(
    trainer, tmp_path, make, *callbacks, again=None, from_start=False, ckpt_path=None, **how
):
    """Let a run of a module die, and return the verdict on its replay."""
    data = {"train_dataloaders": batches(shuffle=how.pop("shuffle", False))}
    data["val_dataloaders"] = batches()
    how = {"max_epochs": 9, "max_steps": -1, "limit_val_batches": 1, **how}
    with pytest.raises(RuntimeError, match="injected"):
        trainer(*callbacks, directory=tmp_path / "run", **how).fit(make(), **data)
    again = callbacks if again is None else again
    how.pop("keeps_state", None)
    start = {"from_start": from_start, "ckpt_path": ckpt_path}
    return replay(trainer(*again, **how), make(), tmp_path / "run", **start, **data)


# Lightning's warning is what these tests are about.
MIDDLE = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")


@pytest.mark.parametrize("kind", ["validates", "sums", "two"])
def test_values_of_epochs_and_batches_without_a_step_are_no_difference(trainer, tmp_path, kind):
    how = {"accumulate_grad_batches": 2} if kind == "sums" else {}
    verdict = die_and_replay(
        trainer, tmp_path, functools.partial(Recipe, kind), DiesInBatch(10), **how
    )
    assert (verdict.outcome, verdict.iteration, verdict.rows) == ("reproduced", 10, 4)
    directory = tmp_path / "replay_of_run"
    assert any((directory / "rank0" / "trace").glob("crash-*"))  # the window lies on the batch
    before = torch.load(RunLayout(directory).before_fault, weights_only=True)
    assert iteration_in(before) == (8 if kind == "sums" else 9)  # after a step of the optimizer


def test_no_stored_state_has_summed_gradients_and_a_replay_starts_where_an_epoch_has_ended(
    trainer, tmp_path
):
    how = {"accumulate_grad_batches": 2, "keeps_state": True}
    verdict = die_and_replay(
        trainer, tmp_path, functools.partial(Recipe, "sums"), DiesInBatch(10), **how
    )
    assert latest_state(tmp_path / "run", before=10).iteration == 8
    record = ReplayRecord.read(tmp_path / "replay_of_run")
    assert (record.begins, record.lacks) == (6, None)
    assert (verdict.outcome, verdict.rows) == ("reproduced", 4)


@MIDDLE
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_start_that_does_not_restore_the_order_of_data_decides_nothing(
    trainer, tmp_path, shuffle
):
    """In the middle of an epoch a loader begins anew, and at its end it shuffles anew."""
    verdict = die_and_replay(
        trainer,
        tmp_path,
        functools.partial(Recipe, logs=False),
        DiesInBatch(10),
        again=(),
        shuffle=shuffle,
        keeps_state=not shuffle,
        ckpt_path=None if shuffle else RunLayout(tmp_path / "run").rank(0).states[0],
    )
    assert (verdict.outcome, verdict.rows) == ("undecided", 0)
    assert "does not restore the order of the data" in verdict.reason


def test_a_shuffled_order_that_was_seeded_is_replayed_from_the_beginning(
    trainer, tmp_path, monkeypatch
):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    make = lambda: torch.manual_seed(1) and Recipe()  # noqa: E731
    verdict = die_and_replay(trainer, tmp_path, make, DiesInBatch(10), shuffle=True)
    assert ReplayRecord.read(tmp_path / "replay_of_run").start is None
    assert (verdict.outcome, verdict.rows) == ("reproduced", 10)


class Drops(Recipe):
    """A module with random numbers, which no checkpoint of Lightning holds."""

    def training_step(self, batch, batch_idx):
        return super().training_step([torch.nn.functional.dropout(batch[0])], batch_idx)


@pytest.mark.parametrize(("from_start", "rows"), [(False, 0), (True, 10)])
def test_a_start_that_does_not_restore_random_numbers_decides_nothing(
    trainer, tmp_path, monkeypatch, from_start, rows
):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    make = lambda: torch.manual_seed(1) and Drops()  # noqa: E731
    verdict = die_and_replay(trainer, tmp_path, make, DiesInBatch(10), from_start=from_start)
    assert (verdict.outcome, verdict.rows) == ("reproduced" if rows else "undecided", rows)
    lacks = ReplayRecord.read(tmp_path / "replay_of_run").lacks
    assert lacks == (None if rows else "the random numbers of the run")


@pytest.mark.parametrize("from_start", [False, True])
def test_what_no_checkpoint_holds_is_replayed_from_the_beginning(trainer, tmp_path, from_start):
    verdict = die_and_replay(
        trainer,
        tmp_path,
        Recipe,
        DiesInBatch(10, counts=True),
        again=(DiesInBatch(10, counts=True),),
        from_start=from_start,
    )
    if from_start:
        assert (verdict.outcome, verdict.rows) == ("reproduced", 10)
        # Nothing in a row comes from an earlier validation.
        assert "val_loss" not in rows_of(tmp_path / "replay_of_run")[10]
    else:
        assert verdict.outcome == "did not happen again"
        assert "state that no checkpoint holds" in "\n".join(verdict.lines)
        assert verdict.lines[-1].endswith("from_start=True)")


def test_a_replay_has_no_limit_of_time(dead, trainer):
    """A replay may be slower than the run was."""
    limited = trainer(Dies(6), max_time={"seconds": 0})
    assert replay(limited, ppo(), dead).outcome == "reproduced"


class DiesIn(Callback):
    """Dies in a hook, once the iteration in which the time of the run is over has ended."""

    def __init__(self, hook: str) -> None:
        def die(trainer, pl_module):
            if trainer.global_step >= 3:
                raise RuntimeError("injected")

        setattr(self, hook, die)


class TimeIsOver(Timer):
    """``max_time``, which is over after the third iteration of the run and never in a replay."""

    def on_train_batch_end(self, trainer, *_):
        if self._duration is not None and trainer.global_step == 3:
            trainer.should_stop = True


@pytest.mark.parametrize(
    "hook", ["on_train_end", "on_fit_end", "on_validation_end", "on_train_epoch_end"]
)
def test_what_follows_the_end_of_the_time_is_replayed(trainer, tmp_path, hook):
    dies = DiesIn(hook)
    how = {"limit_val_batches": 1, "max_steps": -1}
    settings = {"iterations_per_epoch": 5, "eval_episodes": 2}
    with pytest.raises(RuntimeError, match="injected"):
        trainer(dies, TimeIsOver("00:01:00:00"), directory=tmp_path / "run", **how).fit(
            ppo(**settings)
        )
    verdict = replay(
        trainer(dies, TimeIsOver("00:01:00:00"), **how), ppo(**settings), tmp_path / "run"
    )
    assert (verdict.outcome, verdict.iteration, verdict.rows) == ("reproduced", 3, 3)


class DiesSaving(Callback):
    """Dies when the third checkpoint is saved."""

    saved = 0

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.saved += 1
        if self.saved == 3:
            raise RuntimeError("injected")


def test_a_replay_saves_no_checkpoint_that_the_run_has_not_saved(trainer, tmp_path):
    with pytest.raises(RuntimeError, match="injected"):
        trainer(DiesSaving(), directory=tmp_path / "run").fit(ppo())
    verdict = replay(trainer(DiesSaving()), ppo(), tmp_path / "run", from_start=True)
    assert (verdict.outcome, verdict.iteration, verdict.rows) == ("reproduced", 6, 6)
    assert not RunLayout(tmp_path / "replay_of_run").before_fault.exists()


class Stops(Callback):
    """Ends training after the first iteration."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True


def test_a_replay_that_ends_early_decides_nothing(dead, trainer):
    verdict = replay(trainer(Stops()), ppo(), dead)
    assert verdict.outcome == "undecided"
    assert "the replay ended after iteration 5, before iteration 6 was over." in verdict.lines[0]


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
