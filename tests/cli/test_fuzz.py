"""Run directories damaged in two thousand ways: commands show the rest or print one line."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from esper_lightning import PPO, PPOConfig, train_ppo_vectorized
from esper_lightning.cli import compare, crash, report
from esper_lightning.envs import CartPole
from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.report import CrashReport
from esper_lightning.forensics.sidecar import complete_report
from esper_lightning.training import module
from esper_lightning.training.checkpoint.states import load_checkpoint
from esper_lightning.training.publish import publish
from tests.cli.corruptions import corrupt

MOST_S = 10.0
READ = (".json", ".jsonl", ".ring", ".yaml", ".gz", ".txt")
COMMANDS = {"crash": crash.run, "report": report.run, "compare": compare.run}


@pytest.fixture(scope="module")
def died(tmp_path_factory) -> Path:
    """The directory of a run that died in its fifth iteration, with all evidence of such a run."""
    directory = tmp_path_factory.mktemp("died") / "run"

    def fail(trainer, row):
        publish(trainer, row)
        if row["iteration"] == 5:
            raise RuntimeError("injected")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="injected"):  # noqa: PT012
        patch.setattr(module, "publish", fail)
        train_ppo_vectorized(
            CartPole(num_envs=2),
            iterations=8,
            ppo=PPOConfig(rollout_steps=2, minibatches=1, epochs=1),
            device="cpu",
            run_dir=directory,
            evaluate_every=2,
            eval_episodes=2,
            torch_profiler=True,
            torch_profiler_wait=0,
            torch_profiler_active=1,
        )
    files = RunLayout(directory).rank(0)
    assert files.crash.is_file()
    assert files.evaluations.is_file()
    assert list(files.trace.glob("*.gz"))
    return directory


def outcome(capsys, command: str, directory: Path, *options: str) -> None:
    """Check that output is complete and in time: status 0, or status 2 with one line."""
    started = time.monotonic()
    status: object = 0
    try:
        COMMANDS[command]([str(directory), *options])
    except SystemExit as end:
        status = end.code
    assert time.monotonic() - started < MOST_S
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (*out.split("\n"), *err.split("\n")))
    if status == 0:
        assert err == ""
        if "--json" in options:
            assert out.isascii()
            json.loads(out, parse_constant=pytest.fail)
        return
    assert status == 2
    assert out == ""
    assert err.startswith("esper: error: ")
    assert err.count("\n") == 1
    assert len(err) <= 201


def damage_and_read(capsys, died: Path, place: Path, seeds: range, *, readers: int) -> None:
    every = [(name, options) for name in COMMANDS for options in ((), ("--json",))]
    every.append(("compare", ("--output", str(place / "written"))))
    for seed in seeds:
        chance, directory = random.Random(seed), place / "run"
        shutil.copytree(died, directory)
        said = [corrupt(chance, directory, READ) for _ in range(chance.choice((1, 1, 1, 3)))]
        try:
            for command, options in chance.sample(every, readers):
                outcome(capsys, command, directory, *options)
            for path in (directory / "rank0").glob("*.json"):
                CrashReport.read(path)
                ProcessRecord.read(path)
            complete_report(RankLayout(directory / "rank0"))
            outcome(capsys, "crash", directory)
        except BaseException as error:
            error.add_note(f"Seed {seed}: {'; '.join(said)}")
            raise
        finally:
            shutil.rmtree(directory)


def test_damage_is_never_a_traceback(died, tmp_path, capsys):
    damage_and_read(capsys, died, tmp_path, range(40), readers=2)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1600, 200))
def test_sixteen_hundred_kinds_of_damage(died, tmp_path, capsys, first):
    damage_and_read(capsys, died, tmp_path, range(1000 + first, 1200 + first), readers=7)


def damage_and_load(died: Path, place: Path, seeds: range) -> set[bool]:
    """Whether damaged checkpoints were refused in one line each; other checkpoints must work."""
    refused: set[bool] = set()
    for seed in seeds:
        chance, directory = random.Random(seed), place / "run"
        shutil.copytree(died, directory)
        said = corrupt(chance, directory, (".ckpt",))
        path = chance.choice(sorted(directory.rglob("*.ckpt")))
        started = time.monotonic()
        try:
            model = PPO.load_from_checkpoint(path)
            checkpoint = load_checkpoint(path)
            model.refuse_checkpoint(checkpoint, str(path), world_size=1)
            refused.add(False)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either may be
            refused.add(True)
        except BaseException as error:
            error.add_note(f"Seed {seed}: {said}, {path}")
            raise
        else:
            model.policy.act_deterministically(torch.zeros(3, 4), None)
        finally:
            shutil.rmtree(directory)
        assert time.monotonic() - started < MOST_S, f"Seed {seed}: {said}"
    return refused


def test_damaged_checkpoints_are_refused_in_a_line(died, tmp_path):
    assert damage_and_load(died, tmp_path, range(40)) == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 400, 200))
def test_four_hundred_damaged_checkpoints(died, tmp_path, first):
    damage_and_load(died, tmp_path, range(1000 + first, 1200 + first))
