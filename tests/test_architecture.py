"""Files of an iteration are listed, none is long, and each has its tests in the same place."""

import ast
import gc
import itertools
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from lightning.pytorch import Callback

import esper_lightning
from esper_lightning import PPO, FlightRecorder, PPOConfig
from esper_lightning.callbacks.history import History
from esper_lightning.compiling.audits import Audit
from esper_lightning.compiling.loops import CompileMode
from esper_lightning.envs import CartPole

PACKAGE = Path(esper_lightning.__file__).parent
TESTS = Path(__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "architecture.md"
FIRST, ENVIRONMENT, STEP = "training/module.py", "envs/cartpole.py", "advance"
MOST_FILES, MOST_OF_ALL, MOST_LINES = 14, 37, 400
AT_TIMES = {"recorder/signal_handlers.py", "recorder/signals.py", "recorder/wakeup.py"}
"""Files that an iteration enters if it is the first after some time: it looks for new handlers."""
BY_THEMES = ("cli/project", "compiling/native", "envs")
"""Folders whose tests are by operations, contracts and simulators, or that are templates."""
TESTED_ELSEWHERE = {
    "__main__.py": "cli/test_main.py starts it",
    "callbacks/logger_files.py": "callbacks/test_loggers.py has it below the guards of loggers",
    "callbacks/window_profiler.py": "it is the former place of recorder/profiling/window_profiler",
    "compiling/stepwise.py": "training/test_cuda.py has it on a GPU",
    "compiling/tracing.py": "compiling/native has it in every test",
    "core/shapes.py": "its annotations are checked in every test",
    "policies/images.py": "policies/test_convolutional.py has it as the encoder of CNN",
    "training/checkpoint/hooks.py": "training/test_module.py calls its hooks as the Trainer does",
    "training/checkpoint/meeting.py": "training/test_ranks.py has it among real ranks",
}
"""Why a file of the package has no test file of its own."""


class Witness(Callback):
    """Notes the files of the package that the second iteration enters, in order of the first call.

    In the first iteration the environment's contract is checked, too.
    """

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.before_step: list[str] = []
        """Files that were entered before the first step of the environment."""

    def on_train_batch_start(self, _trainer: Any, _model: Any, _batch: int, batch_idx: int) -> None:
        if batch_idx == 1:
            sys.settrace(self.note)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.files:
            sys.settrace(None)

    def note(self, frame: FrameType, _event: str, _argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        is_first = frame.f_code is PPO.training_step.__code__  # as Lightning calls it
        if path.is_relative_to(PACKAGE) and (self.files or is_first):
            name = path.relative_to(PACKAGE).as_posix()
            if (name, frame.f_code.co_name) == (ENVIRONMENT, STEP) and not self.before_step:
                self.before_step = list(self.files)
            self.files.setdefault(name)


@pytest.fixture
def watch(make_trainer) -> Callable[..., Witness]:
    """Trains, and returns a witness that noted the files of the second iteration."""

    def train(*callbacks: Callback, compile: CompileMode) -> Witness:  # noqa: A002
        gc.collect()  # else Trainers of other tests may end within the iteration
        gc.disable()
        before = sys.gettrace()
        noted = Witness()
        ppo = PPOConfig(rollout_steps=8, minibatches=2)
        model = PPO(env=CartPole(num_envs=8), ppo=ppo, compile=compile)
        trainer = make_trainer(max_steps=2, callbacks=[History(), *callbacks, noted])
        try:
            trainer.fit(model)
        finally:
            sys.settrace(before)
            gc.enable()
        return noted

    return train


def between(witness: Witness) -> int:
    """Number of files between ``training_step`` and the first step of the environment."""
    return len(set(witness.before_step) - {FIRST, ENVIRONMENT})


def listed() -> list[list[str]]:
    """Files of each row of the table "An iteration"."""
    section = re.search(r"^## An iteration\n(.*?)^## ", DOCUMENT.read_text(), re.M | re.S)
    assert section is not None
    rows = [line.split("|") for line in section[1].splitlines() if line.startswith("| ")]
    return list(filter(None, (re.findall(r"`([a-z_/]+\.py)`", row[2]) for row in rows)))


def test_the_document_lists_the_files_of_an_iteration_in_order_and_says_how_many_they_are(watch):
    witness = watch(compile="off")
    entered, before = list(witness.files), witness.before_step
    assert between(witness) <= MOST_FILES
    assert len(entered) <= MOST_OF_ALL
    text = " ".join(DOCUMENT.read_text().split())
    assert f"(`CartPole.{STEP}`) an iteration enters {between(witness)} files;" in text
    assert f"a whole iteration enters {len(entered)}." in text
    rows = listed()
    until = [[*itertools.chain(*rows[: k + 1])] for k in range(len(rows))]
    assert until[-1] == entered
    assert before in until, "a row must end with the first step of the environment"


def test_the_document_says_how_many_files_a_recorded_iteration_enters(watch):
    without, recorded = watch(compile="off"), watch(FlightRecorder(), compile="off")
    text = " ".join(DOCUMENT.read_text().split())
    all_of_it = recorded.files.keys() - AT_TIMES
    assert f"it enters {between(recorded)} files, and {len(all_of_it)} in all" in text
    added = {*recorded.before_step} - without.files.keys()
    assert added
    assert all(f"`{name}`" in text for name in added)


def test_the_document_says_how_many_files_a_native_iteration_enters(
    watch, native_code, monkeypatch
):
    due = Audit.is_due
    monkeypatch.setattr(Audit, "is_due", lambda audit: due(audit) and False)
    without, native = watch(compile="off"), watch(compile="auto")
    text = " ".join(DOCUMENT.read_text().split())
    assert not native.before_step, "the steps of the environment are native code"
    assert f"an iteration of `auto` enters {len(native.files)}" in text
    assert all(f"`{name}`" in text for name in native.files.keys() - without.files.keys())


def test_no_file_of_the_package_is_too_long_to_read():
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path.name: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_each_file_has_its_tests_in_the_same_place():
    files = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    lacks = {
        name.as_posix()
        for name in files
        if name.name != "__init__.py"
        and not any(name.is_relative_to(folder) for folder in BY_THEMES)
        and not (TESTS / name.parent / f"test_{name.name}").is_file()
    }
    assert lacks == set(TESTED_ELSEWHERE)


LAYERS = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
][0]["layers"]
NAMED = re.compile(r"esper_lightning\.([\w.]+)")


def layer_of(module: str) -> int:
    """How many layers lie above a module, which is given without the name of the package."""
    folder = f"esper_lightning.{module.split('.', maxsplit=1)[0]}"
    return next((n for n, line in enumerate(LAYERS) if folder in line.split(" | ")), -1)


def test_the_tower_of_the_document_has_the_layers_that_are_checked():
    tower = re.search(r"^```\n(cli .*?)^```", DOCUMENT.read_text(), re.M | re.S)
    assert tower is not None
    rows = re.findall(r"^(.{26}).*$", tower[1], re.M)
    drawn: list[set[str]] = []
    for names in map(str.split, rows):
        if names[0] == "|":  # the row above continues
            drawn[-1].update(names[1:])
        else:
            drawn.append({name for name in names if name != "|"})
    prefix = "esper_lightning."
    assert drawn == [{name.removeprefix(prefix) for name in line.split(" | ")} for line in LAYERS]


def texts_of(tree: ast.Module) -> Iterator[str]:
    """Every text in the code of a module but its docstrings."""
    statements = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    alone = {id(value) for value in statements}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def test_modules_of_layers_above_are_named_as_text_only_where_the_document_says_so():
    """import-linter sees no module that is imported by its name."""
    found: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        for text in texts_of(ast.parse(path.read_text())):
            for named in NAMED.findall(text):
                if layer_of(named) < layer_of(module):
                    found.add((module, named))
    document = " ".join(DOCUMENT.read_text().split())
    assert found == {
        ("forensics.sidecar", "callbacks.mirror"),
        ("training.special_evaluations", "growth.table"),
    }
    for module, named in found:
        assert f"`{module.replace('.', '/')}.py`" in document
        assert f"`{named}`" in document
