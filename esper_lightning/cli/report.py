"""``esper report RUN_DIR``: the results of a run, and how it ended. Needs no torch."""

import math
from typing import TYPE_CHECKING

from esper_lightning.cli.crash_text import describe_start
from esper_lightning.cli.errors import CommandParser, fail, local_path
from esper_lightning.forensics.files import strict_json
from esper_lightning.forensics.reading import printable
from esper_lightning.forensics.remains import unrecorded_start

if TYPE_CHECKING:
    from esper_lightning.comparison.runs import Run

__all__ = ["run"]

_PLACES = 10  # points of the learning curve that are printed


def run(arguments: list[str]) -> None:
    """Print the results of a run; exit with status 2 where there is no run."""
    # This import needs PyYAML, which is not in the standard library.
    from esper_lightning.comparison.runs import read_run  # noqa: PLC0415

    parser = CommandParser("esper report", "What a run reached.")
    parser.add_argument("run_dir", type=local_path, metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    options = parser.parse_args(arguments)
    try:
        found = read_run(options.run_dir)
    except (ValueError, OSError) as error:
        fail(error)
    if options.json:
        print(strict_json(found))
    else:
        started = unrecorded_start(options.run_dir)
        if started:
            print(printable(f"{describe_start(started)} What follows is of the run before."))
        print("\n".join(map(printable, _describe(found))))


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
