"""The rooms of docs/architecture.md, read off the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "scantling"

ORDER = (
    *("model", "data", "config", "runs", "analysis", "report"),
    *("inference", "training", "sweep", "hub", "cli"),
)
"""A package imports only packages before it, and nobody imports the last."""

WITHOUT_TORCH = ("runs", "analysis", "report")
WITHOUT_HYDRA = ("model", "data", "analysis", "report")

FILES = sorted(PACKAGE.rglob("*.py"))
PLUGINS = sorted((SOURCE / "hydra_plugins").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def foreign(path: Path) -> set[str]:
    """Packages of others that a file imports."""
    return {name.split(".")[0] for name in imported(path)}


def loaded_by(*modules: str) -> set[str]:
    """What a fresh Python has loaded after importing these."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, cwd=SOURCE, check=True, capture_output=True, text=True).stdout.split())


def test_packages_are_those_of_the_list():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ORDER)


def test_no_module_lies_loose():
    assert {path.name for path in PACKAGE.glob("*.py")} <= {"__init__.py", "__main__.py"}


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent != PACKAGE], ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_a_package_imports_those_before_it(path):
    own = ORDER.index(package_of(path))
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("scantling.")}
    assert ours - {"__version__"} <= set(ORDER[: own + 1])
    assert package_of(path) not in WITHOUT_TORCH or "torch" not in foreign(path)
    assert package_of(path) not in WITHOUT_HYDRA or not {"hydra", "omegaconf"} & foreign(path)


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_nothing_of_these_loads_torch(package):
    modules = [p for p in FILES if package_of(p) == package and p.name != "__init__.py"]
    names = [".".join(p.relative_to(SOURCE).with_suffix("").parts) for p in modules]
    assert "torch" not in loaded_by(*names)


def test_a_launcher_starts_without_torch():
    """So that a mistyped sweep need not wait for it."""
    names = [
        ".".join(p.relative_to(SOURCE).with_suffix("").parts) for p in PLUGINS if p.name != "__init__.py"
    ]
    assert "torch" not in loaded_by(*names)


def test_entries_hold_no_logic():
    for path in SOURCE.glob("*.py"):
        assert len(path.read_text().splitlines()) < 25, path


def test_at_most_five_functions_are_long():
    """Over 60 lines, without decorators; a signal to look, and here a limit."""
    long = {
        f"{path.relative_to(SOURCE)}:{node.name}"
        for path in [*FILES, *PLUGINS]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > 60
    }
    assert len(long) <= 5, sorted(long)
