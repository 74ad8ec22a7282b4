"""Let runs die of every fault in ``tests/crash/cases.py``: writes ``results/faults.md``."""

import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from conditions import conditions  # noqa: E402

from tests.crash.cases import ALL, expected, name  # noqa: E402
from tests.crash.harness import Outcome, run  # noqa: E402
from tests.crash.test_faults import check  # noqa: E402


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        places = [Path(folder) / str(number) for number in range(len(ALL))]
        outcomes = list(pool.map(run, ALL, places))
        problems = [check(case, outcome) for case, outcome in zip(ALL, outcomes, strict=True)]
        reports = [read(outcome) for outcome in outcomes]
    totals = Counter[str]()
    rows: list[str] = []
    for case, outcome, wrong, report in zip(ALL, outcomes, problems, reports, strict=True):
        due = expected(case)
        totals["runs"] += 1
        totals["as expected"] += not wrong
        totals["with the failing step in a trace"] += report["trace"]
        totals["of which it was due in"] += due.trace
        totals["with a report"] += report["cause"] is not None
        totals["that had to be killed"] += outcome.status is None
        totals["with leftovers"] += bool(outcome.leftovers)
        cells = (name(case), outcome.status, report["cause"], report["error"], report["evidence"])
        verdict = "; ".join(wrong) or "as expected"
        rows.append(" | ".join(["", *map(str, cells), f"{outcome.seconds:.1f}", verdict, ""]))
    head = ["# What runs leave when they die", "", conditions("make faults"), ""]
    counted = [f"- {label}: {count}" for label, count in totals.items()]
    table = ["| fault, profiler, ... | status | cause | error | evidence saved | s | |"]
    lines = [*head, *counted, "", *table, "| --- " * 7 + "|", *(row.strip() for row in rows)]
    target = ROOT / "benchmarks" / "results" / "faults.md"
    target.write_text("\n".join(lines) + "\n")
    print("\n".join(counted))


def read(outcome: Outcome) -> dict[str, object]:
    """What the table shows; read while the folder is there."""
    report = outcome.report() or {}
    evidence = report.get("evidence", {})
    saved = [key for key, entry in evidence.items() if entry["state"] == "saved"]
    error = (report.get("error") or {}).get("type")
    trace = any(b"aten::special_erfcx" in content for content in outcome.traces())
    return {
        "cause": report.get("cause"),
        "error": error,
        "evidence": ", ".join(saved),
        "trace": trace,
    }


if __name__ == "__main__":
    main()
