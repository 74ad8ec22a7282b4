"""Two hosts, each with its own disk or with a shared one: train, die by each fault, and resume."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper_lightning.forensics.attempts import read_attempts
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.remains import examine, first_failure
from tests.crash.hosts import Ended, Hosts, HostsError, two_hosts

pytestmark = [pytest.mark.crash, pytest.mark.ddp, pytest.mark.slow, pytest.mark.timeout(1800)]
CARTPOLE = Path(__file__).parents[2] / "configs" / "cartpole.yaml"
ITERATIONS = 20
TIMES = ("time_s", "env_steps_per_s")
SURVIVES_S = 7.0
_ports = itertools.count(29600)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    try:
        with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
            yield made
    except HostsError as error:
        pytest.skip(f"no network namespaces here: {error}")


def train(
    hosts: Hosts, run_dir: Path, name: str, *, fault: dict[str, object] | None = None
) -> Ended:
    """Train with one rank on each host, from the latest checkpoint if there is one."""
    callbacks = []
    if fault is not None:
        callbacks = [{"class_path": "tests.crash.dies.Dies", "init_args": fault}]
    settings = {
        "model.env.num_envs": 8,
        "model.ppo.rollout_steps": 8,
        "model.ppo.epochs": 1,
        "model.ppo.minibatches": 2,
        "model.iterations_per_epoch": 5,
        "model.total_env_steps": ITERATIONS * 2 * 8 * 8,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "cpu",
        "trainer.strategy": "ddp",
        "trainer.num_nodes": 2,
        "trainer.callbacks": json.dumps(callbacks),
        "ckpt_path": "last",
    }
    named = [f"--{name}={value}" for name, value in settings.items()]
    fit = ["-m", "esper_lightning.cli.main", "fit", f"--config={CARTPOLE}", *named]
    return hosts.run([*fit, f"--run_dir={run_dir}"], name, port=next(_ports))


def histories(runs: list[Path]) -> list[list[dict[str, object]]]:
    return [
        [
            {name: value for name, value in row.items() if name not in TIMES}
            for row in read_json_lines(run / f"rank{rank}" / "history.jsonl")
        ]
        for rank, run in enumerate(runs)
    ]


@pytest.fixture(scope="module")
def undisturbed(hosts) -> list[list[dict[str, object]]]:
    ended = train(hosts, hosts.disk / "undisturbed" / "run", "undisturbed")
    assert ended.statuses == (0, 0), ended.outputs
    found = histories([disk / "undisturbed" / "run" for disk in hosts.disks])
    assert [len(rows) for rows in found] == [ITERATIONS, ITERATIONS]
    return found


@pytest.mark.parametrize(
    ("how", "rank", "shared"),
    [
        ("kill", 1, False),
        ("kill", 0, False),
        ("kill", 1, True),
        ("container", 1, True),
        ("container", 0, True),
        ("raise", 1, False),
        ("raise", 0, True),
    ],
)
def test_a_fault_on_one_of_two_hosts(hosts, undisturbed, tmp_path, how, rank, shared):
    fault = {"at": 12, "how": how, "rank": rank, "once": str(tmp_path / "once")}
    run_dir = (tmp_path if shared else hosts.disk) / tmp_path.name / "run"
    runs = [(tmp_path if shared else disk) / tmp_path.name / "run" for disk in hosts.disks]
    died = train(hosts, run_dir, tmp_path.name, fault=fault)
    print(f"{how} of rank {rank}, shared={shared}: survived {died.survived_s:.1f} s")
    assert all(died.statuses), died.outputs
    assert died.survived_s < SURVIVES_S, died.outputs
    first = first_failure(examine(*dict.fromkeys(runs)))
    assert first is not None
    assert (first.rank, first.is_first_cause) == (rank, True)
    ended = train(hosts, run_dir, tmp_path.name, fault=fault)
    assert ended.statuses == (0, 0), ended.outputs
    assert histories(runs) == undisturbed
    attempts = read_attempts(dict.fromkeys(runs))
    assert [each.state for each in attempts] == ["failed", "finished"]
    cause = "exception" if how == "raise" else "vanished"
    assert (attempts[0].cause, attempts[0].rank, attempts[0].iteration) == (cause, rank, 12)
