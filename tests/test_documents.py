"""The programs in README and docs run, and everything beside the package can be read.

The Python blocks of a document are one program, in the order in which a reader meets them. The fast
test ends every fit after three iterations; the slow one runs the programs as they are written. A
block is not run if an HTML comment before it says ``not run:`` and the reason.
"""

import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tests import forked

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not run: (.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
FORMS = sorted([*ROOT.glob(".github/**/*.yml"), *ROOT.glob("*.yml"), ROOT / "CITATION.cff"])
# Fits end after three iterations (or, of a run that is resumed, at once) with an evaluation.
SHORT = """
import functools
from lightning.pytorch import Trainer
from esper_lightning import PPO


def shortened(kind, change):
    begin = kind.__init__

    @functools.wraps(begin)
    def init(self, *args, **settings):
        begin(self, *args, **change(settings))

    kind.__init__ = init


shortened(Trainer, lambda settings: settings | {"max_steps": 3})
shortened(PPO, lambda settings: settings | {"iterations_per_epoch": 3, "eval_episodes": 2})
"""


def blocks(text: str, language: str) -> list[str]:
    """The blocks of a document in a language, without those that are not run."""
    return [code for reason, tag, code in BLOCK.findall(text) if tag == language and not reason]


def program(path: Path) -> str:
    return "\n".join(blocks(path.read_text(), "python"))


PROGRAMS = [path for path in DOCUMENTS if program(path)]


def run(code, folder, **variables):
    file = folder / "program.py"
    file.write_text(code)
    env = {**os.environ, **forked.QUIET, "PYTHONPATH": f"{ROOT}:{folder}", **variables}
    return forked.run([file], cwd=folder, env=env, children=True)


def run_short(code, folder):
    return run(SHORT + code, folder, TORCH_COMPILE_DISABLE="1")  # compiling would take longer


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_the_program_of_a_document_runs(path, tmp_path):
    result = run_short(program(path), tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_the_program_of_a_document_runs_as_it_is_written(path, tmp_path):
    result = run(program(path), tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_program_that_fails_is_noticed(tmp_path):
    assert run_short("raise ValueError", tmp_path).returncode == 1


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_the_blocks_of_a_document_are_formatted_as_python(path):
    for code in blocks(path.read_text(), "python"):
        compile(code, path.name, "exec")
        assert max(map(len, code.splitlines())) <= 100


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_yaml_of_a_document_can_be_read(path):
    for text in blocks(path.read_text(), "yaml"):
        assert yaml.safe_load(text)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_workflows_forms_and_settings_of_the_site_can_be_read(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_every_page_of_the_site_is_in_its_navigation_and_in_llms_txt():
    pages = {str(path.relative_to(ROOT / "docs")) for path in DOCUMENTS[1:]}
    pages = {page for page in pages if not page.startswith("decisions/")}
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert pages | {"contributing.md", "changelog.md"} == listed
    llms = set(re.findall(r"\]\(([\w/-]+\.md)\)", (ROOT / "docs/llms.txt").read_text()))
    assert llms == pages


def test_the_targets_and_scripts_that_workflows_run_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for path in ROOT.glob(".github/workflows/*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        runs = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
        for command in runs:
            program, _, rest = command.partition(" ")
            assert program != "make" or rest in targets, f"{path.name}: {command}"
            assert not program.startswith("scripts/") or (ROOT / program).is_file()
        assert runs


def test_the_citation_names_the_version_and_licence_of_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == settings["tool"]["setuptools_scm"]["fallback_version"]
    assert citation["license"] == project["license"]
