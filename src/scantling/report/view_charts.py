"""What a run's checkpoints show, as blocks of its page: neighbours of tokens, embeddings, attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from scantling.report.curve_charts import thinned
from scantling.report.spec import Axis, Block, Chart, Maps, Paragraph, Section, Series, Table

COMPARED = 3
"""Checkpoints whose neighbours stand side by side."""

MARGIN = 0.05
"""Of a map's axes beyond the outermost token, as a share of what they span."""


@dataclass(frozen=True)
class Neighbours:
    """The tokens of the most similar embeddings to each of `words`, at each of `steps`, with their cosine."""

    steps: tuple[int, ...]
    words: tuple[str, ...]
    nearest: tuple[tuple[tuple[tuple[str, float], ...], ...], ...]
    """[step][word], the nearest first."""
    among: int


@dataclass(frozen=True)
class EmbeddingMap:
    """Places [step, word, 2] of `words` on two axes through the embeddings of the last step.

    `shares` [step, 2]: the share of the variance along each axis.
    """

    steps: tuple[int, ...]
    words: tuple[str, ...]
    kinds: tuple[str, ...]
    named: tuple[bool, ...]
    """Words that are written at their places; others are shown when asked for."""
    places: np.ndarray
    shares: np.ndarray


@dataclass(frozen=True)
class Attention:
    """`weights` [layer, head, query, key] of `words` at `step`, of the layers and heads of these numbers."""

    step: int
    words: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    weights: np.ndarray
    note: str


@dataclass(frozen=True)
class Views:
    """What there is to show; `notes`: which checkpoints there are, and why something is missing."""

    notes: tuple[str, ...]
    neighbours: Neighbours | None = None
    map: EmbeddingMap | None = None
    attention: Attention | None = None


def view_section(views: Views) -> Section:
    """The section of all that checkpoints show."""
    blocks: list[Block] = [Paragraph(note) for note in views.notes]
    if views.neighbours is not None:
        blocks.append(neighbours_table(views.neighbours))
    if views.map is not None:
        blocks.append(embedding_chart(views.map))
    if views.attention is not None:
        blocks += [attention_maps(views.attention), attention_table(views.attention)]
    return Section("From its checkpoints", tuple(blocks))


def neighbours_table(found: Neighbours) -> Table:
    """A column for each of some checkpoints, a row a token."""
    table: dict[str, list[str]] = {"token": list(found.words)}
    for i in thinned(np.arange(len(found.steps)), COMPARED):
        lists = found.nearest[i]
        cells = [
            " · ".join(f"{word}\N{NO-BREAK SPACE}{cosine:.2f}" for word, cosine in nearest)
            for nearest in lists
        ]
        table[f"step {found.steps[i]:,}"] = cells
    title = f"Nearest of {found.among:,} token embeddings, by the cosine of the angle between"
    return Table(title, pd.DataFrame(table))


def embedding_chart(found: EmbeddingMap) -> Chart:
    """Places of token embeddings on two axes, a frame a checkpoint."""
    last = f"at step {found.steps[-1]:,}"
    kinds = list(dict.fromkeys(found.kinds))
    series = []
    for frame, places in enumerate(found.places):
        for colour, kind in enumerate(kinds):
            for is_named in (False, True):
                here = [i for i, k in enumerate(found.kinds) if k == kind and found.named[i] == is_named]
                if here:
                    values = {"first": places[here, 0].tolist(), "second": places[here, 1].tolist()}
                    words = [found.words[i] for i in here]
                    style = "words" if is_named else "points"
                    series.append(Series(kind, values, style=style, colour=colour, hover=words, frame=frame))
    low, high = found.places.min((0, 1)), found.places.max((0, 1))
    low, high = low - MARGIN * (high - low), high + MARGIN * (high - low)
    axes = [
        Axis(
            key,
            f"{key} axis, {found.shares[-1, i]:.1%} of the variance {last}",
            log=None,
            range=(float(low[i]), float(high[i])),
        )
        for i, key in enumerate(("first", "second"))
    ]
    several = len(found.steps) > 1
    note = f"Principal components of these embeddings {last}: two axes of many, so that tokens which lie "
    note += "together here need not be near, and the table above says which are. "
    note += f"Earlier embeddings are put on the axes of {last.removeprefix('at ')}. " if several else ""
    return Chart(
        f"Where {len(found.words):,} token embeddings lie",
        tuple(series),
        (axes[0],),
        (axes[1],),
        note=note
        + "Point at a token for its name; click a kind of token to hide it, double-click to see it alone.",
        frames=tuple(
            f"step {step:,}: {first:.1%} and {second:.1%} of the variance"
            for step, (first, second) in zip(found.steps, found.shares, strict=True)
        ),
        height=520,
    )


def attention_maps(found: Attention) -> Maps:
    """A map for each layer and head."""
    note = "A row is a token that attends, a column a token that it attends to; a row sums to one. "
    note += "Shades grow with the square root of the weight. Choose a map to see it large."
    return Maps(
        f"Attention at step {found.step:,}",
        found.words,
        found.layers,
        found.heads,
        found.weights,
        note=f"{note} {found.note}".strip(),
    )


def attention_table(found: Attention) -> Table:
    """Means over the tokens that have a token before them."""
    weights = found.weights[:, :, 1:].astype(np.float64)
    queries = np.arange(1, len(found.words))
    entropy = -np.where(weights > 0, weights * np.log(np.where(weights > 0, weights, 1.0)), 0.0).sum(-1)
    columns = {
        "itself": weights[:, :, queries - 1, queries].mean(-1),
        "token before": weights[:, :, queries - 1, queries - 1].mean(-1),
        "first token": weights[..., 0].mean(-1),
        "keys in effect": np.exp(entropy).mean(-1),
    }
    rows = [
        {
            "layer": layer,
            "head": head,
            **{name: round(float(column[i, j]), 3) for name, column in columns.items()},
        }
        for i, layer in enumerate(found.layers)
        for j, head in enumerate(found.heads)
    ]
    prompt = "".join(found.words).replace("␣", " ")
    title = f"Where heads look in “{prompt}”: mean weights, and the exponential of the entropy"
    return Table(title, pd.DataFrame(rows), folded=True)
