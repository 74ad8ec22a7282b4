"""``esper report RUN_DIR``: the results of a run, and how it ended. Needs no torch.

``--html`` writes a page of the run, or of the comparison of several runs, as one file.
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from esper_lightning.cli.crash_text import describe_start
from esper_lightning.cli.errors import CommandParser, fail, local_path
from esper_lightning.core.paths import require_output
from esper_lightning.forensics.files import strict_json, write_atomically
from esper_lightning.forensics.reading import printable
from esper_lightning.forensics.remains import unrecorded_start

if TYPE_CHECKING:
    from esper_lightning.comparison.runs import Run

__all__ = ["run"]

_PLACES = 10  # points of the learning curve that are printed


def run(arguments: list[str]) -> None:
    """Print or write the results of a run; exit with status 2 where there is no run."""
    parser = CommandParser("esper report", "What a run reached, or what several runs did.")
    parser.add_argument(
        "runs", type=local_path, nargs="+", metavar="RUN_DIR", help="several with --html"
    )
    parser.add_argument("--json", action="store_true", help="the same for programs")
    parser.add_argument(
        "--html",
        nargs="?",
        const="",
        metavar="FILE",
        help="write a page for a browser; report.html in the run directory if not given",
    )
    options = parser.parse_args(arguments)
    if options.html is not None:
        if options.json:
            fail("--html must not be given with --json.")
        _write_page(options)
        return
    if len(options.runs) > 1:
        fail("RUN_DIR must be one run without --html, got several. esper compare compares runs.")
    _print(options.runs[0], as_json=options.json)


def _print(run_dir: Path, *, as_json: bool) -> None:
    # This import needs PyYAML, which is not in the standard library.
    from esper_lightning.comparison.runs import read_run  # noqa: PLC0415

    try:
        found = read_run(run_dir)
    except (ValueError, OSError) as error:
        fail(error)
    if as_json:
        print(strict_json(found))
    else:
        started = unrecorded_start(run_dir)
        if started:
            print(printable(f"{describe_start(started)} What follows is of the run before."))
        print("\n".join(map(printable, _describe(found))))


def _write_page(options: argparse.Namespace) -> None:
    """Write the page of a run, or of the comparison of all runs at and below the paths."""
    from esper_lightning.cli.pages.elements import PAGE_BEGINS  # noqa: PLC0415
    from esper_lightning.cli.pages.run_page import PAGE, run_page  # noqa: PLC0415
    from esper_lightning.comparison.runs import find_runs  # noqa: PLC0415

    try:
        runs = find_runs(options.runs)
        if not options.html and len(runs) > 1:
            fail(f"--html must name a file for the page of several runs, got {len(runs)} runs.")
        wanted = options.html or runs[0] / PAGE
        path = require_output("--html", wanted, "page", PAGE_BEGINS)
        if len(runs) == 1:
            content = run_page(runs[0])
        else:
            from esper_lightning.cli.compare import compare_runs  # noqa: PLC0415
            from esper_lightning.cli.pages.comparison_page import comparison_page  # noqa: PLC0415

            content = comparison_page(compare_runs(options.runs))
        write_atomically(path, content.encode())
    except (ValueError, OSError) as error:
        fail(error)
    print(f"Page: {path}")


def _describe(run: "Run") -> list[str]:
    environment = str(run.settings.get("env.class_path")).rpartition(".")[2]
    budget = "" if run.budget is None else f" of {run.budget:,}"
    rate = run.env_steps / run.time_s if run.time_s > 0 else 0.0
    took = f"in {run.time_s:.1f} s: {rate:,.0f} env-steps/s"
    lines = [
        f"Run directory: {run.directory}",
        f"{environment}, seed {run.seed}: {run.how}",
        f"Trained for {run.env_steps:,}{budget} env steps {took}",
        *run.remarks,
    ]
    for score, points in run.points.items():
        finite = [point for point in points if math.isfinite(point.value)]
        if not finite:
            lines.append(f"No return of {score}s is known.")
            continue
        best = max(finite, key=lambda point: point.value)
        lines += ["", f"{'env steps':>12}  mean return ({score})"]
        last = len(points) - 1
        shown = sorted({k * last // (_PLACES - 1) for k in range(_PLACES)})
        lines += [f"{points[k].env_steps:>12,}  {points[k].value:.4g}" for k in shown]
        lines.append(f"Best of {len(points)}: {best.value:.4g} at {best.env_steps:,} env steps")
    return lines
