"""A remote address belongs to one run: files of others there are never replaced."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from esper_lightning import FlightRecorder
from esper_lightning.callbacks.address_claims import new_claims, read_claims
from esper_lightning.callbacks.mirror import Mirror
from esper_lightning.callbacks.mirror import main as copy_of_the_dead
from esper_lightning.cli.main import main
from esper_lightning.forensics.claims import DirectoryInUseError, DirectoryRefusedError
from esper_lightning.forensics.layout import OF_A_RUN
from esper_lightning.forensics.processes import identify
from tests.cli.test_lightning_cli import CARTPOLE, QUICK
from tests.recorder.test_flight_recorder import Plain

pytestmark = pytest.mark.usefixtures("memory")


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(content)
    return path


def begun(folder: Path, *, fetch_s: float | None = 30.0) -> Mirror:
    mirror = Mirror(folder, "memory://b/run", rank=0)
    mirror.begin(fetch_s=fetch_s, written=OF_A_RUN)
    return mirror


def copied(mirror: Mirror) -> Mirror:
    assert mirror.copy(seconds=30)
    return mirror


@pytest.fixture
def living(memory, tmp_path):
    """Another process, whose run in ``living`` is copied to the address."""
    pid, folder = os.getppid(), folder_with(tmp_path / "living")
    (folder / "owner.lock").write_text(json.dumps({"pid": pid}))
    line = {**identify(pid).to_dict(), "claimed_s": 1.0, "token": "t", "directory": str(folder)}
    memory.pipe_file("/b/run/copies.jsonl", json.dumps(line).encode() + b"\n")
    memory.pipe_file("/b/run/config.yaml", b"theirs")
    return folder


def test_an_address_that_a_living_run_is_copied_to_is_refused(living, tmp_path):
    folder = folder_with(tmp_path / "mine")
    message = f"'memory://b/run', where process {os.getppid()} is running"
    with pytest.raises(DirectoryInUseError, match=message) as refused:
        begun(folder)
    assert "\n" not in str(refused.value)
    assert list(folder.iterdir()) == []


def test_an_address_is_free_when_the_run_of_a_living_process_has_ended(living, memory, tmp_path):
    (living / "owner.lock").write_text(json.dumps({"pid": None}))
    mine = copied(begun(folder_with(tmp_path / "mine")))
    assert mine.address == "memory://b/run"
    assert (tmp_path / "mine" / "config.yaml").read_text() == "theirs"  # it goes on from there
    assert len(memory.cat_file("/b/run/copies.jsonl").splitlines()) == 2


def test_files_that_no_run_wrote_are_refused_at_an_address_in_one_line(memory, tmp_path, capsys):
    theirs = {"/b/run/config.yaml": b"mine", "/b/run/checkpoints/last.ckpt": b"weights of mine"}
    for name, content in theirs.items():
        memory.pipe_file(name, content)
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", CARTPOLE, *QUICK, "--run_dir", "memory://b/run"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "'memory://b/run'" in line
    assert "checkpoints/last.ckpt and 1 more, which no run wrote" in line
    assert {name: memory.cat_file(name) for name in memory.find("/b")} == theirs
    assert not (tmp_path / "runs" / "memory" / "b" / "run").exists()


@pytest.mark.parametrize("name", ["trackers.json", "crash.zip", "metrics.csv", "checkpoints/x"])
def test_no_name_of_a_runs_files_is_taken_at_an_address(memory, tmp_path, name):
    memory.pipe_file(f"/b/run/{name}", b"mine")
    with pytest.raises(DirectoryRefusedError, match="which no run wrote"):
        begun(folder_with(tmp_path / "mine"))


def test_other_files_at_an_address_are_no_reason_to_refuse_it(memory, tmp_path):
    memory.pipe_file("/b/run/notes.txt", b"mine")
    assert begun(folder_with(tmp_path / "mine")).address == "memory://b/run"


def test_a_run_that_is_overtaken_at_its_address_is_copied_beside(memory, tmp_path, caplog):
    """Two hosts, of which none sees whether the other's process lives."""
    first = copied(begun(folder_with(tmp_path / "first", a="first")))
    second = begun(folder_with(tmp_path / "second"))
    folder_with(tmp_path / "second", a="second")
    for _ in range(2):
        (first.folder / "b").write_text("first")
        copied(first)
        copied(second)
    assert memory.cat_file("/b/run/a") == b"second"
    assert not memory.exists("/b/run/b")
    beside = first.address.removeprefix("memory:/")
    assert beside.startswith("/b/run/begun_")
    assert [memory.cat_file(f"{beside}/{name}") for name in "ab"] == [b"first"] * 2
    assert caplog.text.count("holds the files of another run") == 1
    third = begun(folder_with(tmp_path / "third"))
    assert not any(path.name.startswith("begun_") for path in third.folder.iterdir())
    again = begun(first.folder, fetch_s=None)
    assert again.address == first.address


def test_callbacks_that_were_given_an_address_replace_no_file_there(make_trainer, memory, caplog):
    memory.pipe_file("/b/run/config.yaml", b"mine")
    memory.pipe_file("/b/run/rank0/history.jsonl", b"mine")
    for _ in range(2):
        trainer = make_trainer(
            callbacks=[FlightRecorder("memory://b/run", watch=False)], max_epochs=1
        )
        trainer.fit(Plain(), DataLoader(torch.ones(3, 4)))
    assert memory.cat_file("/b/run/rank0/history.jsonl") == b"mine"
    places = {path.rpartition("/rank0/")[0] for path in memory.find("/b") if "process" in path}
    assert len(places) == 1  # the second run goes on where the first was copied to
    assert caplog.text.count("which this run did not write. Nothing there") == 1


def test_ranks_on_other_hosts_copy_to_where_the_first_does(memory, tmp_path):
    memory.pipe_file("/b/run/config.yaml", b"mine")
    first = folder_with(tmp_path / "first" / "rank0", a="x").parent
    claims = new_claims(first)
    other = folder_with(tmp_path / "other" / "rank1", b="x").parent
    for rank, folder in ((1, other), (0, first)):
        copied(Mirror(folder, "memory://b/run", rank, claims))
    found = [path for path in memory.find("/b") if "begun_" in path]
    assert sorted(path.rpartition("/rank")[2] for path in found if "rank" in path) == ["0/a", "1/b"]
    assert len({path.split("/")[3] for path in found}) == 1
    assert not (other / "copies.jsonl").exists()


def test_the_copy_of_a_process_that_vanished_goes_where_the_others_went(memory, tmp_path):
    mirror = copied(begun(folder_with(tmp_path / "run")))
    folder_with(mirror.folder, crash="x")
    copy_of_the_dead(str(mirror.folder), "memory://b/run", "0")
    assert memory.cat_file("/b/run/crash") == b"x"


@pytest.mark.parametrize(
    "content",
    ["", "config", "/tmp", "file:///tmp", "memory://b/run/begun_1/../..", "memory://b/other"],
)
def test_an_address_that_no_run_can_have_chosen_is_not_trusted(memory, tmp_path, content):
    (tmp_path / "config.yaml").write_text("the user's")
    folder = folder_with(tmp_path / "run", **{".copied_to": content, "config.yaml": "the run's"})
    assert copied(begun(folder, fetch_s=None)).address == "memory://b/run"
    assert (tmp_path / "config.yaml").read_text() == "the user's"
    assert memory.cat_file("/b/run/config.yaml") == b"the run's"


def test_a_full_disk_leaves_no_empty_address(tmp_path, monkeypatch):
    def full(path, *_):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuses(*_):
        raise ConnectionError("no network")

    folder = folder_with(tmp_path / "run")
    monkeypatch.setattr("esper_lightning.callbacks.mirror._file_system", refuses)
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        begun(folder)
    assert [path for path in folder.iterdir() if not path.name.endswith(".tmp")] == []


def test_claims_that_are_damaged_claim_nothing_of_others(memory, tmp_path):
    memory.pipe_file("/b/run/copies.jsonl", b"\xff{")
    folder = folder_with(tmp_path / "run", a="x")
    (folder / "copies.jsonl").write_bytes(b"\xff")
    assert read_claims(folder) == ""
    assert "/begun_" in copied(begun(folder, fetch_s=None)).address
    assert memory.cat_file("/b/run/copies.jsonl") == b"\xff{"
