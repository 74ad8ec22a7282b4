"""A run with a remote address stores its evidence on a local disk, and copies it to there."""

import logging
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from esper_lightning import FlightRecorder, History, LastCheckpoint, train
from esper_lightning.callbacks.mirror import Mirror, place_of, require_writable
from esper_lightning.callbacks.run_directory import run_directory
from esper_lightning.cli.main import main
from esper_lightning.train import run_plugins
from tests.cli.test_lightning_cli import CARTPOLE, QUICK
from tests.recorder.test_flight_recorder import Plain, raise_at

pytestmark = pytest.mark.usefixtures("memory")


@pytest.fixture
def hangs(monkeypatch):
    """Make a method of the remote file system wait until the test lets it continue."""
    go_on = threading.Event()

    def hang(name):
        true = getattr(MemoryFileSystem, name)

        def held(*args, **kwargs):
            go_on.wait(60)
            return true(*args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, name, held)
        return go_on

    yield hang
    go_on.set()
    assert ended("run-mirror")
    assert ended("run-fetch")


def threads(name):
    return [thread for thread in threading.enumerate() if thread.name == name]


def ended(name):
    """Wait until no thread of that name is left."""
    for thread in threads(name):
        thread.join(30)
    return not threads(name)


def run(make_trainer, *callbacks, act=None, epochs=1, **settings):
    trainer = make_trainer(
        callbacks=list(callbacks), max_epochs=epochs, enable_checkpointing=True, **settings
    )
    trainer.fit(Plain(act), DataLoader(torch.ones(3, 4)))
    return trainer


def same(memory, folder, address):
    """Whether every closed file of a folder is at the address."""
    of_this_machine = ("owner.lock", "phases.ring", ".set_aside")
    files = [
        path for path in folder.rglob("*") if path.is_file() and path.name not in of_this_machine
    ]
    assert files
    return all(
        memory.cat_file(f"/{address}/{path.relative_to(folder)}") == path.read_bytes()
        for path in files
    )


@pytest.mark.parametrize(
    ("location", "folder", "address"),
    [
        ("here/run", "here/run", None),
        ("memory://a/b", "runs/memory/a/b", "memory://a/b"),
        (Path("s3://bucket/runs"), "runs/s3/bucket/runs", "s3://bucket/runs"),
        ("gs://a/../b/c/", "runs/gs/a/b/c", "gs://a/../b/c"),
        ("memory:", "memory:", None),
    ],
)
def test_a_location_is_a_folder_or_an_address_with_one(tmp_path, location, folder, address):
    assert place_of(location) == (tmp_path / folder, address)


def test_a_run_directory_below_the_home_folder_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert place_of("~/runs/a") == (tmp_path / "home" / "runs" / "a", None)


def test_an_address_that_nobody_knows_is_no_folder():
    with pytest.raises(ValueError, match="protocol that fsspec knows, got 'nothing://a'"):
        place_of("nothing://a")


def test_a_name_that_is_no_utf8_is_refused_in_one_line():
    with pytest.raises(ValueError, match="must have a name in UTF-8, got 'runs/caf") as refused:
        place_of("runs/caf\udce9")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("protocol", ["http", "https", "zip", "github", "simplecache", "data"])
def test_an_address_that_is_never_written_to_is_refused(protocol):
    with pytest.raises(ValueError, match=f"that can be written to, got '{protocol}://a/b'"):
        place_of(f"{protocol}://a/b")
    with pytest.raises(ValueError, match=f"Some.path must be .* written to, got '{protocol}:"):
        require_writable("Some.path", f"{protocol}://a/b")


def test_a_place_for_which_a_package_is_missing_is_refused():
    with pytest.raises(ValueError, match=r"must be a place that this machine can reach, got 'tos"):
        require_writable("Some.path", "tos://bucket")


def test_an_address_that_cannot_be_reached_now_is_no_error():
    assert place_of("ftp://127.0.0.1:1/x")[1] == "ftp://127.0.0.1:1/x"
    require_writable("Some.path", "ftp://127.0.0.1:1/x")


def test_a_protocol_of_a_class_that_the_user_registered(tmp_path, monkeypatch):
    monkeypatch.setitem(_registry, "ours", MemoryFileSystem)  # and back again
    assert place_of("ours://a/b") == (tmp_path / "runs" / "ours" / "a" / "b", "ours://a/b")


def test_an_address_of_the_local_disk_is_a_path():
    assert place_of("file:///a/b") == (Path("/a/b"), None)


def test_evidence_is_local_and_at_the_address_too(make_trainer, memory, tmp_path, caplog):
    recorder = FlightRecorder("memory://bucket/run", watch=False)
    with caplog.at_level(logging.WARNING):
        run(make_trainer, recorder, LastCheckpoint(), plugins=run_plugins())
    folder = tmp_path / "runs" / "memory" / "bucket" / "run"
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert same(memory, folder, "bucket/run")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    told = [record.getMessage() for record in caplog.records if "copied" in record.getMessage()]
    assert told == [
        f"The run writes into {folder}, which is copied to memory://bucket/run "
        "at checkpoints and at the end."
    ]


def test_a_run_that_died_is_at_the_address(make_trainer, memory, tmp_path):
    with pytest.raises(RuntimeError, match="injected"):
        run(make_trainer, FlightRecorder("memory://b/run", watch=False), act=raise_at(1))
    assert memory.exists("/b/run/rank0/crash.json")
    assert same(memory, tmp_path / "runs" / "memory" / "b" / "run", "b/run")


def test_a_checkpoint_is_at_the_address_while_the_run_goes_on(make_trainer, memory):
    class Looks(Callback):
        seen = False

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1:
                end = time.monotonic() + 30
                while not self.seen and time.monotonic() < end:
                    self.seen = memory.exists("/b/run/checkpoints/last.ckpt")
                    time.sleep(0.01)

    looks = Looks()
    recorder = FlightRecorder("memory://b/run", watch=False)
    run(make_trainer, recorder, looks, LastCheckpoint(), epochs=2, plugins=run_plugins())
    assert looks.seen


@pytest.mark.parametrize("where", ["logger", "root", "history"])
def test_wherever_the_address_was_given(make_trainer, memory, tmp_path, where):
    callbacks = [History("memory://b/run")] if where == "history" else [FlightRecorder(watch=False)]
    settings = {}
    if where == "logger":
        settings["logger"] = TensorBoardLogger("memory://b", name="n", version="run")
    if where == "root":
        settings["default_root_dir"] = "memory://b/run"
    trainer = run(make_trainer, *callbacks, LastCheckpoint(), **settings, plugins=run_plugins())
    parts = ("b", "n", "run") if where == "logger" else ("b", "run")
    assert run_directory(trainer) == tmp_path.joinpath("runs", "memory", *parts)
    assert memory.exists(f"/{'/'.join(parts)}/rank0/history.jsonl")
    assert not (tmp_path / "memory:").exists()


def test_the_table_of_a_csv_logger_is_at_its_address(make_trainer, memory, tmp_path):
    logger = CSVLogger("memory://table", name="n", version="run", flush_logs_every_n_steps=1)
    trainer = run(make_trainer, FlightRecorder(watch=False), logger=logger)
    assert run_directory(trainer) == tmp_path / "runs" / "memory" / "table" / "n" / "run"
    assert memory.cat_file("/table/n/run/metrics.csv").startswith(b"epoch,loss")
    assert not [path for path in memory.store if "memory:" in path]


def test_a_place_that_takes_nothing_is_a_warning(make_trainer, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    run(make_trainer, FlightRecorder("memory://b/run", watch=False))
    assert "no credentials" in caplog.text


def test_a_place_that_hangs_is_waited_for_so_long(tmp_path, hangs, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("x")
    hangs("put_file")
    began = time.monotonic()
    assert not Mirror(tmp_path / "run", "memory://b", rank=0).copy(seconds=0.2)
    assert time.monotonic() - began < 3
    assert "has not ended within 0.2 s" in caplog.text


def test_one_copy_at_a_time_and_one_more_for_all_that_became_due(tmp_path, memory, hangs):
    (tmp_path / "run").mkdir()
    mirror = Mirror(tmp_path / "run", "memory://b", rank=0)
    (tmp_path / "run" / "first").write_text("x")
    go_on = hangs("put_file")
    for number in range(20):
        (tmp_path / "run" / f"later{number}").write_text("x")
        mirror.copy_soon()
    assert len(threads("run-mirror")) == 1
    go_on.set()
    assert ended("run-mirror")
    assert len(memory.find("/b")) == 21
    (tmp_path / "run" / "last").write_text("x")
    assert mirror.copy(seconds=30)
    assert memory.exists("/b/last")


def test_a_place_that_refuses_is_told_of_once_until_it_works_again(
    tmp_path, memory, monkeypatch, caplog
):
    def refuse(*args, **kwargs):
        raise RuntimeError("no credentials")

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("x")
    mirror = Mirror(tmp_path / "run", "memory://b", rank=0)
    for times in (1, 2):
        with monkeypatch.context() as patches:
            patches.setattr(MemoryFileSystem, "put_file", refuse)
            assert not any(mirror.copy(seconds=30) for _ in range(3))
        assert caplog.text.count("no credentials") == times
        assert mirror.copy(seconds=30)
        (tmp_path / "run" / "file").write_text("changed")


@pytest.mark.parametrize("method", ["find", "get_file"])
def test_what_cannot_be_fetched_in_time_never_comes(tmp_path, memory, hangs, caplog, method):
    memory.pipe_file("/b/rank0/history.jsonl", b"{}")
    go_on = hangs(method)
    folder = tmp_path / "run"
    folder.mkdir()
    assert not Mirror(folder, "memory://b", rank=0).fetch(seconds=0.1)
    assert caplog.text.count("cannot be fetched: nothing came within 0.1 s") == 1
    go_on.set()
    assert ended("run-fetch")
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_what_arrives_slowly_is_waited_for(tmp_path, memory, monkeypatch):
    def slowly(there, source, target, **kwargs):
        with Path(target).open("wb", buffering=0) as file:
            for byte in there.cat_file(source):
                time.sleep(0.2)
                file.write(bytes([byte]))

    memory.pipe_file("/b/rank0/history.jsonl", b"12345678")
    monkeypatch.setattr(MemoryFileSystem, "get_file", slowly)
    (tmp_path / "run").mkdir()
    assert Mirror(tmp_path / "run", "memory://b", rank=0).fetch(seconds=0.8)
    assert (tmp_path / "run" / "rank0" / "history.jsonl").read_bytes() == b"12345678"


def test_a_file_that_comes_in_part_is_not_there(tmp_path, memory, monkeypatch, caplog):
    def torn(there, source, target, **kwargs):
        Path(target).write_bytes(b"1")
        raise ConnectionError("gone")

    memory.pipe_file("/b/last.ckpt", b"12345678")
    monkeypatch.setattr(MemoryFileSystem, "get_file", torn)
    (tmp_path / "run").mkdir()
    assert not Mirror(tmp_path / "run", "memory://b", rank=0).fetch(seconds=30)
    assert list((tmp_path / "run").iterdir()) == []
    assert caplog.text.count("ConnectionError('gone')") == 1


@pytest.mark.parametrize("problem", ["hangs", "refuses"])
def test_a_run_begins_although_its_address_cannot_be_read(
    memory, tmp_path, monkeypatch, hangs, caplog, problem
):
    class CredentialsError(Exception):
        pass

    def refuse(*args, **kwargs):
        raise CredentialsError("none")

    if problem == "hangs":
        hangs("find")
        monkeypatch.setattr(train, "_FETCH_S", 0.2)
    else:
        monkeypatch.setattr(MemoryFileSystem, "find", refuse)
    theirs = b'{"iteration": 7}'
    memory.pipe_file("/b/run/rank0/history.jsonl", theirs)
    settings = ["--run_dir", "memory://b/run", "--model.total_env_steps", "32"]
    for _ in range(2):  # the second finds the files of the first
        main(["fit", "--config", CARTPOLE, *QUICK, *settings])
    assert memory.cat_file("/b/run/rank0/history.jsonl") == theirs
    beside = [path for path in memory.store if re.search(r"/begun_\w+/rank0/history.jsonl$", path)]
    assert len(beside) == 1
    assert caplog.text.count("cannot be fetched") == 1
    assert (tmp_path / "runs" / "memory" / "b" / "run" / "rank0" / "history.jsonl").exists()


def test_each_rank_copies_its_folder_and_the_first_what_is_beside(tmp_path, memory):
    for name in ("rank0/a", "rank1/b", "checkpoints/c", "d", ".d.1.tmp", "rank0/phases.ring"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    Mirror(tmp_path / "run", "memory://r", rank=1).copy(seconds=30)
    assert sorted(memory.find("/r")) == ["/r/rank1/b"]
    Mirror(tmp_path / "run", "memory://r", rank=0).copy(seconds=30)
    assert sorted(memory.find("/r")) == ["/r/checkpoints/c", "/r/d", "/r/rank0/a", "/r/rank1/b"]


def test_a_file_that_is_written_anew_at_its_old_length_is_copied_again(tmp_path, memory):
    (tmp_path / "run").mkdir()
    mirror = Mirror(tmp_path / "run", "memory://b", rank=0)
    for second, text in enumerate(("old", "new")):
        (tmp_path / "run" / "last.ckpt").write_text(text)
        os.utime(tmp_path / "run" / "last.ckpt", (second, second))
        assert mirror.copy(seconds=30)
        assert memory.cat_file("/b/last.ckpt") == text.encode()


def test_a_run_goes_on_from_its_address_on_a_machine_that_has_nothing(memory, tmp_path, capsys):
    there = ["fit", "--config", CARTPOLE, *QUICK, "--run_dir", "memory://b/run"]
    main([*there, "--model.total_env_steps", "64"])
    shutil.rmtree(tmp_path / "runs")
    main([*there, "--model.total_env_steps", "96", "--ckpt_path", "last"])
    folder = tmp_path / "runs" / "memory" / "b" / "run"
    rows = (folder / "rank0" / "history.jsonl").read_text().splitlines()
    assert len(rows) == 3
    assert same(memory, folder, "b/run")
    assert capsys.readouterr().out.endswith("Run directory: runs/memory/b/run\n")
