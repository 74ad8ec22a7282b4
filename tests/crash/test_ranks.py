"""Two ranks, one of which dies: both save their evidence, and the first failure is named."""

import pytest

from esper_lightning.forensics.collectives import describe_collectives
from esper_lightning.forensics.remains import Remains, examine, first_failure, rank_folders
from esper_lightning.forensics.report import CrashReport
from tests.crash.cases import ALL_RANKS, QUICK_RANKS, RankCase, name_ranks
from tests.crash.harness import FAILING_OPERATOR, Outcome, read_trace, run_ranks

pytestmark = [pytest.mark.crash, pytest.mark.ddp]
_CAUSES = {"killed": "vanished", "terminated": "signal"}
_MORE = [case for case in ALL_RANKS if case not in QUICK_RANKS]


def check_ranks(case: RankCase, outcome: Outcome) -> list[str]:
    """Faults in the files that two ranks left."""
    ranks = examine(outcome.directory) if rank_folders(outcome.directory) else []
    found = {
        "ranks": ([remains.rank for remains in ranks], [0, 1]),
        "ended by itself": (outcome.status is not None, True),
        "failed": (outcome.status != 0, True),
        "left over": (outcome.leftovers, []),
    }
    first = first_failure(ranks)
    found["first failure"] = (None if first is None else first.rank, case.rank)
    for remains in ranks:
        died, who = remains.rank == case.rank, f"rank {remains.rank}"
        report = remains.report or CrashReport()
        cause = _CAUSES.get(case.fault, "exception") if died else "peer"
        found[f"{who}: cause"] = (report.cause, cause)
        found[f"{who}: complete"] = (report.complete, True)
        found[f"{who}: rows"] = (remains.rows, 6)
        traced = [_has_failing_step(remains)] if remains.windows else []
        due = [] if died and case.fault == "killed" else [died]
        found[f"{who}: failing step traced"] = (traced, due)
    if len(ranks) == 2:
        apart_s = ranks[1 - case.rank].time_s - ranks[case.rank].time_s
        found["the peer saved within 10 s"] = (apart_s < 10, True)
    return [f"{k}: {seen!r}, not {right!r}" for k, (seen, right) in found.items() if seen != right]


def _has_failing_step(remains: Remains) -> bool:
    assert remains.trace_path is not None
    return FAILING_OPERATOR in read_trace(remains.trace_path)


@pytest.mark.parametrize("case", QUICK_RANKS, ids=name_ranks)
def test_every_rank_saves_its_own(tmp_path, case):
    outcome = run_ranks(case, tmp_path)
    assert not check_ranks(case, outcome), outcome.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("case", _MORE, ids=name_ranks)
def test_every_rank_saves_its_own_also_where(tmp_path, case):
    outcome = run_ranks(case, tmp_path)
    assert not check_ranks(case, outcome), outcome.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hang_that_ends_leaves_no_rank_and_names_the_one_that_never_came(tmp_path, rank):
    outcome = run_ranks(RankCase(fault="stuck", strategy="torchrun", rank=rank), tmp_path)
    assert outcome.status == 1, outcome.stderr[-3000:]
    assert outcome.leftovers == []
    ranks = examine(tmp_path)
    assert [(each.rank, each.state) for each in ranks] == [(0, "failed"), (1, "failed")]
    assert {each.report.cause for each in ranks if each.report} <= {"hang", "peer", "signal"}
    lines = describe_collectives({each.rank: each.collectives for each in ranks})
    assert lines[-1].startswith("Never reached #")
    assert lines[-1].endswith(f": rank {rank}")
