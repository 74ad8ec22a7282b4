"""What a fingerprint holds, what it never holds, and what differs between two."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from esper_lightning.forensics import fingerprint as module
from esper_lightning.forensics.fingerprint import (
    Fingerprint,
    differences,
    fingerprint_of_process,
    folders_to_restore,
    loaded_versions,
    variables_to_restore,
    with_config,
)

SECRET = "n0b0dyMayReadThis"


@pytest.fixture(autouse=True)
def _asks_git_again():
    module._changes_of.cache_clear()
    yield
    module._changes_of.cache_clear()


def git(folder: Path, *words: str) -> str:
    names = {
        f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    environment = {**os.environ, **names, "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(
        ["git", *words], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository with one commit, which is the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("one = 1\n")
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_clean_repository_has_a_commit_and_no_changes(repository):
    found = fingerprint_of_process(None)
    assert (found.commit, found.changes) == (git(repository, "rev-parse", "HEAD"), "")


def test_uncommitted_changes_have_a_hash_that_follows_them(repository):
    hashes = []
    for text in ("two = 2\n", "three = 3\n", "one = 1\n"):
        (repository / "train.py").write_text(text)
        module._changes_of.cache_clear()
        hashes.append(fingerprint_of_process(None).changes)
    assert hashes[0]
    assert hashes[1] not in (hashes[0], "")
    assert hashes[2] == ""


@pytest.mark.parametrize("place", ["packed", "detached", "worktree", "program"])
def test_the_commit_is_found_wherever_git_has_it(repository, monkeypatch, place):
    commit, main = git(repository, "rev-parse", "HEAD"), None
    if place == "packed":
        git(repository, "pack-refs", "--all")
        assert not (repository / ".git/refs/heads/main").exists()
    elif place == "detached":
        git(repository, "checkout", "-q", "--detach")
    elif place == "worktree":
        git(repository, "worktree", "add", "-q", "beside", "-b", "other")
        monkeypatch.chdir(repository / "beside")
    else:
        monkeypatch.chdir("/")
        main = repository / "train.py"
    assert fingerprint_of_process(main).commit == commit


def test_outside_a_repository_there_is_no_commit(monkeypatch):
    monkeypatch.chdir("/")
    found = fingerprint_of_process(None)
    assert (found.commit, found.changes, found.directory) == (None, None, "/")


@pytest.mark.parametrize("script", ["sleep 30", "yes", "exit 3"])
def test_git_costs_half_a_second_at_most(repository, monkeypatch, script):
    folder = repository / "bin"
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "_MOST_BYTES", 1 << 20)
    began = time.monotonic()
    assert fingerprint_of_process(None).changes is None
    assert time.monotonic() - began < 5


def test_git_runs_no_program_that_a_repository_names(repository):
    (repository / "hook").write_text(f"#!/bin/sh\ntouch {repository}/ran\n")
    (repository / "hook").chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(repository / "hook"))
    git(repository, "config", "diff.external", str(repository / "hook"))
    for kind in ("clean", "process", "smudge"):
        git(repository, "config", f"filter.its.own.{kind}", str(repository / "hook"))
    git(repository, "config", "filter.its.own.required", "true")
    (repository / ".git" / "info" / "attributes").write_text("* filter=its.own\n")
    (repository / "train.py").write_text("two = 2\n")
    assert fingerprint_of_process(None).changes
    assert not (repository / "ran").exists()


def test_versions_are_those_of_loaded_distributions(monkeypatch):
    found = loaded_versions()
    assert found["torch"].partition("+")[0] == sys.modules["torch"].__version__.partition("+")[0]
    assert found["pyyaml"] == sys.modules["yaml"].__version__  # a module of another name
    for name in [name for name in sys.modules if name.lstrip("_").startswith("yaml")]:
        monkeypatch.delitem(sys.modules, name)
    assert "pyyaml" not in loaded_versions()


def test_variables_and_jobs_are_stored_and_secrets_are_not(monkeypatch):
    variables = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "3", "SLURM_JOB_ID": "17"}
    variables |= {"SLURM_RESTART_COUNT": "2", "XLA_FLAGS": "--a=b", "HOME_OF_SOMEBODY": "x"}
    secrets = {"TORCH_HUB_TOKEN": SECRET, "NCCL_AUTH": SECRET, "WANDB_API_KEY": SECRET}
    secrets |= {"CUDA_URL": f"https://me:{SECRET}@host/x", "XLA_MORE": f"--api_key={SECRET} --b=1"}
    for name, value in (variables | secrets).items():
        monkeypatch.setenv(name, value)
    words = ["train.py", "--lr", "0.1", "--token", SECRET, f"--hub.password={SECRET}", "--key"]
    words += [SECRET, f'{{"init_args": {{"api_key": "{SECRET}", "save_dir": "there"}}}}', "--end"]
    words += ["--header", "Authorization:", "Bearer", SECRET, "--end"]
    monkeypatch.setattr(sys, "argv", words)
    found = fingerprint_of_process(None)
    assert SECRET not in str(found)
    assert found.variables["NCCL_DEBUG"] == "INFO"
    assert found.variables["XLA_MORE"] == "--api_key=(hidden)"
    assert "HOME_OF_SOMEBODY" not in found.variables
    assert (found.job["SLURM_JOB_ID"], found.attempt) == ("17", 2)
    assert found.command[:3] == ("train.py", "--lr", "0.1")
    assert found.command[-1] == "--end"


@pytest.mark.parametrize(
    "words",
    [
        *(["--authkey", SECRET], ["--creds", SECRET], ["--oauth", SECRET], ["--passcode", SECRET]),
        *(["--user", f"bob:{SECRET}"], ["-u", f"bob:{SECRET}"], ["--db", f"me:{SECRET}@host/db"]),
    ],
)
def test_words_of_a_command_that_are_secrets_are_hidden(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--lr", "1"])
    found = fingerprint_of_process(None).command
    assert SECRET not in str(found)
    assert found[1] == words[0]
    assert found[-2:] == ("--lr", "1")


def test_only_variables_with_a_whole_value_are_restored(monkeypatch):
    whole = {"OMP_NUM_THREADS": "1", "PYTORCH_ALLOC_CONF": "a:b", "ATEN_CPU_CAPABILITY": "avx2"}
    whole |= {"NCCL_ALGO": "Ring", "TORCHDYNAMO_X": "1", "TORCHINDUCTOR_X": "1", "DNNL_X": "1"}
    lost = {"TORCH_LOGS_FORMAT": "key=1 %(message)s", "XLA_FLAGS": 400 * "x"}
    of_machine = {"CUDA_VISIBLE_DEVICES": "7", "NCCL_SOCKET_IFNAME": "eth7"}
    for name, value in (whole | lost | of_machine).items():
        monkeypatch.setenv(name, value)
    restored, named = variables_to_restore(fingerprint_of_process(None))
    assert restored.items() >= whole.items()
    assert {*lost, *of_machine}.isdisjoint(restored)
    assert set(named) == set(lost)


def test_a_folder_of_torch_is_no_condition(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/x")
    assert "TORCHINDUCTOR_CACHE_DIR" not in fingerprint_of_process(None).variables


def test_a_difference_names_what_was_and_what_is():
    before = Fingerprint(
        command=("a",),
        commit=40 * "a",
        changes="",
        versions={"torch": "2.12", "old": "1"},
        threads={"torch threads": 1},
        variables={"OMP_NUM_THREADS": "1"},
    )
    now = replace(
        before,
        command=("b",),
        commit=40 * "b",
        changes="12ab",
        versions={"torch": "2.13", "new": "1"},
        threads={"torch threads": 2},
        variables={"XLA_FLAGS": "x"},
        job={"SLURM_JOB_ID": "2"},
    )
    assert differences(before, before) == ()
    assert differences(before, now) == (
        "commit aaaaaaaaaa -> bbbbbbbbbb",
        "uncommitted changes none -> 12ab",
        "torch 2.12 -> 2.13",
        "torch threads 1 -> 2",
        "OMP_NUM_THREADS 1 -> not set",
        "XLA_FLAGS not set -> x",
    )


def test_a_config_is_another_unless_only_its_place_is():
    texts = [b"a: 1\nrun_dir: x\n", b"a: 1\nrun_dir: y\nckpt_path: last\n", b"a: 2\n"]
    one, moved, other = (with_config(Fingerprint(), text) for text in texts)
    assert differences(one, moved) == ()
    assert differences(one, other) == ("another config",)


def test_places_of_modules_besides_those_of_python_are_restored(tmp_path, monkeypatch):
    own, package, here = (tmp_path / name for name in ("own", "package", "here"))
    for folder in (own, package / "esper_lightning", here):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    of_python = [path for path in sys.path if "python3" in path]
    added = [str(own), str(package), "", str(here), str(tmp_path / "gone")]
    monkeypatch.setattr(sys, "path", [*added, *of_python])
    found = fingerprint_of_process(None)
    assert found.search_path == (str(own), str(package))
    assert folders_to_restore(found) == []  # this process looks there
    monkeypatch.setattr(sys, "path", of_python)
    assert folders_to_restore(found) == [str(own)]
    own.rmdir()
    assert folders_to_restore(found) == []
