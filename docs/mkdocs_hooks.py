"""Gives the site the tree of the repository: each page keeps its place, and links work as on GitHub.

Beside the pages that are written it has those that stand in other files: a yaml of settings, the docstrings
of a module.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "scantling"

WRITTEN = (
    "README.md",
    "docs/*.md",
    "docs/*.png",
    "docs/*.svg",
    "docs/site.css",
    "docs/iframe-worker.js",
    "results/**/*.*",
)
SETTINGS = ("conf/*.yaml", "conf/tune/*.yaml", "sweeps/*.yaml")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = [
        {title: below(place) if place.endswith("/") else place}
        for entry in config.nav or []
        for title, place in entry.items()
    ]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for file in list(files.documentation_pages()) + list(files.media_files()):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in matching(WRITTEN):
        place = path.relative_to(ROOT).as_posix()
        files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    for place, text in generated().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to a yaml lead to the page that shows it."""
    return re.sub(r"(\]\([^):]+\.yaml)\)", r"\1.md)", markdown)


def matching(patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())


def generated() -> dict[str, str]:
    """Pages made from other files, by place."""
    pages = {}
    for path in matching(SETTINGS):
        place = path.relative_to(ROOT).as_posix()
        pages[f"{place}.md"] = f"# {place}\n\n```yaml\n{path.read_text()}```\n"
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py":
            place = path.relative_to(PACKAGE).with_suffix("").as_posix()
            name = f"scantling.{place.replace('/', '.')}"
            pages[f"reference/{place}.md"] = f"# {name}\n\n::: {name}\n"
    return pages


def below(folder: str) -> list[Any]:
    """The pages of a folder as entries of the navigation, its own before those of folders inside it.

    A page that is written has the title that it opens with.
    """
    written = [path.relative_to(ROOT).as_posix() for path in matching(WRITTEN) if path.suffix == ".md"]
    inside = [place.removeprefix(folder) for place in [*written, *generated()] if place.startswith(folder)]
    own = [f"{folder}{name}" for name in sorted(inside) if "/" not in name]
    folders = sorted({name.partition("/")[0] for name in inside if "/" in name})
    return [
        *(place if place in written else {Path(place).stem: place} for place in own),
        *({name: below(f"{folder}{name}/")} for name in folders),
    ]
