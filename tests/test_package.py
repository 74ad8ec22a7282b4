"""The package as a whole: its exports, its requirements, and the form of its documents."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import esper_lightning

ROOT = Path(__file__).parents[1]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
TRAIN = """
import sys
for name in ("jaxtyping", "jsonargparse", "beartype", "gymnasium", "stable_baselines3"):
    sys.modules[name] = None  # importing it raises ImportError
from esper_lightning import MLP, PPOConfig, check_env, train_ppo_vectorized
from esper_lightning.envs import CartPole, Pendulum
check_env(CartPole(num_envs=4))
ppo = PPOConfig(rollout_steps=8, minibatches=2)
rows = train_ppo_vectorized(Pendulum(num_envs=4), iterations=2, ppo=ppo, run_dir=sys.argv[1])
assert [row["iteration"] for row in rows] == [1, 2]
print("trained")
"""


def run(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_holds_the_tested_versions_of_everything_that_the_package_requires():
    lock = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    locked = {(package["name"], package.get("version")) for package in lock}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert [f"{a}=={b}" for a, b in tested if (_normal(a), b) not in locked] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {_normal(re.split(r"[^\w.-]", line)[0]) for lines in required for line in lines}
    (own,) = (package for package in lock if package["name"] == "esper-lightning")
    known = {package["name"] for package in own["metadata"]["requires-dist"]}
    assert names - known - {"esper-lightning"} == set()
    assert {package["source"].get("registry") for package in lock if package is not own} == {
        "https://pypi.org/simple"
    }


@pytest.mark.parametrize("name", esper_lightning.__all__)
def test_every_export_exists(name):
    assert getattr(esper_lightning, name).__name__ == name
    assert name in dir(esper_lightning)


def test_what_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'PPOO'"):
        _ = esper_lightning.PPOO


def test_trains_with_the_least_that_it_needs(tmp_path):
    result = run(TRAIN, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("trained\n")


def test_reading_the_remains_of_a_run_needs_no_torch(tmp_path):
    code = (
        "import sys, esper_lightning\n"
        "from esper_lightning.forensics import files, layout\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_every_file_beside_the_modules_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / "esper_lightning"
    files = {path for path in package.rglob("*") if path.is_file()}
    listed = {
        path for glob in settings["package-data"]["esper_lightning"] for path in package.glob(glob)
    }
    modules = {path for path in files if (path.parent / "__init__.py").exists()}
    modules = {path for path in modules if path.suffix == ".py"}
    made = {path for path in files if path.suffix == ".pyc"}
    assert files - listed - modules - made == set()


def test_decisions_are_numbered_without_gaps():
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.name)
def test_a_decision_has_a_numbered_title_and_its_three_sections_in_order(path):
    title, blank, *rest = path.read_text().splitlines()
    number = re.fullmatch(r"# (\d+)\. \S.*", title)
    assert number is not None
    assert int(number[1]) == int(path.name[:4])
    assert blank == ""
    sections = ("**Decision.** ", "**Why.** ", "**What follows.**")
    assert rest[0].startswith(sections[0])
    starts = [[k for k, line in enumerate(rest) if line.startswith(name)] for name in sections]
    assert [len(lines) for lines in starts] == [1, 1, 1]
    assert sorted(starts) == starts


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_a_document_lead_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    local = [link for link in links if not link.startswith(("https:", "http:"))]
    assert [link for link in local if not (path.parent / link).exists()] == []
