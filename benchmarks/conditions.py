"""Under what a figure was measured: hardware, versions, commit, command, date."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def conditions(command: str, threads: str = "one thread a run") -> str:
    """Lines for the head of a results file."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "lightning", "torchmetrics")
    )
    return "\n".join(
        [
            f"- hardware: {cpu}, {os.cpu_count()} cores, {threads}",
            f"- versions: Python {platform.python_version()}, {packages}",
            f"- commit: {commit.stdout.strip() or 'unknown'}",
            f"- command: `{command}`",
            f"- date: {datetime.datetime.now(tz=datetime.UTC).date()}",
        ]
    )
