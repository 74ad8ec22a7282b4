"""Files of an iteration are listed, none is long, and each has its tests in the same place."""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from lightning.pytorch import Callback

import esper_lightning
from esper_lightning import PPO, PPOConfig
from esper_lightning.callbacks.history import History
from esper_lightning.envs import CartPole

PACKAGE = Path(esper_lightning.__file__).parent
TESTS = Path(__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "architecture.md"
FIRST, ENVIRONMENT = "training/module.py", "envs/cartpole.py"
MOST_FILES, MOST_LINES = 14, 400
MIRRORED = ("callbacks", "comparison", "core", "policies", "ppo", "training")
TESTED_ELSEWHERE = {
    "callbacks/window_profiler.py": "it is the former place of recorder/profiling/window_profiler",
    "core/shapes.py": "its annotations are checked in every test",
    "policies/images.py": "policies/test_convolutional.py has it as the encoder of CNN",
    "training/checkpoint/hooks.py": "training/test_module.py calls its hooks as the Trainer does",
}
"""Why a file of the package has no test file of its own."""


class Witness(Callback):
    """Notes the files of the package that the second iteration enters, in order of the first call.

    In the first iteration the environment's contract is checked, too.
    """

    def __init__(self) -> None:
        self.files: dict[str, None] = {}

    def on_train_batch_start(self, _trainer: Any, _model: Any, _batch: int, batch_idx: int) -> None:
        if batch_idx == 1:
            sys.settrace(self.note)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.files:
            sys.settrace(None)

    def note(self, frame: FrameType, _event: str, _argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        is_first = frame.f_code.co_name == "training_step"
        if path.is_relative_to(PACKAGE) and (self.files or is_first):
            self.files.setdefault(path.relative_to(PACKAGE).as_posix())


@pytest.fixture
def entered(make_trainer) -> list[str]:
    """Files that the second iteration enters."""
    before = sys.gettrace()
    witness = Witness()
    ppo = PPOConfig(rollout_steps=8, minibatches=2)
    model = PPO(env=CartPole(num_envs=8), ppo=ppo, compile="off")
    trainer = make_trainer(max_steps=2, callbacks=[History(), witness])
    try:
        trainer.fit(model)
    finally:
        sys.settrace(before)
    return list(witness.files)


def listed() -> list[str]:
    """Files of the table "An iteration", from its first row to its last."""
    section = re.search(r"^## An iteration\n(.*?)^## ", DOCUMENT.read_text(), re.M | re.S)
    assert section is not None
    rows = [line.split("|") for line in section[1].splitlines() if line.startswith("| ")]
    return [name for row in rows for name in re.findall(r"`([a-z_/]+\.py)`", row[2])]


def test_an_iteration_enters_few_files_before_the_environment_and_the_document_lists_all(entered):
    assert entered[0] == FIRST
    between = entered.index(ENVIRONMENT) - 1
    assert between <= MOST_FILES
    assert f" enters {between} files." in DOCUMENT.read_text()
    assert listed() == entered


def test_no_file_of_the_package_is_too_long_to_read():
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path.name: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_each_file_has_its_tests_in_the_same_place():
    files = [path for folder in MIRRORED for path in (PACKAGE / folder).rglob("*.py")]
    names = {path.relative_to(PACKAGE) for path in files if path.name != "__init__.py"}
    lacks = {
        name.as_posix()
        for name in names
        if not (TESTS / name.parent / f"test_{name.name}").is_file()
    }
    assert lacks == set(TESTED_ELSEWHERE)
