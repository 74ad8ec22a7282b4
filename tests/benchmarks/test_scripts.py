"""Every script of ``benchmarks/`` and ``scripts/`` runs, at its smallest size.

A benchmark runs with ``--smallest``; the tools of ``scripts/`` have an entry each.
"""

import ast
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forked
from tests.benchmarks.commands import wrong

ROOT = Path(__file__).parents[2]
PROGRAMS = [
    path
    for pattern in ("benchmarks/**/*.py", "scripts/**/*")
    for path in sorted(ROOT.glob(pattern))
    if path.is_file() and "__pycache__" not in path.parts
]
# Files that do not run by themselves, and what runs them.
MODULES = {
    "benchmarks/conditions.py": "benchmarks/*.py",
    "benchmarks/peers/purejax.py": "benchmarks/contenders.py",
    "benchmarks/peers/rsl_rl_peer.py": "benchmarks/contenders.py",
    "benchmarks/peers/sb3.py": "benchmarks/contenders.py",
    "benchmarks/peers/skrl_peer.py": "benchmarks/contenders.py",
    "benchmarks/zoo_peer.py": "benchmarks/zoo.py",
    "scripts/docs_site.py": "mkdocs.yml",
}
IN_PLACE_OF_TORCHRUN = """#!/bin/sh
echo "$@" > torchrun.said
exit 1
"""
IN_PLACE_OF_SRUN = """#!/bin/sh
echo "$@" > srun.said
[ -e quick ] && exit 3
trap 'exit 143' TERM
sleep 1 # for the job to set its own trap
kill -USR1 "$PPID"
while :; do sleep 0.1; done
"""
IN_PLACE_OF_SCONTROL = '#!/bin/sh\necho "$@" > scontrol.said\n'


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def smallest(path: Path, folder: Path) -> None:
    """Run a benchmark at its smallest size, which prints the results file."""
    done = forked.run([path, "--smallest"], cwd=folder, children=True)
    assert done.returncode == 0, done.stderr[-3000:]
    if path.stem == "contenders":
        told = done.stdout.splitlines()
        for library in ("jax", "stable_baselines3", "rsl_rl", "skrl"):
            absent = importlib.util.find_spec(library) is None
            assert any(f"not installed: {library}" in line for line in told) == absent
        assert sum(line.endswith(" ms") for line in told) >= 8  # ours need nothing else
        return
    for said in ("# ", "- hardware: ", "- commit: none: the smallest size", f"{name(path)} --"):
        assert re.search(f"^{re.escape(said)}" if said[0] in "#-" else said, done.stdout, re.M), (
            said
        )
    assert "nan" not in done.stdout.lower().split()


def dry(path: Path, folder: Path) -> None:
    """The launcher of variants and seeds prints commands that ``esper`` accepts."""
    words = ["--config", str(ROOT / "configs" / "cartpole.yaml"), "--seeds", "0", "1"]
    words += ["--output", "out", "--variant", "base", "--variant", "b: --model.ppo.clip 0.1"]
    done = run([sys.executable, str(path), *words, "--dry-run", "--", "--model.seed", "3"], folder)
    assert done.returncode == 0, done.stderr
    commands = done.stdout.splitlines()
    assert len(commands) == 4
    for command in commands:
        assert wrong(command.replace(shlex.quote(sys.executable), "python")) is None


def on_a_cluster(path: Path, folder: Path) -> None:
    """The job starts ``esper fit``, returns its status, and queues itself when its time is up."""
    assert run(["bash", "-n", str(path)], folder).returncode == 0
    for program, text in (("srun", IN_PLACE_OF_SRUN), ("scontrol", IN_PLACE_OF_SCONTROL)):
        (folder / program).write_text(text)
        (folder / program).chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    variables |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    command = ["bash", str(path), "--config", str(ROOT / "configs" / "cartpole.yaml")]
    run(command, folder, **variables)
    assert (folder / "scontrol.said").read_text() == "requeue 12\n"
    _, _, started = (folder / "srun.said").read_text().partition("esper ")
    assert wrong(f"esper {started}") is None
    for words in ("--trainer.num_nodes 2", "--trainer.devices 8", "--run_dir runs/slurm_12"):
        assert words in started
    (folder / "quick").touch()
    (folder / "scontrol.said").unlink()
    assert run(command, folder, **variables).returncode == 3
    assert not (folder / "scontrol.said").exists()


def one_mutant(path: Path, folder: Path) -> None:
    """A mutant of the package is killed in a copy of the tree."""
    word = "A truncation loses the value beyond it"
    done = run([sys.executable, str(path), "--only", word, "--import-nothing"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1 killed, 0 alive, 0 equivalent"


def on_hosts(path: Path, folder: Path) -> None:
    """torchrun starts ``esper fit``; where another start is of no use, the status says so."""
    for program, text in (("torchrun", IN_PLACE_OF_TORCHRUN), ("esper", "#!/bin/sh\nexit 65\n")):
        (folder / program).write_text(text)
        (folder / program).chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "RANKS": "2", "NODES": "2"}
    command = ["bash", str(path), "--config", str(ROOT / "configs" / "cartpole.yaml")]
    assert run(command, folder, **variables).returncode == 65
    assert wrong(f"torchrun {(folder / 'torchrun.said').read_text()}") is None


def without_a_browser(path: Path, folder: Path) -> None:
    """Pictures need a browser, and minutes: ``make pictures`` makes them."""
    done = run([sys.executable, str(path), "--output", str(folder)], folder, PATH=str(folder))
    assert done.returncode == 2
    assert "needs one of chromium, " in done.stderr


def read_alone(path: Path, folder: Path) -> None:
    """A script that takes long is only read here.

    ``tests/scripts`` rehearses ``gpu_check.py``; ``try_wheel.sh`` is run by ``make wheel`` alone.
    """
    if path.suffix == ".sh":
        assert run(["bash", "-n", str(path)], folder).returncode == 0
    else:
        compile(path.read_text(), str(path), "exec")


TOOLS = {
    "scripts/ab.py": dry,
    "scripts/gpu_check.py": read_alone,
    "scripts/gpu_check.sh": read_alone,
    "scripts/mutants.py": one_mutant,
    "scripts/pictures.py": without_a_browser,
    "scripts/slurm.sh": on_a_cluster,
    "scripts/torchrun.sh": on_hosts,
    "scripts/try_wheel.sh": read_alone,
}


@pytest.mark.parametrize("path", [p for p in PROGRAMS if name(p) not in MODULES], ids=name)
def test_every_script_runs_at_its_smallest_size(path, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["esper"])
    is_benchmark = path.parent == ROOT / "benchmarks"
    assert is_benchmark or name(path) in TOOLS, f"{name(path)} needs an entry in TOOLS"
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    (smallest if is_benchmark else TOOLS[name(path)])(path, tmp_path)
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before


def test_a_comparison_without_a_policy_of_its_tables_is_refused_before_it_trains(tmp_path):
    path = ROOT / "benchmarks" / "growth_mixed.py"
    for name_of in ("PPO", "PPO, blind"):
        done = forked.run([path, "--smallest", "--policies", name_of], cwd=tmp_path, children=True)
        assert done.returncode == 2
        said = "--policies must name ('PPO', 'PPO, blind') at least, got "
        assert done.stderr.splitlines()[-1] == f"growth_mixed.py: error: {said}['{name_of}']"
        assert done.stdout == ""


@pytest.mark.parametrize("module", MODULES)
def test_a_file_that_does_not_run_by_itself_is_used_by_one_that_does(module):
    path = ROOT / module
    assert "__main__" not in path.read_text()
    users = "".join(user.read_text() for user in ROOT.glob(MODULES[module]) if user != path)
    assert re.search(rf"\b{path.stem}\b", users)


# What is asked of peers, by the text alone: their libraries are not installed here.

CONTENDERS = ROOT / "benchmarks" / "contenders.py"
PEERS = {path.stem: path for path in sorted((ROOT / "benchmarks" / "peers").glob("*.py"))}
Call = tuple[str, str, int, set[str]]
"""Module, function, number of positional arguments, names of the others."""


def asked_of_peers(contenders: ast.Module) -> Iterator[Call]:
    """Calls of functions of peers, by name or by the settings of a contender."""
    (peer,) = (
        node
        for node in contenders.body
        if isinstance(node, ast.FunctionDef) and node.name == "peer"
    )
    usual = {
        argument.arg: ast.literal_eval(default)
        for argument, default in zip(peer.args.kwonlyargs, peer.args.kw_defaults, strict=True)
        if default is not None
    }
    sizes = next(
        node.value
        for node in ast.walk(peer)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "sizes"
    )
    assert isinstance(sizes, ast.Tuple)
    for node in ast.walk(contenders):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id == "_peer":
            settings = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
            settings = {**usual, **settings}
            more = {"compile"} if settings["compiles"] else set[str]()
            yield settings["module"], settings["function"], len(sizes.elts), {"threads", *more}
        elif isinstance(called, ast.Attribute) and ast.unparse(called.value) in PEERS:
            words = {word.arg for word in node.keywords if word.arg is not None}
            yield ast.unparse(called.value), called.attr, len(node.args), words


def names_of_peers(contenders: ast.Module) -> Iterator[tuple[str, str]]:
    """Module and name of whatever is imported from a peer, or is an attribute of one."""
    for node in ast.walk(contenders):
        if isinstance(node, ast.ImportFrom) and node.module in PEERS:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in PEERS:
            yield ast.unparse(node.value), node.attr


def defined(module: str) -> dict[str, ast.stmt]:
    """What the file of a peer defines, by name."""
    body = ast.parse(PEERS[module].read_text()).body
    return {
        node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    } | {
        ast.unparse(target): node
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }


def signature_of(function: ast.stmt) -> inspect.Signature:
    """The signature of a definition, without running the definition or its annotations."""
    assert isinstance(function, ast.FunctionDef)
    head = f"lambda {ast.unparse(without_annotations(function.args))}: None"
    return inspect.signature(eval(head))


def without_annotations(arguments: ast.arguments) -> ast.arguments:
    for each in ast.walk(arguments):
        if isinstance(each, ast.arg):
            each.annotation = None
    return arguments


def test_what_contenders_ask_of_a_peer_is_there_and_takes_their_arguments():
    contenders = ast.parse(CONTENDERS.read_text())
    calls = list(asked_of_peers(contenders))
    assert {module for module, *_ in calls} == set(PEERS)
    for module, name_of, *_ in (*calls, *names_of_peers(contenders)):
        assert name_of in defined(module), f"{module} has no {name_of}"
    for module, function, positional, words in calls:
        signature = signature_of(defined(module)[function])
        signature.bind(*range(positional), **dict.fromkeys(words))  # a TypeError where it does not


def test_make_bench_installs_every_peer_and_runs_what_compares_them():
    done = run(["make", "--dry-run", "bench", "VENV=absent"], ROOT)
    assert done.returncode == 0, done.stderr
    assert "-c constraints.txt -e '.[dev,bench]'" in done.stdout
    assert "absent/bin/python benchmarks/throughput.py" in done.stdout
    assert shutil.which("bash") is not None
