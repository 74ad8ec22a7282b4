"""No circle of imports in the package, and no name of a special environment where none belongs."""

import ast
import subprocess
import sys
from pathlib import Path

import esper_lightning

PACKAGE = Path(esper_lightning.__file__).parent


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(source: str) -> set[str]:
    """Modules of the package that are imported: at the top, in functions, and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found & set(MODULES)


def circles(imports: dict[str, set[str]]) -> set[str]:
    """Modules that import themselves, directly or through others."""
    reached = {name: set(others) for name, others in imports.items()}
    while True:
        wider = {n: r.union(*(reached[other] for other in r)) for n, r in reached.items()}
        if wider == reached:
            return {name for name, others in reached.items() if name in others}
        reached = wider


def test_no_module_imports_itself_by_whatever_way():
    assert circles({name: imported(path.read_text()) for name, path in MODULES.items()}) == set()


def test_a_circle_is_found_wherever_its_imports_stand():
    late = "def f():\n    from esper_lightning.core import gae"
    typed = "if TYPE_CHECKING:\n    import esper_lightning.core.losses"
    assert imported(late) == {"esper_lightning.core.gae"}
    assert imported(typed) == {"esper_lightning.core.losses"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b", "c"}


def test_nobody_names_morphogenesis_but_its_own_folders_and_one_table():
    own = ("envs/morphogenesis/", "growth/")
    allowed = {"envs/__init__.py", "training/special_evaluations.py"}
    named = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "morphogenesis" in path.read_text().lower()
    }
    assert {path for path in named if not path.startswith(own)} == allowed


def test_the_command_line_imports_nothing_of_growing_networks_until_asked():
    code = (
        "import sys, esper_lightning.cli.lightning_cli\n"
        "from esper_lightning.envs import CartPole, Morphogenesis\n"
        "from esper_lightning.training.special_evaluations import special_evaluation\n"
        "assert special_evaluation(CartPole) is None\n"
        "assert not [name for name in sys.modules if name.startswith('esper_lightning.growth')]\n"
        "assert special_evaluation(Morphogenesis).__name__ == 'esper_lightning.growth.table'\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
