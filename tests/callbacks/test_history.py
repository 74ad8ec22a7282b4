"""The history: complete, durable, never an iteration twice, for any LightningModule."""

import itertools
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils._python_dispatch import TorchDispatchMode

from esper_lightning import PPO, FlightRecorder, History, PPOConfig
from esper_lightning.envs import CartPole
from esper_lightning.forensics.files import JsonLines, read_json_lines
from tests import forked
from tests.disks import fill


def ppo(iterations=3, **settings) -> PPO:
    config = PPOConfig(rollout_steps=8, minibatches=2, epochs=1)
    budget = None if iterations is None else 32 * iterations
    return PPO(CartPole(num_envs=4), ppo=config, total_env_steps=budget, **settings)


def open_files():
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def iterations(path):
    return [row["iteration"] for row in read_json_lines(path)]


def test_a_row_for_each_iteration_in_the_run_directory(make_trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="name", version=7)
    make_trainer(logger=logger, callbacks=[History()]).fit(ppo())
    rows = read_json_lines(tmp_path / "name" / "version_7" / "rank0" / "history.jsonl")
    assert [row["env_steps"] for row in rows] == [32, 64, 96]
    assert rows[0]["rollout/episode_return_mean"] is None
    assert all(row["time_s"] > 0 and row["env_steps_per_s"] > 0 for row in rows)


@pytest.mark.parametrize("logger", ["csv", "none"])
def test_run_directory_of_other_loggers(make_trainer, tmp_path, logger):
    chosen = CSVLogger(tmp_path, name="a", version="b") if logger == "csv" else False
    make_trainer(logger=chosen, callbacks=[History()]).fit(ppo())
    directory = tmp_path / "a" / "b" if logger == "csv" else tmp_path
    assert iterations(directory / "rank0" / "history.jsonl") == [1, 2, 3]


def test_the_table_of_an_earlier_run_is_kept(make_trainer, tmp_path):
    for _ in range(2):
        logger = CSVLogger(tmp_path, name="a", version="b")
        make_trainer(logger=logger, callbacks=[History()]).fit(ppo())
    assert sorted(path.name for path in (tmp_path / "a" / "b").glob("metrics.csv*")) == [
        "metrics.csv",
        "metrics.csv.1",
    ]


def test_a_directory_of_its_own(make_trainer, tmp_path):
    history = History(tmp_path / "mine")
    make_trainer(callbacks=[history]).fit(ppo())
    assert history.path == tmp_path / "mine" / "rank0" / "history.jsonl"
    assert iterations(history.path) == [1, 2, 3]


def test_evaluations_have_a_file_of_their_own(make_trainer, tmp_path):
    model = ppo(iterations=4, iterations_per_epoch=2, eval_episodes=3)
    settings = {"limit_val_batches": 1.0, "num_sanity_val_steps": 1}
    make_trainer(callbacks=[History(tmp_path)], **settings).fit(model)
    rows = read_json_lines(tmp_path / "rank0" / "evaluations.jsonl")
    assert [(row["iteration"], row["env_steps"]) for row in rows] == [(2, 64), (4, 128)]
    assert all(row["eval/episodes"] == 3 for row in rows)


def test_a_second_run_in_the_same_directory_sets_the_first_aside(make_trainer, tmp_path):
    for _ in range(3):
        make_trainer(callbacks=[History(tmp_path)]).fit(ppo())
    assert sorted(path.name for path in (tmp_path / "rank0").iterdir()) == [
        ".set_aside",
        "evaluations.jsonl",
        "history.jsonl",
        "history.jsonl.1",
        "history.jsonl.2",
    ]
    assert iterations(tmp_path / "rank0" / "history.jsonl") == [1, 2, 3]


def test_a_resumed_run_goes_on_where_its_checkpoint_ended(make_trainer, tmp_path):
    first = make_trainer(callbacks=[History(tmp_path)])
    first.fit(ppo(iterations=2))
    first.save_checkpoint(tmp_path / "2.ckpt")
    # The run went on for an iteration and a half after the checkpoint, and died.
    path = tmp_path / "rank0" / "history.jsonl"
    with path.open("a") as file:
        file.write('{"iteration":3}\n{"iterat')
    resumed = make_trainer(callbacks=[History(tmp_path)])
    resumed.fit(ppo(iterations=4), ckpt_path=tmp_path / "2.ckpt", weights_only=True)
    assert iterations(path) == [1, 2, 3, 4]
    assert "loss/value" in read_json_lines(path)[2]
    assert iterations(path.with_name("history.jsonl.1")) == [3]


def test_a_second_fit_of_the_same_module_loses_no_row(make_trainer, tmp_path):
    model = ppo(iterations=None)
    make_trainer(callbacks=[History(tmp_path)], max_steps=2).fit(model)
    second = make_trainer(callbacks=[History(tmp_path)], max_steps=3)
    second.fit(model)
    second.save_checkpoint(tmp_path / "5.ckpt")
    resumed = ppo(iterations=7)
    trainer = make_trainer(callbacks=[History(tmp_path)])
    trainer.fit(resumed, ckpt_path=tmp_path / "5.ckpt", weights_only=True)
    assert iterations(tmp_path / "rank0" / "history.jsonl") == [1, 2, 3, 4, 5, 6, 7]


def test_files_are_closed_when_training_fails(make_trainer, tmp_path, monkeypatch):
    model = ppo()
    monkeypatch.setattr("esper_lightning.training.module.publish", lambda *_: 1 / 0)
    before = open_files()
    trainer = make_trainer(callbacks=[History(tmp_path)])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model)
    trainer.callbacks[0].teardown(trainer, model, "fit")  # which Lightning leaves out
    assert open_files() == before


class Plain(LightningModule):
    """An ordinary supervised module."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_any_lightning_module(make_trainer, tmp_path):
    batches = torch.utils.data.DataLoader(torch.ones(6, 2), batch_size=2)
    make_trainer(callbacks=[History(tmp_path)], max_epochs=2).fit(Plain(), batches)
    rows = read_json_lines(tmp_path / "rank0" / "history.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["loss"] >= 0 for row in rows[1:])


@pytest.mark.parametrize("row", [torch.ones(2), {"x": torch.ones(2)}, {1: 2}], ids=str)
def test_a_row_that_is_no_row_is_left_alone(make_trainer, tmp_path, row):
    class Own(Plain):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "row": row}

    batches = torch.utils.data.DataLoader(torch.ones(6, 2), batch_size=2)
    make_trainer(callbacks=[History(tmp_path)], max_epochs=1).fit(Own(), batches)
    rows = read_json_lines(tmp_path / "rank0" / "history.jsonl")
    assert [list(row) for row in rows] == [["iteration", "loss"]] * 3


@pytest.mark.parametrize("until", [4, 99])
def test_a_full_disk_ends_no_training_and_loses_nothing_in_silence(
    make_trainer, tmp_path, monkeypatch, caplog, until
):
    write, calls = JsonLines.append, itertools.count(1)

    def append(file, row):
        if 2 <= next(calls) < until:
            raise OSError("No space left on device")
        write(file, row)

    monkeypatch.setattr(JsonLines, "append", append)
    trainer = make_trainer(callbacks=[History(tmp_path)])
    trainer.fit(ppo(iterations=6))
    assert trainer.global_step > 0
    recovered = until == 4
    found = iterations(tmp_path / "rank0" / "history.jsonl")
    assert found == ([1, 2, 3, 4, 5, 6] if recovered else [1])
    assert caplog.text.count("takes no rows: No space left on device") == 1
    assert ("takes rows again" in caplog.text) == recovered
    assert ("5 rows are lost" in caplog.text) == (not recovered)


def test_resuming_time_and_again_keeps_each_dropped_row_once_and_few_files(make_trainer, tmp_path):
    first = make_trainer(callbacks=[History(tmp_path)])
    first.fit(ppo(iterations=20))
    path = tmp_path / "rank0" / "history.jsonl"

    def resume():
        history, module = History(tmp_path), SimpleNamespace(iteration=20, counts_iterations=True)
        trainer = make_trainer(callbacks=[history])
        history.setup(trainer, module, "fit")
        history.on_train_batch_start(trainer, module, 0, 0)
        history.teardown(trainer, module, "fit")

    for number in range(1, 31):
        resume()
        with path.open("a") as file:
            file.write(f'{{"iteration":21,"attempt":{number}}}\n')
    resume()
    assert iterations(path) == list(range(1, 21))
    kept = sorted(path.parent.glob("history.jsonl.*"), key=lambda p: int(p.suffix[1:]))
    assert [read_json_lines(p) for p in kept] == [
        [{"iteration": 21, "attempt": number}] for number in range(21, 31)
    ]


def test_resuming_on_a_full_disk_leaves_nothing_new_and_loses_no_row(
    make_trainer, small_disk, caplog
):
    def trainer():
        return make_trainer(callbacks=[History(small_disk)])

    trainer().fit(ppo(iterations=5))
    path = small_disk / "rank0" / "history.jsonl"
    content = path.read_bytes()
    fill(small_disk)
    resumed = ppo(iterations=5)
    resumed.progress.iteration, resumed.progress.env_steps = 2, 64  # as a checkpoint would have it
    second = trainer()
    second.fit(resumed)
    assert path.read_bytes() == content
    assert {p.name for p in path.parent.iterdir()} == {"history.jsonl", "evaluations.jsonl"}
    assert caplog.text.count("takes no rows") == 1


def test_rows_of_a_run_resumed_on_a_full_disk_are_written_when_there_is_room(
    make_trainer, small_disk
):
    def trainer(*callbacks):
        return make_trainer(callbacks=[History(small_disk), *callbacks])

    trainer().fit(ppo(iterations=5))
    path = small_disk / "rank0" / "history.jsonl"
    ballast = fill(small_disk)
    resumed = ppo(iterations=8)
    resumed.progress.iteration, resumed.progress.env_steps = 2, 64

    class MakesRoom(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.iteration == 6:
                ballast.unlink()

    trainer(MakesRoom()).fit(resumed)
    assert iterations(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert iterations(path.with_name("history.jsonl.1")) == [3, 4, 5]


def test_a_damaged_history_is_renamed(make_trainer, tmp_path, caplog):
    path = tmp_path / "rank0" / "history.jsonl"
    path.parent.mkdir()
    (tmp_path / "owner.lock").touch()
    path.write_text('{"iteration":1}\nnonsense\n{"iteration":2}\n')
    make_trainer(callbacks=[History(tmp_path)]).fit(ppo())
    assert iterations(path) == [1, 2, 3]
    assert "nonsense" in path.with_name("history.jsonl.1").read_text()
    assert "is renamed" in caplog.text


@pytest.mark.parametrize("number", ["null", '"2"', "[1]", '"NaN"', "1e999", "true", "-2", "1.5"])
def test_rows_without_a_number_are_moved_with_those_that_are_repeated(tmp_path, caplog, number):
    path = tmp_path / "rank0" / "history.jsonl"
    path.parent.mkdir()
    damaged = f'{{"iteration":{number},"x":[1e999]}}'
    rows = ['{"iteration":1}', damaged, '{"a":1}', '{"iteration":3}']
    path.write_text("\n".join(rows) + "\n")
    module = SimpleNamespace(iteration=2, counts_iterations=True)
    history, trainer = History(), SimpleNamespace(global_rank=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esper_lightning.callbacks.history.run_directory", lambda _: tmp_path)
        history.on_train_batch_start(trainer, module, 0, 0)
    history.on_train_start(trainer, module)
    assert path.read_text() == rows[0] + "\n"
    moved = path.with_name("history.jsonl.1").read_text().splitlines()
    assert len(moved) == 3
    assert moved[1:] == rows[2:]
    assert "2 rows have no number of an iteration, and are moved to history.jsonl.1" in caplog.text


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from lightning.pytorch import Callback, Trainer
from esper_lightning import PPO, FlightRecorder, History, PPOConfig
from esper_lightning.envs import CartPole

class Tell(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        print(pl_module.iteration, flush=True)

config = PPOConfig(rollout_steps=4, minibatches=1, epochs=1)
model = PPO(CartPole(num_envs=4), ppo=config)
Trainer(accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        default_root_dir=sys.argv[1], callbacks=[History(), Tell()]).fit(model)
"""


@pytest.mark.crash
def test_sigkill_loses_no_finished_iteration(tmp_path):
    reads, writes = os.pipe()
    with (tmp_path / "stderr").open("wb") as stderr:
        process = forked.start(["-c", SCRIPT, tmp_path], output=(writes, stderr))
    os.close(writes)
    with open(reads) as stdout:  # noqa: PTH123
        try:
            begun = 0
            deadline = time.monotonic() + 120
            while begun < 25 and time.monotonic() < deadline:
                begun = int(stdout.readline())
        finally:
            process.kill()
        rest = stdout.read().split()
    finished = max([begun, *map(int, rest)])  # iteration n begins when n are finished
    found = iterations(tmp_path / "rank0" / "history.jsonl")
    assert found == list(range(1, len(found) + 1))
    assert finished <= len(found) <= finished + 1
    for line in (tmp_path / "rank0" / "history.jsonl").read_text().splitlines():
        json.loads(line)


def test_metrics_are_fetched_in_one_copy(make_trainer, tmp_path, monkeypatch):
    """Each ``float`` of a tensor on a device would wait for the device."""

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    class Logging(LightningModule):
        layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            self.log_dict({f"m{i}": torch.tensor(i / 2) for i in range(8)})
            self.log("count", torch.tensor([batch_idx], dtype=torch.float64))
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), 1e-3)

    append, waits = History.on_train_batch_end, Waits()

    def counted(*args):
        with waits:
            append(*args)

    monkeypatch.setattr(History, "on_train_batch_end", counted)
    data = torch.utils.data.DataLoader(torch.ones(3, 2))
    make_trainer(max_epochs=1, callbacks=[History(tmp_path)]).fit(Logging(), data)
    assert waits.count == 0
    row = read_json_lines(tmp_path / "rank0" / "history.jsonl")[-1]
    assert row == {"iteration": 3, **{f"m{i}": i / 2 for i in range(8)}, "count": 2.0}


@pytest.mark.parametrize("moves", [True, False], ids=["moved", "deleted"])
def test_a_directory_that_disappears_under_a_run_is_told_of_once(
    make_trainer, tmp_path, caplog, moves
):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    class Disappears(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.iteration == 2 and run.exists():
                run.rename(elsewhere) if moves else shutil.rmtree(run)

    make_trainer(callbacks=[History(run), Disappears()]).fit(ppo(6, iterations_per_epoch=2))
    told = [r.getMessage() for r in caplog.records if "moved or deleted" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith(f"{run / 'rank0' / 'history.jsonl'} was moved or deleted during")
    if moves:
        assert iterations(elsewhere / "rank0" / "history.jsonl") == [1, 2, 3, 4, 5, 6]


def test_a_directory_that_stays_is_not_told_of(make_trainer, tmp_path, caplog):
    make_trainer(callbacks=[History(tmp_path / "run")]).fit(ppo(4, iterations_per_epoch=2))
    assert "moved or deleted" not in caplog.text


class Raises(Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            raise self.error


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_a_finished_iteration_has_its_row_whatever_another_callback_raises(
    make_trainer, tmp_path, error, recorded
):
    recorder = [FlightRecorder(tmp_path, watch=False)] if recorded else []
    trainer = make_trainer(callbacks=[Raises(error), *recorder, History(tmp_path)])
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        trainer.fit(ppo(iterations=6))
    assert iterations(tmp_path / "rank0" / "history.jsonl") == [1, 2, 3]
    if recorded:
        assert isinstance(trainer.callbacks[0], FlightRecorder)


class Countdown(BoringModel):
    """A module whose ``iteration`` is no count of its steps."""

    iteration = 0

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) | {"row": {"iteration": 7, "x": 1.0}}


def test_an_iteration_of_another_meaning_cuts_no_history(make_trainer, tmp_path):
    for epochs in (2, 3):
        trainer = make_trainer(
            callbacks=[History(tmp_path)], max_epochs=epochs, limit_train_batches=2
        )
        resumed = tmp_path / "x.ckpt" if epochs == 3 else None
        trainer.fit(Countdown(), ckpt_path=resumed, weights_only=True)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert iterations(tmp_path / "rank0" / "history.jsonl") == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "rank0" / "history.jsonl.1").exists()
