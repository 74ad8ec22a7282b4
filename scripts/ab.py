"""Train variants x seeds with ``esper fit``, then compare them with ``esper compare``.

    python scripts/ab.py --config configs/cartpole.yaml --seeds 0 1 2 3 4 --output runs/ab \
        --variant base --variant "lr3e-3: --model.ppo.learning_rate 3e-3" -- --model.compile max

Each run has the directory ``OUTPUT/<variant>/seed<k>``, with its output in ``fit.log``. A run that
fails stops no other; the exit status is 1 then. Called again, the script skips runs that are
finished (``rank0/process.json`` says so), resumes others from ``checkpoints/last.ckpt`` where that
file exists, and refuses to mix runs of other settings (``ab.txt`` holds the settings of a run). On
a cluster, ``--dry-run`` prints the commands, one a line, for a job array.
"""

import argparse
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from esper_lightning.cli.jobs import Job, command_of, fit_job, start_esper


def main() -> None:
    """Parse the options, train every run, and compare the variants."""
    options = parse()
    jobs = {
        (name, seed): job(options, name, arguments, seed)
        for seed in options.seeds
        for name, arguments in options.variant
    }  # variants vary fastest: an interrupted comparison has whole pairs
    if options.dry_run:
        print("\n".join(command_of(job) for job in jobs.values() if not job.is_finished))
        return
    for one in jobs.values():
        try:
            one.refuse_other_settings()
        except ValueError as error:
            sys.exit(str(error))
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    pool = ThreadPoolExecutor(options.jobs)
    try:
        well = list(pool.map(partial(start, threads=threads), jobs.values()))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C ends the runs, and no other may begin
    every = [jobs[name, seed] for name, _ in options.variant for seed in options.seeds]
    runs = [str(job.run) for job in every if job.has_begun]
    status = 1
    if runs:
        status = start_esper(["compare", *runs, "--output", str(options.output)])
    sys.exit(status or not all(well))


def start(job: Job, *, threads: int) -> bool:
    """Run a job to its end, and print the result; returns whether the run succeeded."""
    if job.is_finished:
        print(f"{job.run}: finished before", flush=True)
        return True
    status, _, says = job.execute(threads=threads)
    end = "finished"
    if status:
        lines = [f"FAILED with exit status {status}; {job.run / 'fit.log'} ends with:", *says]
        end = "\n    ".join(lines)
    print(f"{job.run}: {end}", flush=True)
    return status == 0


def parser() -> argparse.ArgumentParser:
    """The parser of the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="of esper fit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--variant",
        action="append",
        required=True,
        metavar="NAME[: ARGUMENTS]",
        help="the first is the baseline",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left")
    parser.add_argument("arguments", nargs="*", help="of esper fit, for all, after --")
    return parser


def parse() -> argparse.Namespace:
    """The options of this call; each ``--variant`` is a pair of name and arguments."""
    parsed = parser()
    options = parsed.parse_args()
    pairs = [text.partition(":") for text in options.variant]
    options.variant = [(name.strip(), shlex.split(rest)) for name, _, rest in pairs]
    names = [name for name, _ in options.variant]
    if len(set(names)) < len(names) or any(not n or Path(n).name != n for n in names):
        parsed.error(f"--variant must have a name of its own that a folder can have, got {names}")
    if options.jobs < 1:
        parsed.error(f"--jobs must be at least 1, got {options.jobs}")
    return options


def job(options: argparse.Namespace, name: str, arguments: list[str], seed: int) -> Job:
    """The run of a variant and a seed."""
    run = options.output / name / f"seed{seed}"
    configs = [str(config) for config in options.config]
    return fit_job(run, configs, [*options.arguments, *arguments], seed)


if __name__ == "__main__":
    main()
