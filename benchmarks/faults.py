"""Deaths of runs by every fault in ``tests/crash/cases.py``. Writes ``results/faults.md``."""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from conditions import benchmark_parser, results  # noqa: E402

from tests.crash.cases import ALL, ALL_RANKS, Case, RankCase, expected, name  # noqa: E402
from tests.crash.harness import FAILING_OPERATOR, Outcome, run, run_ranks  # noqa: E402
from tests.crash.test_faults import check  # noqa: E402
from tests.crash.test_ranks import check_ranks  # noqa: E402


def measure(cases: list[Case], rank_cases: list[RankCase]) -> list[str]:
    """Tables of the evidence that every case left, with counts above them."""
    totals, of_ranks = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        places = [Path(folder) / str(number) for number in range(len(cases))]
        outcomes = pool.map(run, cases, places)
        rows = [row_of(*done, totals) for done in zip(cases, outcomes, strict=True)]
        places = [Path(folder) / f"ranks{number}" for number in range(len(rank_cases))]
        outcomes = pool.map(run_ranks, rank_cases, places)
        rank_rows = [row_of_ranks(*d, of_ranks) for d in zip(rank_cases, outcomes, strict=True)]
    one = ("fault, profiler, ...", "status", "cause", "error", "saved", "s", "")
    two = ("fault, strategy, rank that dies", "status", "rank 0: saved", "rank 1: saved", "s", "")
    lines = [*counted(totals), *table(one, rows), "", "## Two ranks, one of which dies", ""]
    return [*lines, *counted(of_ranks), *table(two, rank_rows)]


def row_of(case: Case, outcome: Outcome, totals: Counter[str]) -> str:
    """A row of the first table: a case in one process."""
    wrong, report = check(case, outcome), outcome.report() or {}
    totals["runs"] += 1
    totals["as expected"] += not wrong
    totals["with the failing step in a trace"] += any(
        FAILING_OPERATOR in content for content in outcome.traces()
    )
    totals["of which it was due in"] += expected(case).trace
    totals["with a report"] += bool(report)
    count_ends(outcome, totals)
    error = (report.get("error") or {}).get("type")
    cells = (name(case), outcome.status, report.get("cause"), error, saved(report))
    return row(*cells, f"{outcome.seconds:.1f}", verdict(wrong))


def row_of_ranks(case: RankCase, outcome: Outcome, totals: Counter[str]) -> str:
    """A row of the second table: a case of two ranks."""
    wrong = check_ranks(case, outcome)
    totals["runs"] += 1
    totals["as expected"] += not wrong
    totals["with a report of both ranks"] += all(outcome.report(rank) for rank in (0, 1))
    count_ends(outcome, totals)
    reports = [outcome.report(rank) or {} for rank in (0, 1)]
    left = [f"{report.get('cause')}: {saved(report)}" for report in reports]
    seconds = f"{outcome.seconds:.1f}"
    return row(", ".join(map(str, case)), outcome.status, *left, seconds, verdict(wrong))


def count_ends(outcome: Outcome, totals: Counter[str]) -> None:
    totals["that had to be killed"] += outcome.status is None
    totals["with leftovers"] += bool(outcome.leftovers)


def saved(report: dict[str, dict[str, dict[str, str]]]) -> str:
    """Names of the evidence that was saved."""
    return ", ".join(k for k, v in report.get("evidence", {}).items() if v["state"] == "saved")


def verdict(wrong: list[str]) -> str:
    return "; ".join(wrong) or "as expected"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(heads: tuple[str, ...], rows: list[str]) -> list[str]:
    return ["", row(*heads), "| --- " * len(heads) + "|", *rows]


def counted(totals: Counter[str]) -> Iterable[str]:
    return [f"- {label}: {count}" for label, count in totals.items()]


def parser() -> argparse.ArgumentParser:
    smallest = {"cases": ALL[:1], "rank_cases": ALL_RANKS[:1]}
    parser = benchmark_parser(__doc__, smallest)
    parser.set_defaults(cases=ALL, rank_cases=ALL_RANKS)
    return parser


def main() -> None:
    options = parser().parse_args()
    with results(__file__, options, threads="one thread a run") as files:
        files.write("What runs leave when they die", measure(options.cases, options.rank_cases))


if __name__ == "__main__":
    main()
