"""``esper report RUN_DIR``: what a run reached, and how it ended. Needs no torch."""

import math
from pathlib import Path

from esper_lightning.cli.errors import CommandParser, fail
from esper_lightning.forensics.files import strict_json

__all__ = ["run"]

_PLACES = 10  # of the learning curve


def run(arguments: list[str]) -> None:
    """Print the report; exit status 2 where there is no run."""
    # PyYAML is not in the standard library, and esper crash does without.
    from esper_lightning.comparison.runs import read_run  # noqa: PLC0415

    parser = CommandParser("esper report", "What a run reached.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    options = parser.parse_args(arguments)
    try:
        found = read_run(options.run_dir)
    except (ValueError, OSError) as error:
        fail(error)
    if options.json:
        print(strict_json(found))
        return
    environment = str(found.settings.get("env.class_path")).rpartition(".")[2]
    budget = "" if found.budget is None else f" of {found.budget:,}"
    rate = found.env_steps / found.time_s if found.time_s > 0 else 0.0
    print(f"Run directory: {found.directory}")
    print(f"{environment}, seed {found.seed}: {found.how}")
    took = f"in {found.time_s:.1f} s: {rate:,.0f} env-steps/s"
    print(f"Trained for {found.env_steps:,}{budget} env steps {took}")
    for score, points in found.points.items():
        finite = [point for point in points if math.isfinite(point.value)]
        if not finite:
            print(f"No return of {score}s is known.")
            continue
        best = max(finite, key=lambda point: point.value)
        print(f"\n{'env steps':>12}  mean return ({score})")
        last = len(points) - 1
        shown = sorted({k * last // (_PLACES - 1) for k in range(_PLACES)})
        for env_steps, value in (points[k] for k in shown):
            print(f"{env_steps:>12,}  {value:.4g}")
        print(f"Best of {len(points)}: {best.value:.4g} at {best.env_steps:,} env steps")
