"""Fixtures that several folders share, and settings of Hypothesis."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from lightning.pytorch import Trainer

from esper_lightning.envs.morphogenesis.data import load
from tests.disks import mounted
from tests.envs.morphogenesis import cifar10

# The same examples in every run: the change under test is the reason of a red test.
settings.register_profile("esper", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("esper")


FAST_TRAPS = pytest.StashKey[set[int]]()
"""Numbers of the traps of simulators that some test notices which is neither slow nor skipped."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Note the trap that a test notices, also where the test is not selected."""
    found = item.config.stash.setdefault(FAST_TRAPS, set())
    if not any(item.get_closest_marker(name) for name in ("slow", "skip", "xfail")):
        found.update(mark.args[0] for mark in item.iter_markers("trap"))


@pytest.fixture(autouse=True)
def _only_legal_states() -> Iterator[None]:
    """Fails a test in which a recording was to enter a state that must not follow."""
    errors: list[logging.LogRecord] = []
    handler, log = logging.Handler(), logging.getLogger("esper_lightning.recorder.state")
    handler.emit = errors.append
    log.addHandler(handler)
    yield
    log.removeHandler(handler)
    assert not errors, errors[0].getMessage()


@pytest.fixture(autouse=True)
def _own_environment_variables() -> Iterator[None]:
    """What a test leaves in ``os.environ`` is undone, such as the rank that a launcher sets."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def native_code(monkeypatch) -> None:
    """Compiles, as for users."""
    monkeypatch.delenv("TORCH_COMPILE_DISABLE")


torch.set_num_threads(1)  # the tests run side by side
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of ``make test &``; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cifar10_folder(tmp_path_factory) -> Iterator[Path]:
    """A folder with noise in place of CIFAR-10's unpacked batches."""
    yield cifar10.unpacked(tmp_path_factory.mktemp("cifar10"))
    load.cache_clear()  # a gigabyte


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of two megabytes."""
    with mounted(tmp_path / "disk", 2 << 20) as disk:
        yield disk


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., Trainer]:
    """A Trainer that is silent and writes below ``tmp_path``; every default can be replaced."""

    def make(**settings: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "max_epochs": -1,
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "default_root_dir": tmp_path,
        }
        return Trainer(**{**defaults, **settings})

    return make
