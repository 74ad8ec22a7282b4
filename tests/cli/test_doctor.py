"""``esper doctor`` names what makes training slow or impossible."""

import json
import os
import shutil

import pytest

from esper_lightning.cli import doctor
from esper_lightning.cli.main import main


def findings(capsys) -> dict[str, dict[str, str]]:
    main(["doctor", "--json"])
    return {finding["topic"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_a_machine_on_which_the_tests_run(capsys, monkeypatch):
    monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    found = findings(capsys)
    assert found["torch"]["text"].startswith("2.")
    has_compiler = shutil.which(os.environ.get("CXX", "g++").split()[0]) is not None
    assert found["native code"]["state"] == ("good" if has_compiler else "slow")
    assert not has_compiler or " compiles; cache " in found["native code"]["text"]
    assert {"disk", "threads", "extra compare", "extra jax"} <= found.keys()


def test_without_a_compiler_training_is_slow_and_the_way_out_is_named(capsys, monkeypatch):
    monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = findings(capsys)["native code"]
    assert found["state"] == "slow"
    assert "install g++ or clang" in found["text"]


def test_too_many_threads_are_slow(capsys, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    assert findings(capsys)["threads"]["text"].endswith("set OMP_NUM_THREADS=1")


def test_what_cannot_run_is_an_exit_status(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_disk", lambda: [doctor.Finding("disk", "bad", "read-only")])
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    assert caught.value.code == 1
    assert "FAIL  disk" in capsys.readouterr().out


def test_a_missing_extra_is_named_with_its_packages(capsys, monkeypatch):
    lines = ["torch>=2.6", "scipy>=1; extra == 'compare'", "no.such==1; extra == 'compare'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: lines)
    text = findings(capsys)["extra compare"]["text"]
    assert text == "no.such missing: pip install 'esper_lightning[compare]'"


def test_a_package_that_is_not_installed_is_no_error(capsys, monkeypatch):
    def requires(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", requires)
    assert findings(capsys)["extras"]["text"].startswith("unknown")
