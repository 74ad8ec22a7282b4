"""Run directories damaged in two thousand ways: commands do with the rest or print one line."""

import json
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from esper_lightning import PPO, PPOConfig, train_ppo_vectorized
from esper_lightning.cli import compare, crash, replay, report
from esper_lightning.cli.main import main
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


def fail_in_the_fifth(trainer, row):
    publish(trainer, row)
    if row["iteration"] == 5:
        raise RuntimeError("injected")


@pytest.fixture(scope="module")
def died(tmp_path_factory) -> Path:
    """The directory of a run that died in its fifth iteration, with all evidence of such a run."""
    directory = tmp_path_factory.mktemp("died") / "run"

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="injected"):  # noqa: PT012
        patch.setattr(module, "publish", fail_in_the_fifth)
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


def damage_and_run(
    died: Path, place: Path, seeds: Iterable[int | None], run: Callable[[Path], int]
) -> set[int]:
    """Exit statuses of a command that trains; of the seed ``None``, nothing is damaged."""
    statuses = set[int]()
    for seed in seeds:
        chance, directory = random.Random(seed), place / "run"
        shutil.copytree(died, directory)
        count = 0 if seed is None else chance.choice((1, 1, 3))
        said = [corrupt(chance, directory, READ) for _ in range(count)]
        try:
            statuses.add(run(directory))
        except BaseException as error:
            error.add_note(f"Seed {seed}: {'; '.join(said)}")
            raise
        finally:
            for path in place.iterdir():
                shutil.rmtree(path)
    return statuses


def status_of(capsys, *words: object) -> int:
    """Exit status of a command, whose mistakes must be one line of the known form."""
    status: object = 0
    try:
        main([*map(str, words)])
    except SystemExit as end:
        status = end.code
    err = capsys.readouterr().err
    assert isinstance(status, int)
    assert "Traceback" not in err
    if status == 2:
        assert len(re.findall("^esper: error: .{1,186}$", err, re.MULTILINE)) == 1, err
    return status


@pytest.fixture
def resume(died, capsys) -> Callable[[Path], int]:
    """Resumes a run with its config, as it was before damage; returns the exit status."""

    def resume(directory: Path) -> int:
        words = ("--config", died / "config.yaml", "--run_dir", directory, "--ckpt_path", "last")
        status = status_of(capsys, "fit", *words, "--model.total_env_steps", 28)
        history = RunLayout(directory).rank(0).history
        if status == 0 and history.is_file() and not history.is_symlink():
            rows = [json.loads(row) for row in history.read_text().splitlines()]
            assert all(isinstance(row["iteration"], int) for row in rows)
            assert rows[-1]["iteration"] == 7
        return status

    return resume


@pytest.fixture
def play_again(died, capsys, monkeypatch) -> Callable[[Path], int]:
    """Replays a run, within this process; returns the exit status."""

    class Played:
        def __init__(self, words, **_):
            self.words = words

        def wait(self, timeout):
            with monkeypatch.context() as patch:
                patch.setattr(module, "publish", fail_in_the_fifth)
                try:
                    main(self.words[3:])
                except SystemExit as end:
                    return end.code
                except RuntimeError as error:
                    assert "injected" in str(error)  # noqa: PT017 - any other is that of the replay
                    return 1
            return 0

    monkeypatch.setattr(subprocess, "Popen", Played)
    monkeypatch.setattr(replay, "_REPORT_S", 0.0)
    return lambda directory: status_of(capsys, "replay", directory)


def test_a_damaged_run_is_resumed_or_refused_in_a_line(died, tmp_path, resume):
    # Iterations that are no numbers, and a config that is a pipe.
    assert damage_and_run(died, tmp_path, (13, 143, 241), resume) == {0}


def test_a_damaged_run_is_played_again_or_refused_in_a_line(died, tmp_path, play_again):
    # Iterations that are no numbers, and a config that is deep.
    assert damage_and_run(died, tmp_path, (None, 6, 296), play_again) == {0}
    assert damage_and_run(died, tmp_path, [212], play_again) == {2}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 200, 50))
def test_two_hundred_damaged_runs_are_resumed_and_played_again(
    died, tmp_path, resume, play_again, first
):
    seeds = range(1000 + first, 1050 + first)
    assert damage_and_run(died, tmp_path, seeds, resume) <= {0, 2}
    assert damage_and_run(died, tmp_path, seeds, play_again) <= {0, 2, 3, 4}


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
