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
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from esper_lightning.forensics.files import write_atomically
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.reading import printable, read_file

ESPER = [sys.executable, "-m", "esper_lightning.cli.main"]
SHOWN_LINES = 15
LONGEST_END = 1 << 16  # bytes at the end of a log from which the shown lines are read


class Job(NamedTuple):
    """One run: its directory, its command and the settings with which it is started."""

    place: tuple[int, int]  # numbers of variant and seed in the order of the command line
    run: Path
    command: list[str]
    started_with: str

    @property
    def is_finished(self) -> bool:
        """Whether the run ended by itself."""
        process = ProcessRecord.read(RunLayout(self.run).rank(0).process)
        return process is not None and process.state == "finished"

    @property
    def has_begun(self) -> bool:
        """Whether the run started training: its settings were accepted and written."""
        return RunLayout(self.run).config.is_file()

    def start(self, environment: dict[str, str]) -> bool:
        """Run the command to its end, and print the result; returns whether the run succeeded."""
        if self.is_finished:
            print(f"{self.run}: finished before", flush=True)
            return True
        write_atomically(self.run / "ab.txt", self.started_with.encode())
        log = self.run / "fit.log"
        with log.open("ab") as file:  # the output of earlier attempts stays
            status = subprocess.run(
                self.command, stdout=file, stderr=file, env=environment, check=False
            ).returncode
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LONGEST_END))
            lines = file.read(LONGEST_END).decode(errors="replace").splitlines()
        said = [] if status == 0 else [f"    {printable(line)}" for line in lines[-SHOWN_LINES:]]
        end = "finished" if status == 0 else f"FAILED with exit status {status}; {log} ends with:"
        print("\n".join([f"{self.run}: {end}", *said]), flush=True)
        return status == 0


def main() -> None:
    """Parse the options, train every run, and compare the variants."""
    options = parse()
    jobs = [
        job(options, variant, seed) for seed in options.seeds for variant in options.variant
    ]  # variants vary fastest: an interrupted comparison has whole pairs
    if options.dry_run:
        print("\n".join(shlex.join(job.command) for job in jobs if not job.is_finished))
        return
    for one in jobs:
        before = one.run / "ab.txt"
        if one.has_begun and before.exists() and not is_content(before, one.started_with):
            sys.exit(f"{before} must be of the same settings. Choose another --output.")
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    pool = ThreadPoolExecutor(options.jobs)
    try:
        well = list(pool.map(lambda job: job.start(environment), jobs))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C ends the runs, and no other may begin
    runs = [str(job.run) for job in sorted(jobs, key=lambda job: job.place) if job.has_begun]
    compare = [*ESPER, "compare", *runs]
    status = 1
    if runs:
        status = subprocess.run([*compare, "--output", str(options.output)], check=False).returncode
    sys.exit(status or not all(well))


def is_content(path: Path, text: str) -> bool:
    """Whether a path is a file that holds a text."""
    try:
        return read_file(path) == text.encode()
    except (FileNotFoundError, ValueError):
        return False


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


def job(options: argparse.Namespace, variant: tuple[str, list[str]], seed: int) -> Job:
    """The run of a variant and a seed."""
    name, arguments = variant
    run = options.output / name / f"seed{seed}"
    configs = [word for config in options.config for word in ("--config", str(config))]
    settings = [*configs, *options.arguments, *arguments, "--model.seed", str(seed)]
    where = ["--run_dir", str(run), "--ckpt_path", "last"]
    where += ["--trainer.enable_progress_bar", "false"]
    contents = [config.read_text() for config in options.config]
    started_with = "\n".join([shlex.join(settings), *contents])
    place = options.variant.index(variant), options.seeds.index(seed)
    return Job(place, run, [*ESPER, "fit", *settings, *where], started_with)


if __name__ == "__main__":
    main()
