"""Several ranks are one process with all of their environments, and stay together."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed import DistStoreError

from esper_lightning import PPO, PPOConfig
from esper_lightning.core.ranks import RanksDisagreeError
from esper_lightning.core.tensor_trees import named_tensors
from esper_lightning.envs import CartPole
from esper_lightning.envs.morphogenesis.lifecycle import Stage
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.remains import examine, first_failure
from esper_lightning.training.checkpoint import meeting
from tests import forked
from tests.callbacks.test_run_directory import somebody_in
from tests.training import halves

pytestmark = pytest.mark.ddp
HERE = Path(__file__).parent
TIMES = ("time_s", "env_steps_per_s")


def start(program, *arguments, stderr, more=None):
    env = {**os.environ, **forked.QUIET, **(more or {})}
    words = [HERE / program, *arguments]
    return forked.start(words, output=stderr, env=env, new_session=True, children=True)


def run(directory, **settings):
    """Train in processes of their own; returns the exit status and what they wrote to stderr."""
    words = json.dumps({"directory": str(directory), **settings})
    with tempfile.TemporaryFile() as stderr:
        process = start("ranks.py", words, stderr=stderr)
        try:
            status = process.wait(600)
        finally:
            process.kill()
        stderr.seek(0)
        return status, stderr.read().decode()


def history(directory, rank=0):
    rows = read_json_lines(directory / f"rank{rank}" / "history.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("halves")
    with (directory / "stderr").open("wb") as stderr:
        processes = [start("halves.py", rank, 2, directory, stderr=stderr) for rank in range(2)]
    for process in processes:
        assert process.wait(240) == 0, (directory / "stderr").read_text()
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", halves.CASES)
def test_two_ranks_learn_as_one_process_with_all_environments(of_two_ranks, case):
    first, second = (results[case] for results in of_two_ranks)
    whole = halves.learn(0, 1, case)
    advantage = torch.cat([first.pop("advantage"), second.pop("advantage")], dim=1)
    torch.testing.assert_close(advantage, whole.pop("advantage"), rtol=1e-6, atol=1e-6)
    assert [state["who"].item() for state in first.pop("states")] == [0, 1]
    assert second.pop("states") == []
    assert first.pop("gathered") == second.pop("gathered") == [0, 1]
    whole.pop("states")
    whole.pop("gathered")
    others, expected = dict(named_tensors(second)), dict(named_tensors(whole))
    for name, value in named_tensors(first):
        assert torch.equal(value, others[name]), name
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    applied = whole["metrics"]["gradient_steps"]
    config = halves.CASES[case]
    all_steps = config.epochs * config.minibatches
    assert 1 <= applied < all_steps if case == "stops" else applied == all_steps


@pytest.fixture(scope="module")
def of_1000_steps(tmp_path_factory):
    """Runs that nothing disturbed, by number of ranks."""
    directories = {ranks: tmp_path_factory.mktemp(f"whole{ranks}") for ranks in (1, 2)}
    for ranks, directory in directories.items():
        status, stderr = run(directory, devices=ranks, budget=1000)
        assert status == 0, stderr
    return directories


def check_together(directory, budget):
    rows = history(directory)
    assert rows == history(directory, rank=1)
    assert len({row["digest"] for row in rows}) == len(rows)
    assert [row["env_steps"] for row in rows[:-1]] == [128 * (n + 1) for n in range(len(rows) - 1)]
    assert rows[-1]["env_steps"] == budget // 8 * 8
    assert rows[-1]["rollout/episode_return_mean"] > 5.0
    assert [remains.rows for remains in examine(directory)] == [len(rows)] * 2


def test_ranks_have_the_same_weights_and_metrics_in_every_iteration(of_1000_steps):
    check_together(of_1000_steps[2], 1000)


EVERYTHING = {
    "target_kl": 1e-5,
    "normalize_obs": True,
    "normalize_reward": True,
    "learning_rate_schedule": "adaptive",
}
ALSO = {
    "no episode ends on one rank": {"env": "never ends elsewhere", "ppo": EVERYTHING},
    "compiled": {"compile": "auto", "ppo": EVERYTHING},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ALSO if "compiled" in name]


@pytest.mark.parametrize("case", ["no episode ends on one rank", *SLOW])
@pytest.mark.usefixtures("native_code")
def test_ranks_also_have_the_same_weights_where(tmp_path, case):
    status, stderr = run(tmp_path, devices=2, budget=700, evaluates=False, **ALSO[case])
    assert status == 0, stderr
    check_together(tmp_path, 700)


def test_nan_on_one_rank_ends_both_and_is_blamed_on_it(tmp_path):
    status, _ = run(tmp_path, devices=2, env="breaks elsewhere", budget=1000, evaluates=False)
    assert status != 0
    ranks = examine(tmp_path)
    assert [remains.rows for remains in ranks] == [2, 2]
    assert first_failure(ranks).rank == 1
    reports = [remains.report for remains in ranks]
    assert [report.cause for report in reports] == ["peer", "exception"]
    assert reports[0].error.type.endswith("PeerFailedError")
    assert reports[1].error.type.endswith("NonFiniteError")


def test_ranks_with_other_settings_are_refused_on_all_of_them(tmp_path):
    status, stderr = run(tmp_path, devices=2, budget=1000, elsewhere={"learning_rate": 0.1})
    assert status != 0
    said = "PPO.ppo.learning_rate must be the same on all ranks, got [0.0003, 0.1]. Every host"
    assert stderr.count(f"RanksDisagreeError: {said}") == 2
    assert [history(tmp_path, rank) for rank in range(2)] == [[], []]
    assert not list(tmp_path.rglob("crash.json*"))
    assert not list(tmp_path.rglob("process.json"))


def contents(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


OTHER_SETTINGS = {"devices": 2, "budget": 1000, "elsewhere": {"learning_rate": 0.1}}


def test_a_refused_start_leaves_every_file_as_it_was(tmp_path):
    run(
        tmp_path,
        devices=2,
        env="breaks elsewhere",
        budget=1000,
        evaluates=False,
        config_file="a: 1",
    )
    (tmp_path / "owner.lock").write_text('{"pid": 4194304, "host": "elsewhere"}')  # killed there
    for process in tmp_path.glob("rank*/process.json"):
        replace(ProcessRecord.load(process), host="elsewhere").write(process)
    before = contents(tmp_path)
    assert {"config.yaml", "rank0/crash.json", "rank1/history.jsonl"} <= before.keys()
    for config in ("a: 2", None):
        status, stderr = run(tmp_path, **OTHER_SETTINGS, config_file=config)
        assert status == 1
        assert "RanksDisagreeError" in stderr
        assert contents(tmp_path) == before


def test_a_refused_start_leaves_no_new_directory(tmp_path):
    status, stderr = run(tmp_path / "a" / "b", **OTHER_SETTINGS, config_file="a: 1")
    assert status == 1
    assert "RanksDisagreeError" in stderr
    assert not list(tmp_path.iterdir())


def test_ranks_that_are_refused_a_directory_leave_it_as_it_was(tmp_path):
    run(tmp_path, devices=2, budget=300, evaluates=False)
    with somebody_in(tmp_path):
        before = contents(tmp_path)
        status, stderr = run(tmp_path, devices=2, budget=300, evaluates=False)
        assert status == 1
        assert stderr.count("DirectoryInUseError: The run directory must be free") == 2
        assert contents(tmp_path) == before


def test_ranks_that_wait_long_for_others_say_where(make_trainer, monkeypatch, caplog):
    monkeypatch.setenv("MASTER_ADDR", "first-host")
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setattr(meeting, "_MEETING_S", 0.05)
    model = attached(make_trainer(devices=2, strategy="ddp"))

    def fails():
        time.sleep(0.5)
        raise TimeoutError

    monkeypatch.setattr(model.trainer.strategy, "setup_environment", fails)
    with pytest.raises(TimeoutError):
        model.refuse_other_ranks()
    assert "Rank 0 has waited 0.05 s for all 2 ranks to meet at first-host:1234." in caplog.text


@pytest.mark.parametrize("refused", [0, 1])
def test_a_rank_that_was_refused_before_the_meeting_tells_the_others(tmp_path, refused):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    began, files = time.monotonic(), [tmp_path / f"stderr{rank}" for rank in range(2)]
    processes = []
    for rank, file in enumerate(files):
        more = {**place, "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
        words = (tmp_path / "run", "refused" if rank == refused else "")
        with file.open("wb") as stderr:
            processes.append(start("refused.py", *words, stderr=stderr, more=more))
    try:
        assert [process.wait(100) for process in processes] == [1, 1]
    finally:
        for process in processes:
            process.kill()
    assert time.monotonic() - began < 60  # of half an hour
    said = [file.read_text() for file in files]
    assert "ValueError: PPOConfig.clip must be other" in said[refused]
    assert (
        f"RanksDisagreeError: All ranks must be able to start; rank {refused}: "
        "ValueError: PPOConfig.clip must be other, got 1.0."
    ) in said[1 - refused]
    assert not (tmp_path / "run").exists()


def test_ranks_that_never_meet_are_told_in_one_line(make_trainer, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "first-host")
    monkeypatch.setenv("MASTER_PORT", "1234")
    model = attached(make_trainer(devices=2, strategy="ddp"))

    def fails():
        raise DistStoreError("Timed out after 1801 seconds waiting for clients.\nMore.")

    monkeypatch.setattr(model.trainer.strategy, "setup_environment", fails)
    said = (
        "All 2 ranks must meet at first-host:1234, got 'Timed out after 1801 seconds waiting for "
        "clients.'. The output of the rank that is missing says why."
    )
    with pytest.raises(RanksDisagreeError) as caught:
        model.refuse_other_ranks()
    assert str(caught.value) == said


def test_nobody_is_told_by_a_rank_without_others(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer.strategy, "setup_environment", None)
    with pytest.raises(KeyError, match="mine"), meeting.tells_other_ranks(trainer):
        raise KeyError("mine")


def test_ranks_whose_weights_come_apart_stop_before_they_are_saved(tmp_path):
    settings = {"fault": "drift", "dies_in": 3, "every": 4, "evaluates": False}
    status, stderr = run(tmp_path, devices=2, budget=2000, **settings)
    assert status != 0
    said = r"RuntimeError: The weights of all ranks must be the same, got \['(\w+)', '(\w+)'\]"
    first, second = re.findall(said, stderr)
    assert first == second
    assert len(set(first)) == 2
    assert [row["iteration"] for row in history(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_a_stop_of_one_rank_stops_all(tmp_path):
    status, stderr = run(tmp_path, devices=2, budget=2000, fault="stop", dies_in=3)
    assert status == 0, stderr
    rows = history(tmp_path)
    assert 3 <= len(rows) <= 4
    assert rows == history(tmp_path, rank=1)
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()


@pytest.mark.crash
def test_slurm_ends_ranks_and_they_save_what_they_know(tmp_path):
    name = {"SLURM_JOB_NAME": "esper", "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1"}
    number = {"JOB_ID": 7, "NTASKS": 2, "NTASKS_PER_NODE": 2, "NODEID": 0, "JOB_NUM_NODES": 1}
    slurm = {**name, **{f"SLURM_{key}": str(value) for key, value in number.items()}}
    words = json.dumps({"directory": str(tmp_path), "devices": 2, "budget": 10**6})
    ids = ("SLURM_PROCID", "SLURM_LOCALID")
    with (tmp_path / "stderr").open("wb") as stderr:
        processes = [
            start("ranks.py", words, stderr=stderr, more={**slurm, **dict.fromkeys(ids, str(rank))})
            for rank in range(2)
        ]
    try:
        wait_for(lambda: len(history(tmp_path)) >= 5)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        statuses = [process.wait(60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert 0 not in statuses
    reports = [remains.report for remains in examine(tmp_path)]
    assert {report.cause for report in reports} <= {"signal", "peer"}
    assert reports[0].cause == "signal"


def wait_for(condition, *, seconds=120):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)


def diff(directory, whole, ranks):
    """Where a run that was resumed differs from one that was not: histories and checkpoints."""
    found = []
    for rank in range(ranks):
        pairs = zip(history(directory, rank), history(whole, rank), strict=True)
        found += [(rank, *pair) for pair in pairs if pair[0] != pair[1]]
        files = [d / f"rank{rank}" / "evaluations.jsonl" for d in (directory, whole)]
        found += [rank] if read_json_lines(files[0]) != read_json_lines(files[1]) else []
    names = [path.stem for path in (whole / "checkpoints").glob("*.ckpt")]
    assert "last" in names
    found += [name for name in names if tensors(directory, name) != tensors(whole, name)]
    return found


def tensors(directory, name):
    """Every bit of a checkpoint that training goes on from: optimizer and environments, too."""
    checkpoint = torch.load(directory / "checkpoints" / f"{name}.ckpt", weights_only=True)
    parts = [checkpoint[key] for key in ("state_dict", "optimizer_states", "esper_lightning")]
    named = dict(named_tensors(parts))  # nobody seeds the global generators
    return {k: v.numpy().tobytes() for k, v in named.items() if "global_random" not in k}


def disturbed(directory, ranks, fault, random_moment, budget, **settings):
    """Let a run die and resume it; returns whether it died."""
    moment = {"dies_in": random_moment[0], "delay_s": random_moment[1]}
    rank = ranks - 1
    settings |= {"devices": ranks, "budget": budget}
    died, _ = run(directory, fault=fault, rank=rank, **moment, **settings)
    status, stderr = run(directory, resumes=True, **settings)
    assert status == 0, stderr
    return died != 0


@pytest.mark.crash
@pytest.mark.parametrize(("ranks", "fault"), [(1, "SIGTERM"), (2, "SIGKILL")])
def test_a_run_that_died_is_resumed_bit_for_bit(tmp_path, of_1000_steps, ranks, fault):
    assert disturbed(tmp_path, ranks, fault, (6, 0.0), budget=1000)
    assert diff(tmp_path, of_1000_steps[ranks], ranks) == []


@pytest.mark.crash
@pytest.mark.slow
def test_a_run_with_memory_that_died_is_resumed_bit_for_bit(tmp_path):
    settings = {"budget": 500, "remembers": True, "evaluates": False}
    status, stderr = run(tmp_path / "whole", devices=1, **settings)
    assert status == 0, stderr
    died = tmp_path / "died"
    assert disturbed(died, 1, "SIGKILL", (6, 0.0), **settings)
    assert diff(died, tmp_path / "whole", 1) == []
    assert len(history(died)) == 8


GROWS = {"devices": 1, "env": "grows", "num_envs": 32, "remembers": True, "budget": 8 * 16 * 32}


@pytest.fixture(scope="module")
def of_growth(tmp_path_factory):
    """A run of eight iterations that grows networks, and that nothing disturbed."""
    directory = tmp_path_factory.mktemp("grows")
    status, stderr = run(directory, **GROWS)
    assert status == 0, stderr
    assert len(history(directory)) == 8
    return directory


@pytest.mark.crash
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        pytest.param("SIGKILL", -9, marks=pytest.mark.slow),
        pytest.param("SIGTERM", 143, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_in_the_middle_of_blending_is_resumed_bit_for_bit(
    tmp_path, of_growth, fault, expected
):
    status, stderr = run(tmp_path, fault=fault, rank=0, dies_in=6, delay_s=0.02, **GROWS)
    assert status == expected, stderr
    assert len(history(tmp_path)) == 5
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["esper_lightning"]
    assert saved["iteration"] == 4
    hosts = saved["ranks"][0]["env"]
    blending = hosts["slots.stage"] == Stage.BLENDING
    assert ((hosts["slots.alpha"] > 0) & (hosts["slots.alpha"] < 1) & blending).any()
    status, stderr = run(tmp_path, resumes=True, **GROWS)
    assert status == 0, stderr
    assert diff(tmp_path, of_growth, 1) == []


@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_that_died_at_20_random_moments_are_resumed_bit_for_bit(tmp_path, ranks):
    whole, budget = tmp_path / "whole", 12 * 64 * ranks
    status, stderr = run(whole, devices=ranks, budget=budget)
    assert status == 0, stderr
    dice, deaths = random.Random(ranks), 0
    for number in range(20):
        moment = (dice.randint(1, 12), dice.choice([0.0, dice.uniform(0.0, 0.05)]))
        fault = dice.choice(["SIGKILL", "SIGTERM"])
        directory = tmp_path / str(number)
        deaths += disturbed(directory, ranks, fault, moment, budget)
        assert diff(directory, whole, ranks) == [], (moment, fault)
    assert deaths >= 15


def other_weights(path):
    """Change the optimizer's state, as if the checkpoint were of another run as long as this."""
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["exp_avg"] += 1e-3
    torch.save(checkpoint, path)


def lay_down(last, whole):
    """Leave what a run on another host has left: a checkpoint and the record of its process."""
    last.parent.mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "last.ckpt", last)
    directory = last.parents[1]
    (directory / "rank0").mkdir()
    shutil.copy(whole / "rank0/process.json", directory / "rank0/process.json")


@pytest.mark.parametrize("evaluates", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_rank_that_has_no_checkpoint_resumes_from_that_of_the_first(
    tmp_path, of_1000_steps, evaluates
):
    lay_down(tmp_path / "0" / "checkpoints" / "last.ckpt", of_1000_steps[2])
    settings = {"devices": 2, "budget": 2000, "evaluates": evaluates, "resumes": True}
    status, stderr = run(str(tmp_path / "{rank}"), **settings)
    assert status == 0, stderr
    directory = tmp_path / "0"  # all write where the first one does
    rows = history(directory)
    assert rows == history(directory, rank=1)
    assert [row["iteration"] for row in rows] == list(range(9, 17))
    assert len({row["digest"] for row in rows}) == len(rows)
    assert not (tmp_path / "1" / "checkpoints").exists()


def test_ranks_that_find_different_checkpoints_are_refused(tmp_path, of_1000_steps):
    for rank in range(2):
        last = tmp_path / str(rank) / "checkpoints" / "last.ckpt"
        lay_down(last, of_1000_steps[2])
    other_weights(last)
    began = time.monotonic()
    settings = {"devices": 2, "budget": 2000, "evaluates": False, "resumes": True}
    status, stderr = run(str(tmp_path / "{rank}"), **settings)
    assert time.monotonic() - began < 100
    assert status == 1, stderr
    said = re.findall(
        r"RanksDisagreeError: ckpt_path must be the same on all ranks, got \[(.*)\]", stderr
    )
    assert len(said) == 2, stderr
    assert said[0] == said[1]
    numbers = re.findall(r"\b\d+\b(?= of|,|$)", said[0])
    assert list(map(int, numbers)) == [8, 8]
    assert len(set(said[0].split(", "))) == 2  # they can be told apart
    directory = tmp_path / "0"
    assert [history(directory, rank) for rank in range(2)] == [[], []]
    assert not list(tmp_path.rglob("crash.json*"))


def attached(trainer, **settings):
    model = PPO(CartPole(num_envs=4), ppo=PPOConfig(minibatches=2), **settings)
    model.trainer = trainer
    return model


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_launchers_that_lose_the_state_of_a_run_are_refused(make_trainer, strategy):
    model = attached(make_trainer(devices=2, strategy=strategy))
    with pytest.raises(ValueError, match="hand back weights and nothing else"):
        model.configure_callbacks()


def test_sharded_weights_are_refused(make_trainer, monkeypatch):
    model = attached(make_trainer())
    monkeypatch.setattr(Trainer, "strategy", FSDPStrategy())
    with pytest.raises(ValueError, match=r"be 'ddp'.*got 'FSDPStrategy'.*weights as one vector"):
        model.configure_callbacks()


def test_a_budget_of_less_than_a_step_of_all_ranks_is_refused(make_trainer):
    model = attached(make_trainer(devices=2, strategy="ddp"), total_env_steps=7)
    with pytest.raises(ValueError, match=r"env.num_envs \* Trainer.world_size = 8, got 7"):
        model.configure_callbacks()


@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_minutes_of_deaths_end_with_the_weights_of_an_undisturbed_run(tmp_path):
    """Killed and terminated by turns at random moments: starting, training, saving, evaluating."""
    whole, directory, settings = tmp_path / "whole", tmp_path / "soak", {"devices": 2, "every": 7}
    settings |= {"budget": 128 * 1500}
    status, stderr = run(whole, **settings)
    assert status == 0, stderr
    dice, began, deaths = random.Random(0), time.monotonic(), 0
    words = json.dumps({"directory": str(directory), "resumes": True, **settings})
    while time.monotonic() - began < 180:
        with (tmp_path / "stderr").open("ab") as stderr:
            process = start("ranks.py", words, stderr=stderr)
        try:
            process.wait(dice.uniform(2.0, 15.0))
        except subprocess.TimeoutExpired:
            process.send_signal(dice.choice([signal.SIGKILL, signal.SIGTERM]))
            deaths += 1
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:  # torch waits for half an hour to meet the first rank
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    status, stderr = run(directory, resumes=True, **settings)
    assert status == 0, stderr
    assert diff(directory, whole, 2) == []
    assert deaths >= 5
    print(f"{deaths} deaths, {len(history(directory))} iterations")
