"""README.md and docs/: commands compose, links lead somewhere. `docs_check.py` runs the commands."""

import ast
import importlib
import re
import shlex
import shutil
from functools import cache

import docs_check
import pytest
from documented import PAGES, PROGRAMS, ROOT, blocks, commands, in_passing, write_files
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from scantling.config.composition import search_path
from scantling.config.options import ROOT as PROJECT
from scantling.config.values import quoted

TYPED = [
    command for page in PAGES for block in blocks(page) if block.is_commands for command in commands(block)
]
ENTRY = re.compile(r"(?:python|torchrun .*|srun .* python) src/(\w+)\.py ?(.*)$")


@pytest.fixture(scope="module")
def tree_of(tmp_path_factory):
    """`tree_of("docs/sweeps.md")`: settings as a reader of that page has them, who wrote what it says."""

    @cache
    def tree_of(page):
        tree = tmp_path_factory.mktemp("tree")
        shutil.copytree(ROOT / "conf", tree / "conf")
        shutil.copytree(ROOT / "sweeps", tree / "sweeps")
        write_files(page, tree)
        for command in TYPED:
            if proposed := re.search(r"src/plan\.py study=(\w+) isoflop", command.text):
                (tree / "sweeps" / f"{proposed[1]}.yaml").write_text("# @package _global_\n")
        return tree

    return tree_of


def composed(tree, entry, arguments):
    """What Hydra makes of a command line: an exception where an option or a setting is unknown. Of a grid so
    many jobs that each value is in one.
    """
    typed = [quoted(argument) for argument in arguments if argument != "-m"]
    searched = [o.replace(str(PROJECT), str(tree)) for o in search_path(entry)]
    mode = RunMode.MULTIRUN if "-m" in arguments else RunMode.RUN
    with initialize_config_dir(str(tree / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration(entry, [*typed, *searched], run_mode=mode)
        if mode is RunMode.RUN:
            return [config]
        typed_as = []
        for override in OverridesParser.create(loader).parse_overrides(typed):
            if override.key_or_group == "arm":
                assert {*override.sweep_string_iterator()} <= {*config.hydra.sweeper.arms}
            elif override.is_discrete_sweep():
                key = override.get_key_element()
                typed_as.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            elif not (override.is_sweep_override() or override.key_or_group.startswith("hydra")):
                typed_as.append([override.input_line])
        jobs = max(map(len, typed_as), default=1)
        return [
            loader.load_sweep_config(config, [values[i % len(values)] for values in typed_as])
            for i in range(jobs)
        ]


RUN = [c for c in TYPED if ENTRY.match(c.text)] + [c for page in PAGES for c in in_passing(page)]


@pytest.mark.parametrize("command", RUN, ids=str)
def test_commands_compose(command, tree_of):
    if "launcher=ray" in command.text:
        pytest.skip("hydra-ray-launcher is not among what tests install")
    found = ENTRY.match(command.text)
    assert found is not None
    entry, arguments = found.groups()
    assert composed(tree_of(command.page), entry, shlex.split(arguments))


def test_a_renamed_option_is_found(tree_of):
    for wrong in ("attn=gqaa", "batchsize=4", "-m attn=mha,gqaa", "-m sweeps=parts arm=llama,nothing"):
        with pytest.raises(Exception, match=r"gqaa|batchsize|nothing"):
            composed(tree_of("README.md"), "train", wrong.split())


@pytest.mark.parametrize("command", [c for c in TYPED if not ENTRY.match(c.text)], ids=str)
def test_other_commands_are_of_programs_that_are_known(command):
    program, *words = shlex.split(command.text)
    assert program in PROGRAMS
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if program == "python":
        assert (ROOT / words[0]).exists()


def test_each_rule_of_the_check_is_of_some_command():
    for table in (docs_check.NOT_HERE, docs_check.SHORTER, docs_check.STANDS_FOR):
        for pattern in table:
            assert any(re.search(pattern, command.text) for command in TYPED), pattern


@pytest.mark.parametrize(
    "page",
    [
        *PAGES,
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        *sorted(f"results/{p.name}" for p in (ROOT / "results").glob("*.md")),
    ],
)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not re.match(r"https://", link):
            assert ((ROOT / page).parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_python_on_the_pages(page):
    """It parses, and what it imports of this project is there."""
    for block in blocks(page):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scantling"):
                    module = importlib.import_module(str(node.module))
                    assert all(hasattr(module, name.name) for name in node.names)


MISTAKES = re.findall(
    r"^\| `(\w+)\.py ([^`]+)` \| (.+) \|$", (ROOT / "docs/start.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize(("name", "typed", "answered"), MISTAKES, ids=[typed for _, typed, _ in MISTAKES])
def test_first_mistakes_are_answered_as_the_page_says(entry, tmp_path, monkeypatch, name, typed, answered):
    monkeypatch.chdir(tmp_path)
    code, _, err = entry(name, *shlex.split(typed))
    assert (code, err) == (2, f"error: {answered}\n")
