"""Worlds of other simulators: what is installed for each, and what a failure leaves."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def worlds(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("worlds", ROOT / "benchmarks" / "worlds.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PLACE", tmp_path)
    return module


@pytest.mark.trap(13)
def test_torchvision_is_removed_from_the_world_of_mjlab(worlds, monkeypatch, tmp_path):
    commands = []

    def noted(words, **_):
        commands.append(" ".join(map(str, words)))
        (tmp_path / "mjlab").mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", noted)
    assert worlds.interpreter("mjlab") == tmp_path / "mjlab" / "bin" / "python"
    assert any("install" in command and "torch==" in command for command in commands)
    assert commands[-1].endswith("uninstall --quiet --yes torchvision")
    commands.clear()
    worlds.interpreter("mjlab")
    assert commands == []


def test_a_world_that_cannot_be_installed_is_a_row(worlds, monkeypatch):
    def fail(world):
        raise subprocess.CalledProcessError(1, ["pip"], stderr="no wheel\nERROR: no such package")

    monkeypatch.setattr(worlds, "interpreter", fail)
    (row,) = worlds.measure(["envpool"], 3)
    assert row.startswith("| envpool |")
    assert "not installed: ERROR: no such package" in row


def test_this_interpreter_is_a_world(worlds):
    assert worlds.interpreter(worlds.HERE) == Path(sys.executable)
