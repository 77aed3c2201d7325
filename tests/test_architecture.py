"""The layers of docs/architecture.md, read off the imports."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "scantling"

MAY_IMPORT = {
    "model": {"model"},
    "data": {"data"},
    "run_directory": set(),
    "command_line": set(),
    "wandb_file": set(),
    "accounting": {"model"},
    "sampling": {"model"},
    "generation": {"model", "sampling"},
    "continuation": {"generation", "model", "sampling"},
    "hub": {"hub", "model"},
    "memory": {"accounting", "model"},
    "plan": {"accounting", "data", "memory", "model"},
    "composition": {"model"},
    "planned": {
        "accounting",
        "command_line",
        "composition",
        "data",
        "memory",
        "model",
        "plan",
        "planned_study",
        "training",
    },
    "planned_cells": {"accounting", "composition", "study", "training"},
    "planned_study": {
        *("accounting", "command_line", "composition", "plan", "planned_cells", "study", "training"),
    },
    "parts_table": {"accounting", "command_line", "composition", "hub", "model", "plan"},
    "stored": {"data", "model", "run_directory"},
    "views": {"data", "generation", "model", "report", "run_directory", "stored"},
    "reported_page": {"report"},
    "reported_study": {"command_line", "report", "reported_page", "run_directory", "study"},
    "reported": {
        *("command_line", "report", "reported_page", "reported_study", "run_directory", "study", "views"),
    },
    "report": {"report", "run_directory", "study"},
    "recorded": {"command_line", "run_directory", "study"},
    "training": {"training", "model", "data", "accounting", "plan", "run_directory", "wandb_file"},
    "identity": {"command_line", "composition", "run_directory"},
    "study": {"study", "run_directory", "wandb_file"},
    "sweep": {"sweep", "run_directory", "command_line"},
    "sweep.matching": {"accounting", "composition", "model"},
}
MAY_USE_HYDRA = {
    "assembly",
    "command_line",
    "composition",
    "hub.runs",
    "identity",
    "parts_table",
    "planned",
    "planned_cells",
    "planned_study",
    "recorded",
    "reported",
    "reported_page",
    "reported_study",
    "run",
    "run_record",
    "stored",
    "sweep.matching",
    "sweep.outlook",
    "trained",
}
OF_THEIR_OWN = ("hub/runs.py", "sweep/matching.py", "sweep/outlook.py")
"""Files that stand above the rest of their folder: they read configurations."""


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


def room(path: Path) -> str:
    """The first name under `scantling` that a file belongs to, or its own."""
    inside = path.relative_to(PACKAGE)
    if inside.as_posix() in OF_THEIR_OWN:
        return ".".join(inside.with_suffix("").parts)
    return inside.parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_stay_in_their_layer(path):
    names = imported(path)
    rooms = {name.split(".")[1] for name in names if name.startswith("scantling.")}
    if room(path) in MAY_IMPORT:
        assert rooms <= MAY_IMPORT[room(path)]
    uses_hydra = any(name.split(".")[0] in ("hydra", "omegaconf") for name in names)
    assert not uses_hydra or room(path) in MAY_USE_HYDRA
    if room(path) in (
        "study",
        "report",
        "sweep",
        "recorded",
        "reported",
        "reported_page",
        "reported_study",
        "run_directory",
        "command_line",
        "wandb_file",
    ):
        assert not any(name.split(".")[0] == "torch" for name in names)


def test_entries_hold_no_logic():
    for path in SOURCE.glob("*.py"):
        assert len(path.read_text().splitlines()) < 25, path
