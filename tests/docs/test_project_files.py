"""The files beside the code: changelog, citation, linters, workflow, the help of the Makefile."""

import re
from datetime import date

import yaml
from documented import ROOT

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
VERSIONS = re.findall(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)


def test_versions_of_the_changelog_are_dated_and_newest_first():
    assert re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE) == [
        "Unreleased",
        *(f"{version} - {day}" for version, day in VERSIONS),
    ]
    numbers = [tuple(map(int, version.split("."))) for version, _ in VERSIONS]
    days = [date.fromisoformat(day) for _, day in VERSIONS]
    assert numbers == sorted({*numbers}, reverse=True)
    assert days == sorted(days, reverse=True)


def test_a_change_is_one_line_under_its_kind():
    for version in re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", version, re.MULTILINE)
        assert kinds == [kind for kind in ("Added", "Changed", "Fixed") if kind in kinds]
        before = version.partition("\n### ")[0]
        assert not re.search(r"^- ", before, re.MULTILINE)
    lines = [line for line in CHANGELOG.splitlines() if line and not line.startswith("#")]
    for line in lines[1:]:  # behind the introduction
        assert re.fullmatch(r"- [`\w].*[.]|[A-Z].*:", line), line
        assert len(line) <= 160, line


def test_paths_that_the_newest_versions_name_are_there():
    """Files and directories of this project, in backticks."""
    newest = CHANGELOG.partition("\n## 0.1.0")[0]
    gone = {"results/extrapolation"}
    for path in re.findall(r"`(?:python )?((?:results|docs|tests|benchmarks|src|sweeps)/[\w./]*)", newest):
        found = [*ROOT.glob(path), *ROOT.glob(f"{path}.*")]
        assert found or path in gone or path == "sweeps/NAME.yaml", path


def test_the_citation_is_of_the_newest_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["date-released"]) == VERSIONS[0]
    assert {"cff-version", "message", "title", "authors"} <= {*citation}  # what CFF 1.2.0 asks for
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
    assert citation["license"] == "Apache-2.0"


def test_the_hooks_bring_the_ruff_of_make_lint():
    pinned = re.findall(r"^ruff==.*$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ruffs = [hook for hook in hooks if hook["entry"].startswith("ruff ")]
    assert len(pinned) == 1
    assert [hook["additional_dependencies"] for hook in ruffs] == [pinned, pinned]


def test_the_workflow_runs_what_anyone_can_run():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert workflow["permissions"] == {"contents": "read"}
    (supported,) = re.findall(
        r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text()
    )
    assert job["strategy"]["matrix"]["python"] == [f"3.{n}" for n in range(*map(int, supported))]


def test_the_help_of_the_makefile_names_each_target():
    lines = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: (.*)$", lines, re.MULTILINE)[0].split()
    top = lines.partition("\n\n")[0]
    assert {*re.findall(r"make ([\w-]+)", top)} == {*targets}
