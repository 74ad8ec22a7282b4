"""A run directory has one owner: claimed at once, refused while the owner lives, then free."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from esper_lightning.forensics import claims
from esper_lightning.forensics.claims import (
    DirectoryInUseError,
    DirectoryRefusedError,
    claim,
    claim_for_logger,
    claim_next,
    reserve,
    return_reserved,
)
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.owner_record import read_owner
from esper_lightning.forensics.processes import identify
from tests.reports import write_report

PROGRAM = """
import os, sys
from pathlib import Path
from esper_lightning.forensics.claims import claim
held = claim(Path(sys.argv[1]))
print("claimed", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that owns ``tmp_path / "run"``."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "claimed\n"
        yield process
        process.kill()


def test_a_directory_of_a_living_process_is_refused_in_one_line_that_names_it(other, tmp_path):
    with pytest.raises(DirectoryInUseError, match=f"process {other.pid} ") as refusal:
        claim(tmp_path / "run")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("lives", [True, False])
def test_a_directory_on_a_shared_disk_is_refused_while_a_rank_of_another_host_lives(
    tmp_path, lives, monkeypatch
):
    monkeypatch.setattr("esper_lightning.forensics.heartbeat.GONE_S", 0.5)
    record = {"pid": 7, "host": "elsewhere", "rank": 0, "state": "running", "beat_s": 0.1}
    path = RunLayout(tmp_path).rank(0).process
    write_report(path, record)
    ended = threading.Event()

    def live():
        while lives and not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        if lives:
            with pytest.raises(DirectoryInUseError, match="process 7 on elsewhere is running"):
                claim(tmp_path)
        else:
            claim(tmp_path).release()
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_directory_is_free_when_its_owner_is_dead(other, tmp_path, end):
    if end is None:
        other.communicate("\n")
    else:
        other.send_signal(end)
        other.wait()
    held = claim(tmp_path / "run")
    assert held.was_run
    held.release()


def test_a_suspended_owner_is_alive(other, tmp_path):
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(DirectoryInUseError):
        claim(tmp_path / "run")


@pytest.mark.parametrize("is_living", [True, False])
def test_a_record_that_can_only_be_read_is_locked_all_the_same(
    other, is_living, tmp_path, monkeypatch
):
    real_open = os.open

    def only_reads(path, flags, mode=0o777, **where):
        if flags & os.O_RDWR and os.fspath(path).endswith("owner.lock"):
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, flags, mode, **where)

    monkeypatch.setattr(os, "open", only_reads)
    if is_living:
        with pytest.raises(DirectoryInUseError, match=f"process {other.pid} "):
            claim(tmp_path / "run")
        return
    other.kill()
    other.wait()
    held = claim(tmp_path / "run")
    with pytest.raises(DirectoryInUseError):  # nobody else has it now
        claim(tmp_path / "run")
    held.release()


@pytest.fixture(name="no_locks")
def _no_locks(monkeypatch):
    """A file system that has no locks."""

    def flock(fd, how):
        raise OSError(claims.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_name_of_the_owner_decides(other, tmp_path):
    with pytest.raises(DirectoryInUseError, match=f"process {other.pid} "):
        claim(tmp_path / "run")
    other.kill()
    other.wait()
    claim(tmp_path / "run").release()


def test_a_copy_of_a_directory_of_a_living_process_is_free(other, tmp_path):
    process = {"state": "running", "rank": 0, **identify(other.pid).to_dict()}
    write_report(RunLayout(tmp_path / "run").rank(0).process, process)
    shutil.copytree(tmp_path / "run", tmp_path / "fork")
    held = claim(tmp_path / "fork")
    assert held.was_run
    held.release()
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(DirectoryInUseError, match=f"process {other.pid} "):
        claim(tmp_path / "moved")


@pytest.mark.parametrize("locks", [True, False])
def test_the_same_process_may_claim_again_only_after_it_let_go(tmp_path, request, locks):
    if not locks:
        request.getfixturevalue("no_locks")
    held = claim(tmp_path)
    with pytest.raises(DirectoryInUseError, match="another run of this process"):
        claim(tmp_path)
    held.release()
    claim(tmp_path).release()


def test_what_was_released_is_free_for_others_while_the_process_lives(tmp_path):
    claim(tmp_path / "run").release()
    code = PROGRAM.replace("sys.stdin.readline()", "")
    claimed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    assert claimed.returncode == 0


def test_a_rank_that_still_writes_keeps_the_directory(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        process = {"state": "running", "rank": 1, **identify(child.pid).to_dict()}
        write_report(RunLayout(tmp_path).rank(1).process, process)
        with pytest.raises(DirectoryInUseError, match=f"process {child.pid} "):
            claim(tmp_path)
        child.kill()
        child.wait()
        claim(tmp_path).release()


def test_a_process_that_has_finished_its_run_may_live_on(tmp_path):
    """A process such as a notebook, with a version of the package that wrote no owner."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = {"state": "finished", "rank": 0, **identify(child.pid).to_dict()}
        write_report(RunLayout(tmp_path).rank(0).process, process)
        held = claim(tmp_path)
        assert held.was_run
        held.release()
        child.kill()


def test_a_forked_child_does_not_keep_its_parents_directory(tmp_path):
    """A worker that outlives the run is not the run."""
    held = claim(tmp_path)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    worker.start()
    held.release()
    try:
        claim(tmp_path).release()
        claimed_in_child = multiprocessing.get_context("fork").Process(
            target=lambda: os._exit(int(held.holds))
        )
        claimed_in_child.start()
        claimed_in_child.join()
        assert claimed_in_child.exitcode == 0
    finally:
        worker.kill()
        worker.join()


def test_each_new_directory_has_a_number_of_its_own_however_many_ask_at_once(tmp_path):
    for name in ("version_3", "version_12", "version_x", "version_" + "9" * 40):
        (tmp_path / name).mkdir()
    found = []
    start = threading.Barrier(16)

    def take():
        start.wait()
        found.append(claim_next(tmp_path))

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = sorted(int(held.directory.name[8:]) for held in found)
    assert names == list(range(13, 29))
    for held in found:
        held.release()


def test_a_claim_that_was_not_used_leaves_nothing(tmp_path):
    claim_next(tmp_path / "runs" / "cartpole").release()
    assert list(tmp_path.iterdir()) == []
    held = claim_next(tmp_path / "runs")
    (held.directory / "file").touch()
    held.release()
    assert (tmp_path / "runs" / "version_0" / "file").exists()
    claim_next(tmp_path / "runs").release()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]


def test_a_directory_that_was_there_stays_and_is_told_from_a_runs(tmp_path):
    (tmp_path / "notes.txt").touch()
    held = claim(tmp_path)
    assert not held.was_run
    held.release(used=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    claim(tmp_path).release()
    held = claim(tmp_path)  # of a run that was killed before it wrote anything else
    assert held.was_run
    held.release(used=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "owner.lock"]
    owner = RunLayout(tmp_path).owner
    owner.write_bytes(b'{"pid": 4194304, "host": "' + b"elsewhere" * 900 + b'"}')
    before = owner.read_bytes()
    claim(tmp_path).release(used=False)
    assert owner.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{"])
def test_an_empty_record_is_somebodys_own_unless_a_run_left_other_files(tmp_path, content):
    """A release of an earlier version leaves one, and so does ``touch``."""
    owner, config = RunLayout(tmp_path).owner, RunLayout(tmp_path).config
    history = RunLayout(tmp_path).rank(0).history
    owner.write_bytes(content)
    config.write_text("mine")
    held = claim(tmp_path)
    assert not held.was_run
    with pytest.raises(DirectoryRefusedError, match=r"It holds config\.yaml, which no run wrote"):
        held.refuse_others(["config.yaml"])
    held.release(used=False)
    assert (owner.read_bytes(), config.read_text()) == (content, "mine")
    history.parent.mkdir()
    history.write_text("a diary of the user's own\n")
    with pytest.raises(DirectoryRefusedError, match="It holds rank0, which no run wrote"):
        claim(tmp_path)
    assert owner.read_bytes() == content
    history.write_text('{"iteration":1}\n')
    held = claim(tmp_path)
    assert held.was_run
    held.refuse_others(["config.yaml"])
    held.release()


def test_the_folder_of_a_logger_is_that_of_one_run_and_not_its_run_directory(tmp_path):
    files = ["metrics.csv", "hparams.yaml"]
    held = claim_for_logger(tmp_path / "logs", files)
    for again in (claim, lambda folder: claim_for_logger(folder, files)):
        with pytest.raises(DirectoryInUseError, match="another run of this process"):
            again(tmp_path / "logs")
    (tmp_path / "logs" / "metrics.csv").touch()
    held.release()
    claim_for_logger(tmp_path / "logs", files).release()
    (tmp_path / "logs" / "config.yaml").write_text("mine")
    held = claim(tmp_path / "logs")
    assert not held.was_run
    with pytest.raises(DirectoryRefusedError, match=r"config\.yaml"):
        held.refuse_others(["config.yaml"])
    held.release(used=False)
    claim_for_logger(tmp_path / "logs", files).release()
    assert read_owner(tmp_path / "logs") == {}


def test_a_logger_replaces_no_file_of_others_and_leaves_a_run_directory_what_it_is(tmp_path):
    (tmp_path / "hparams.yaml").write_text("mine")
    with pytest.raises(DirectoryRefusedError, match=r"folder of a logger must .* hparams\.yaml, w"):
        claim_for_logger(tmp_path, ["metrics.csv", "hparams.yaml"])
    assert [path.name for path in tmp_path.iterdir()] == ["hparams.yaml"]
    claim(tmp_path).release()
    claim_for_logger(tmp_path, ["metrics.csv", "hparams.yaml"]).release()
    held = claim(tmp_path)
    assert held.was_run
    held.release()


def test_a_path_that_is_too_long_is_refused_at_once(tmp_path):
    begin = time.monotonic()
    with pytest.raises(OSError, match="File name too long"):
        claim(tmp_path / "y" / ("y/" * 3000))
    assert time.monotonic() - begin < 1.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": 1', b'{"pid"' + b"[" * 9000])
def test_a_damaged_record_of_a_dead_owner_is_no_obstacle(tmp_path, content):
    RunLayout(tmp_path).owner.write_bytes(content)
    claim(tmp_path).release()


@pytest.mark.parametrize("content", [b"precious", b"[1]", b"\xff" * 9000])
def test_a_file_that_no_run_wrote_is_left_alone(tmp_path, content):
    path = RunLayout(tmp_path).owner
    path.write_bytes(content)
    with pytest.raises(ValueError, match="which no run wrote"):
        claim(tmp_path)
    assert path.read_bytes() == content


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    RunLayout(tmp_path / "run").owner.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        claim(tmp_path / "run")
    assert victim.read_text() == "precious"


def test_all_folders_that_were_made_for_a_claim_go_with_it(tmp_path):
    claim(tmp_path / "a" / "b" / "c").release(used=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("take", [claim, claim_next])
def test_folders_on_the_way_to_one_that_cannot_be_made_go_again(tmp_path, take):
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError):
        take(tmp_path / "new" / "er" / ".." / ".." / "mine" / ".." / "file" / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_a_full_disk_takes_no_name_but_the_lock_holds(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(claims.os, "pwrite", full)
    held = claim(tmp_path)
    with pytest.raises(DirectoryInUseError, match="another run is running"):
        claim(tmp_path)
    held.release()


@pytest.mark.parametrize("name", ["rank0", "rank12", "checkpoints", "rank0/trace"])
def test_a_folder_with_files_of_a_run_is_no_directory_for_another(tmp_path, name):
    free = claim(tmp_path / name)  # the folder above it is no run's yet
    (tmp_path / name / "file").touch()
    free.release()
    held = claim(tmp_path / "run")
    with pytest.raises(DirectoryRefusedError, match=r"among the files of another run, .*/run' is"):
        claim(tmp_path / "run" / name)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["owner.lock"]
    claim(tmp_path / "run" / "lightning_logs" / "version_0").release()
    held.release()


def test_the_directory_of_a_run_that_took_the_name_of_a_moved_one_stays_owned(tmp_path):
    run = tmp_path / "run"
    held = claim(run)
    run.rename(tmp_path / "moved")
    another = claim(run)
    held.release()
    assert read_owner(run)["pid"] == os.getpid()
    assert read_owner(tmp_path / "moved") == {}
    another.release()


def test_what_was_reserved_is_claimed_or_left_as_it_was(tmp_path):
    reserve(tmp_path / "run")
    assert read_owner(tmp_path / "run")["pid"] == os.getpid()
    held = claim(tmp_path / "run")
    return_reserved()
    assert held.holds
    held.note(address="s3://bucket")
    owner = read_owner(tmp_path / "run")
    assert (owner["address"], owner["pid"]) == ("s3://bucket", os.getpid())
    (tmp_path / "run" / "file").touch()  # it was used, and stays
    held.release()
    assert read_owner(tmp_path / "run") == {}
    reserve(tmp_path / "other")
    return_reserved()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["write_locked", "RunLayout"], ids=["reserving", "returning"])
def test_an_interrupt_leaves_no_reserved_directory(name, tmp_path, monkeypatch):
    """It comes when ``owner.lock`` is there and the reservation is not, and in its removal."""
    found, interrupted = [], getattr(claims, name)

    def interrupt(*arguments):
        done = interrupted(*arguments)
        monkeypatch.setattr(claims, name, interrupted)
        signal.raise_signal(signal.SIGINT)
        return done

    def leave(*_):
        return_reserved()
        found.append((tmp_path / "a").exists())

    former = signal.signal(signal.SIGINT, leave)
    try:
        if name == "RunLayout":
            reserve(tmp_path / "a" / "run")
        monkeypatch.setattr(claims, name, interrupt)
        reserve(tmp_path / "a" / "run") if name == "write_locked" else return_reserved()
    finally:
        signal.signal(signal.SIGINT, former)
    assert found == [False]


def test_what_is_no_runs_is_not_reserved(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    reserve(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    reserve(tmp_path / "config.yaml")  # nor is that an error: whoever claims it will meet it
    return_reserved()


def test_what_another_run_owns_is_not_reserved(other, tmp_path):
    reserve(tmp_path / "run")
    return_reserved()
    assert read_owner(tmp_path / "run")["pid"] == other.pid


def test_a_directory_that_was_made_for_a_claim_is_withdrawn_with_its_files(tmp_path):
    held = claim(tmp_path / "a" / "run")
    (held.directory / "rank0").mkdir()
    (held.directory / "rank0" / "crash.json").write_text("{}")
    (tmp_path / "a" / "mine").write_text("x")
    held.withdraw()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "mine"]


def test_a_directory_that_was_there_before_or_is_anothers_is_not_withdrawn(tmp_path):
    (tmp_path / "before").mkdir()
    before = claim(tmp_path / "before")
    (tmp_path / "before" / "x").write_text("x")
    before.withdraw()
    assert (tmp_path / "before" / "x").exists()
    held = claim(tmp_path / "run")
    (tmp_path / "run" / "x").write_text("x")
    held.release()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "claimed\n"
        held.withdraw()
        assert (tmp_path / "run" / "x").exists()
        process.kill()
