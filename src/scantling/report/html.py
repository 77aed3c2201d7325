"""A report as one HTML file that needs nothing else: it contains plotly.js, the styles and the data."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from scantling.report.numbers import cell_text
from scantling.report.spec import (
    PALETTE,
    Axis,
    Block,
    Chart,
    Code,
    Figure,
    Link,
    Maps,
    Paragraph,
    Report,
    Samples,
    Series,
    Table,
)

STATES = ("better", "worse", "undecided", "finished", "unfinished", "failed")
"""Words whose cells have a colour."""

LONG_CELL = 44
"""Characters above which a cell wraps."""


def page(report: Report, *, command: str, reload_seconds: float | None = None) -> str:
    """The report as HTML.

    `command`: what wrote it. `reload_seconds`: how often the page reloads itself; None: never.
    """
    plotly = files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")
    style, script = (files("scantling.report").joinpath(name).read_text() for name in ("page.css", "page.js"))
    palette = "".join(f"--c{i}: light-dark({light}, {dark}); " for i, (light, dark) in enumerate(PALETTE))
    sections = [(f"s{i}", section) for i, section in enumerate(report.sections)]
    body = [f'<p class="kind">{escape(report.kind)}</p><h1>{escape(report.title)}</h1>']
    body += [f'<p class="question">{escape(report.question)}</p>'] if report.question else []
    body += [f'<p class="answer">{escape(report.answer)}</p>']
    if report.cautions:
        body += [f'<ul class="cautions">{"".join(f"<li>{escape(c)}</li>" for c in report.cautions)}</ul>']
    for anchor, section in sections:
        body.append(f'<section id="{anchor}"><h2>{escape(section.title)}</h2>')
        body += [in_html(block) for block in section.blocks]
        body.append("</section>")
    links = "".join(f'<a href="#{anchor}">{escape(section.title)}</a>' for anchor, section in sections)
    again = "" if reload_seconds is None else f'<meta http-equiv="refresh" content="{reload_seconds:g}">'
    written = f"Written {time.strftime('%Y-%m-%d %H:%M:%S')} by <code>{escape(command)}</code>"
    if reload_seconds is not None:
        written += f"; reloads every {reload_seconds:g} seconds"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">{again}
<title>{escape(report.title)} · Scantling</title>
<link rel="icon" href="data:,">
<style>:root {{ {palette}}}
{style}</style>
<script>{plotly}</script>
</head><body>
<div class="bar"><nav>{links}</nav><button id="theme" type="button" title="light or dark">dark</button></div>
<main>
{"".join(body)}
<footer>{written}</footer>
</main>
<script>{script}</script>
</body></html>
"""


def in_html(block: Block) -> str:
    """A block as it stands on the page."""
    if isinstance(block, Paragraph):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Code):
        return f"<pre>{escape(block.text)}</pre>"
    if isinstance(block, Table):
        return table(block)
    if isinstance(block, Samples):
        shown = (
            f"<figure><figcaption>{escape(title)}</figcaption><pre>{escape(printable(text))}</pre></figure>"
            for title, text in block.texts
        )
        return f'<div class="samples">{"".join(shown)}</div>'
    if isinstance(block, Figure):
        svg = block.name.rpartition(".")[0] + ".svg"
        return (
            f'<p class="note">For print: <a href="{escape(block.name)}">{escape(block.name)}</a>, '
            f'<a href="{escape(svg)}">{escape(svg)}</a></p>'
        )
    return maps(block) if isinstance(block, Maps) else chart(block)


def printable(text: str) -> str:
    """A young model's text with a visible sign for each control character."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def table(block: Table) -> str:
    """A table with its title above, or one that opens when asked to."""
    frame = block.frame
    rows = list(frame.itertuples(index=False, name=None))
    words = [is_words(column) for column in zip(*rows, strict=True)] or [True] * len(frame.columns)
    head = "".join(
        f"<th{' class=word' if word else ''}>{escape(str(name))}</th>"
        for name, word in zip(frame, words, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(cell, row, words))}</tr>" for row in rows)
    shown = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    if block.folded:
        return f"<details><summary>{escape(block.title)}</summary>{shown}</details>"
    return f"<h3>{escape(block.title)}</h3>{shown}"


def is_words(column: Sequence[Any]) -> bool:
    """Whether a column reads from the left: any cell that does not begin as a number."""
    return any(
        isinstance(value, Link) or (str(value) and str(value)[0] not in "0123456789+-−×")
        for value in column
        if not (isinstance(value, float) and math.isnan(value))
    )


def cell(value: object, word: bool) -> str:
    """A cell of a table; `word`: it reads from the left."""
    if isinstance(value, Link):
        return f'<td class="word"><a href="{escape(value.target)}">{escape(value.text)}</a></td>'
    text = cell_text(value)
    classes = [name for name, has in (("word", word), ("long", len(text) > LONG_CELL)) if has]
    classes += [text] if text in STATES else []
    return f'<td class="{" ".join(classes)}">{escape(text)}</td>' if classes else f"<td>{escape(text)}</td>"


# --- charts ---


def chart(block: Chart) -> str:
    """The card from which page.js makes a plot."""
    spec = {
        "x": [axis(a) for a in block.x],
        "y": [axis(a) for a in block.y],
        "series": [series(s) for s in block.series],
        "legend": block.legend,
        "scale": block.scale,
        "height": block.height,
        "frames": block.frames,
    }
    title = escape(block.title)
    plot = f'<div class="legend"></div><div class="plot" role="img" aria-label="{title}"></div>'
    return card("chart", title, f'<div class="controls"></div>{plot}', block.note, spec)


def maps(block: Maps) -> str:
    """The card of attention maps.

    The rows of each map follow one another, each up to its diagonal, in units of 1 / `UNITS`.
    """
    below = np.tril_indices(len(block.words))
    weights = np.rint(block.weights[..., *below] * UNITS).astype(int)
    spec = {
        "words": [untagged(word) for word in block.words],
        "ticks": [untagged(word if len(word) <= TICK else f"{word[: TICK - 1]}…") for word in block.words],
        "layers": block.layers,
        "heads": block.heads,
        "weights": weights.tolist(),
        "units": UNITS,
    }
    large = (
        '<div class="large"><p class="shown" aria-live="polite"></p><div class="plot" role="img"></div></div>'
    )
    both = f'<div class="both"><div class="grid"></div>{large}</div>'
    return card("maps", escape(block.title), both, block.note, spec)


UNITS = 10_000
"""Units that make an attention weight of one."""

TICK = 9
"""Characters of a word at an axis."""


def card(kind: str, title: str, inside: str, note: str, spec: dict[str, Any]) -> str:
    """The element that page.js draws from `spec`."""
    data = json.dumps(spec, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    data = data.replace("<", "\\u003c")  # no text ends the script that it stands in
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<div class="card {kind}"><h3>{title}</h3>{inside}{below}'
        f'<script type="application/json">{data}</script></div>'
    )


def axis(a: Axis) -> dict[str, Any]:
    """An axis as page.js reads it; `label` is that of its button, plotly reads tags in its other words."""
    label = "" if a.words else a.title.partition(",")[0]
    words = {
        "title": untagged(a.title),
        "short": untagged(label),
        "order": [untagged(word) for word in a.order],
    }
    return {**asdict(a), **words, "label": label}


def series(s: Series) -> dict[str, Any]:
    """A series as page.js reads it."""
    hover = s.hover or s.group
    return {
        "group": s.group,
        "values": {key: numbers(values) for key, values in s.values.items()},
        "low": {key: numbers(values) for key, values in s.low.items()},
        "high": {key: numbers(values) for key, values in s.high.items()},
        "style": s.style,
        "colour": colour(s.colour),
        "frame": s.frame,
        "hover": untagged(hover) if isinstance(hover, str) else [untagged(text) for text in hover],
    }


def numbers(values: Sequence[Any] | np.ndarray) -> list[Any]:
    """Values with six digits, as no screen shows more; None for what is not finite."""
    return [
        untagged(v)
        if isinstance(v, str)
        else rounded(float(v))
        if isinstance(v, (float, np.floating))
        else v.item()
        if isinstance(v, np.generic)
        else v
        for v in values
    ]


def untagged(text: str) -> str:
    """A text for plotly, which reads tags in texts, and of entities only those of < > &."""
    return escape(text, quote=False)


def rounded(value: float) -> float | int | None:
    """To six digits; None for what is not finite."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def colour(of: int | float | Sequence[float] | None) -> Any:
    """As page.js reads it: c and a place in the palette, s and a place on the scale."""
    if of is None or (isinstance(of, float) and not math.isfinite(of)):
        return None
    if isinstance(of, int):
        return f"c{of % len(PALETTE)}"
    if isinstance(of, float):
        return f"s{min(max(of, 0.0), 1.0):.3g}"
    return [colour(float(each)) for each in of]
