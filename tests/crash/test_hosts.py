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
def hosts() -> Iterator[Hosts]:
    try:
        with two_hosts() as made:
            yield made
    except HostsError as error:
        pytest.skip(f"no network namespaces here: {error}")


def train(
    hosts: Hosts, folder: Path, *, shared: bool = False, fault: dict[str, object] | None = None
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
    words = [[*fit, f"--run_dir={run}"] for run in directories(folder, shared=shared)]
    return hosts.run(words, [folder / "a", folder / "b"], port=next(_ports))


def directories(folder: Path, *, shared: bool) -> list[Path]:
    """Run directory of each host."""
    return [folder / ("shared" if shared else name) / "run" for name in "ab"]


def histories(runs: list[Path]) -> list[list[dict[str, object]]]:
    return [
        [
            {name: value for name, value in row.items() if name not in TIMES}
            for row in read_json_lines(run / f"rank{rank}" / "history.jsonl")
        ]
        for rank, run in enumerate(runs)
    ]


@pytest.fixture(scope="module")
def undisturbed(hosts, tmp_path_factory) -> list[list[dict[str, object]]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = train(hosts, folder)
    assert ended.statuses == (0, 0), ended.outputs
    found = histories(directories(folder, shared=False))
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
    died = train(hosts, tmp_path, shared=shared, fault=fault)
    print(f"{how} of rank {rank}, shared={shared}: survived {died.survived_s:.1f} s")
    assert all(died.statuses), died.outputs
    assert died.survived_s < SURVIVES_S, died.outputs
    runs = directories(tmp_path, shared=shared)
    first = first_failure(examine(*dict.fromkeys(runs)))
    assert first is not None
    assert (first.rank, first.is_first_cause) == (rank, True)
    ended = train(hosts, tmp_path, shared=shared, fault=fault)
    assert ended.statuses == (0, 0), ended.outputs
    assert histories(runs) == undisturbed
    attempts = read_attempts(dict.fromkeys(runs))
    assert [each.state for each in attempts] == ["failed", "finished"]
    cause = "exception" if how == "raise" else "vanished"
    assert (attempts[0].cause, attempts[0].rank, attempts[0].iteration) == (cause, rank, 12)
