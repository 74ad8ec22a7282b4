"""Commands that documents, scripts and configs name can be run as they are written."""

import re
from pathlib import Path

import pytest

from tests.benchmarks.commands import wrong

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
SOURCES = [
    *sorted(ROOT.glob("benchmarks/*.py")),
    *sorted(path for path in ROOT.glob("scripts/*") if path.is_file()),
    *sorted(ROOT.glob("configs/*.yaml")),
]
PROJECT = ROOT / "esper_lightning/cli/project"
PROGRAMS = "esper|make|pip|python|torchrun|sbatch"


def commands() -> list[tuple[str, str]]:
    """Commands of every document and source: console lines, inline code, lines of comments."""
    found: list[tuple[str, str]] = []
    for path in DOCUMENTS:
        text = path.read_text().replace("\\\n", " ")
        console = "\n".join(re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
        named = re.findall(r"^\$ (.*)$", console, re.MULTILINE)
        named += re.findall(
            rf"`((?:{PROGRAMS}) [^`]*)`",
            re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE),
        )
        found += [(path.name, " ".join(command.split())) for command in named]
    for path in SOURCES:
        text = path.read_text().replace("\\\n", " ").replace("\\\\\n", " ")
        named = re.findall(r"^(?:    |#   )((?:python|sbatch) .*)$", text, re.MULTILINE)
        named += re.findall(r"^# .*?(esper fit --config .*)$", text, re.MULTILINE)
        found += [(path.name, " ".join(command.split())) for command in named]
    # A text with "..." or a placeholder is no whole command.
    return [(name, command) for name, command in dict.fromkeys(found) if "..." not in command]


@pytest.mark.parametrize(("name", "command"), commands())
def test_a_command_that_is_named_exists_with_its_options(name, command, monkeypatch):
    # The config.yaml that documents speak of is that of esper init.
    monkeypatch.chdir(PROJECT if "fit --config config.yaml" in command else ROOT)
    monkeypatch.syspath_prepend(PROJECT)
    monkeypatch.setattr("sys.argv", ["esper"])
    assert wrong(command) is None


@pytest.mark.parametrize(
    "command",
    [
        "python benchmarks/throughput.py --rounds 7 --quick",
        "python benchmarks/nothing.py",
        "python scripts/ab.py --config configs/cartpole.yaml --output a --variant 'b: --no 1'",
        "make nothing",
        "pip install '.[nothing]'",
        "esper fit --config configs/cartpole.yaml --model.nothing 1",
        "esper fit --config configs/nothing.yaml",
        "esper compare runs --nothing",
        "esper evaluate --ckpt_path runs --nothing 1",
        "torchrun -m esper_lightning.cli.main fit --config configs/cartpole.yaml --nothing",
        "sbatch scripts/slurm.sh --config configs/nothing.yaml",
        "nothing",
        "cd runs && make nothing",
        "python -m nothing",
    ],
)
def test_a_command_that_does_not_exist_is_found(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["esper"])
    assert wrong(command)
