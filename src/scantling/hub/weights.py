"""The tensors of a family, each rule read both ways.

Every rule has the same three steps: the family's tensors one below the other, rows in another order, the
decoder's cut off one after the other. Renaming, q, k and v as one matrix, heads that alternate, a transposed
matrix, positions that start at row 2 are all of that kind, so one rule imports and exports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scantling.model.attn import Attention
from scantling.model.decoder import Decoder

Shape = tuple[int, ...]
Modules = Mapping[str, nn.Module]
Places = Mapping[str, str]
"""What {i} and {e} in a name stand for: the number of a layer, and of an expert."""


@dataclass(frozen=True)
class Rule:
    """Tensors `ours`, the decoder's, from `theirs`, the family's, and back."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    rows: Shape | None = None  # of each of theirs; None: one tensor, which has them all
    order: Tensor | None = None  # ours = theirs[order]
    skipped: int = 0  # rows of theirs before the first of ours; zeros at export
    transposed: bool = False  # theirs keeps matrices as input x output
    folded: int | None = None  # theirs is a matrix of so many rows, ours as many vectors

    def their_shapes(self, ours: Mapping[str, Shape]) -> dict[str, Shape]:
        """The shapes of the family's tensors that give the decoder's these shapes."""
        shapes = [ours[name] for name in self.ours]
        total = self.skipped + sum(shape[0] for shape in shapes)
        rows = zip(self.theirs, self.rows or (total,), strict=True)
        return {name: self.stored((n, *shapes[0][1:])) for name, n in rows}

    def stored(self, shape: Shape) -> Shape:
        """The shape that a tensor of the family has on disk for `shape`, rows before columns."""
        if self.folded is not None:
            return (self.folded, shape[0] // self.folded)
        return shape[::-1] if self.transposed else shape

    def to_ours(self, theirs: list[Tensor], ours: Mapping[str, Shape]) -> dict[str, Tensor]:
        """The decoder's tensors from the family's, in memory of their own."""
        if self.folded is not None:
            theirs = [tensor.flatten() for tensor in theirs]
        if self.transposed:
            theirs = [tensor.T for tensor in theirs]
        whole = (theirs[0] if len(theirs) == 1 else torch.cat(theirs))[self.skipped :]
        if self.order is not None:
            whole = whole[self.order]
        pieces = whole.split([ours[name][0] for name in self.ours])
        # Cloned: a piece of a larger tensor would be saved with all of it.
        return {name: piece.clone() for name, piece in zip(self.ours, pieces, strict=True)}

    def to_theirs(self, ours: list[Tensor]) -> dict[str, Tensor]:
        """The family's tensors from the decoder's, contiguous."""
        whole = ours[0] if len(ours) == 1 else torch.cat(ours)
        if self.order is not None:
            whole = whole[self.order.argsort()]
        if self.skipped:
            whole = torch.cat((whole.new_zeros(self.skipped, *whole.shape[1:]), whole))
        pieces = whole.split(self.rows or (len(whole),))
        if self.folded is not None:
            pieces = [piece.view(self.stored(tuple(piece.shape))) for piece in pieces]
        if self.transposed:
            pieces = [piece.T for piece in pieces]
        return {name: piece.contiguous() for name, piece in zip(self.theirs, pieces, strict=True)}


class Layout(ABC):
    """How a family stores the tensors of one of the decoder's modules: the right-hand side of its table."""

    @abstractmethod
    def rules(self, ours: str, places: Places, modules: Modules) -> list[Rule]:
        """The rules for the module `ours`; those for tensors that it lacks are left out afterwards."""


Table = Mapping[str, str | Layout]
"""The decoder's modules and how the family stores them; a plain string is a name."""


@dataclass(frozen=True)
class Named(Layout):
    """The same tensors under another name."""

    theirs: str
    transposed: bool = False
    skipped: int = 0

    def rules(self, ours: str, places: Places, modules: Modules) -> list[Rule]:
        theirs = self.theirs.format(**places)
        return [
            Rule(
                (f"{ours}.weight",), (f"{theirs}.weight",), transposed=self.transposed, skipped=self.skipped
            ),
            Rule((f"{ours}.bias",), (f"{theirs}.bias",)),
            Rule((ours,), (theirs,)),  # what is no weight or bias stands in the table under its whole name
        ]


@dataclass(frozen=True)
class Apart(Layout):
    """`attn.qkv` as three layers, whose names have q, k and v at the place {p}."""

    theirs: str

    def rules(self, ours: str, places: Places, modules: Modules) -> list[Rule]:
        theirs = {part: self.theirs.format(p=part, **places) for part in "qkv"}
        attn = ours.removesuffix(".qkv")
        weights = tuple(f"{name}.weight" for name in theirs.values())
        return [
            Rule((f"{ours}.weight",), weights, rows=qkv_widths(attn, modules)),
            *(Rule((f"{attn}.{part}_bias",), (f"{name}.bias",)) for part, name in theirs.items()),
        ]


@dataclass(frozen=True)
class Together(Layout):
    """`attn.qkv` as one layer: all queries, keys, values.

    `by_head`: the queries, key and value of each key head instead.
    """

    theirs: str
    by_head: bool = False
    transposed: bool = False

    def rules(self, ours: str, places: Places, modules: Modules) -> list[Rule]:
        theirs, attn = self.theirs.format(**places), ours.removesuffix(".qkv")
        order = by_head_order(attn, modules) if self.by_head else None
        biases = tuple(f"{attn}.{part}_bias" for part in "qkv")
        return [
            Rule((f"{ours}.weight",), (f"{theirs}.weight",), order=order, transposed=self.transposed),
            Rule(biases, (f"{theirs}.bias",), order=order),
        ]


@dataclass(frozen=True)
class Joined(Layout):
    """Several layers of the decoder as one of the family's: gate and up of a feed-forward."""

    theirs: str
    parts: tuple[str, ...]

    def rules(self, ours: str, places: Places, modules: Modules) -> list[Rule]:
        theirs = self.theirs.format(**places)
        return [
            Rule(tuple(f"{ours}.{part}.{kind}" for part in self.parts), (f"{theirs}.{kind}",))
            for kind in ("weight", "bias")
        ]


@dataclass(frozen=True)
class Folded(Layout):
    """A list of norms, one a head, as the rows of one matrix."""

    theirs: str

    def rules(self, ours: str, places: Places, modules: Modules) -> list[Rule]:
        norms = [f"{ours}.{name}.weight" for name, _ in named_children(ours, modules)]
        theirs = (f"{self.theirs.format(**places)}.weight",)
        return [Rule(tuple(norms), theirs, folded=len(norms))] if norms else []


def qkv_widths(attn: str, modules: Modules) -> Shape:
    """How many rows all queries have, all keys, and all values."""
    module = modules[attn]
    assert isinstance(module, Attention)
    return tuple(heads * module.d_head for heads in module.heads)


def by_head_order(attn: str, modules: Modules) -> Tensor:
    """The family's row for each of the decoder's, where the rows of each key head are together: q, k, v."""
    q, k, v = qkv_widths(attn, modules)
    module = modules[attn]
    assert isinstance(module, Attention)
    theirs_KGE = torch.arange(q + k + v).view(module.heads[1], -1, module.d_head)
    return torch.cat([part.flatten() for part in (theirs_KGE[:, :-2], theirs_KGE[:, -2], theirs_KGE[:, -1])])


def named_children(path: str, modules: Modules) -> list[tuple[str, nn.Module]]:
    """Name and module of each child, none where the path is not a module."""
    return list(modules[path].named_children()) if path in modules else []


def fill_places(ours: str, modules: Modules) -> Iterator[dict[str, str]]:
    """Yields each way to fill the places of a name with modules that are there."""
    if "{" not in ours:
        yield {}
        return
    before, _, rest = ours.partition("{")
    letter, _, after = rest.partition("}")
    for name, _ in named_children(before.removesuffix("."), modules):
        for others in fill_places(before + name + after, modules):
            yield {letter: name, **others}


def rules_of(table: Table, decoder: Decoder) -> list[Rule]:
    """A family's table spelled out for this decoder. Of two rules for one tensor the later holds.

    Raises ValueError when the decoder has a tensor that the table has no place for.
    """
    modules, have = dict(decoder.named_modules()), shapes_of(decoder)
    rules: list[Rule] = []
    for ours, theirs in table.items():
        layout = Named(theirs) if isinstance(theirs, str) else theirs
        for places in fill_places(ours, modules):
            name = ours.format(**places)
            if name in modules or name in have:
                rules += (r for r in layout.rules(name, places, modules) if have.keys() >= set(r.ours))
    holds = {name: rule for rule in rules for name in rule.ours}
    left = [name for name in have if name not in holds]
    if left:
        others = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(f"it has no place for {left[0]}{others}")
    return [rule for rule in rules if all(holds[name] is rule for name in rule.ours)]


def shapes_of(decoder: Decoder) -> dict[str, Shape]:
    """The shape of every tensor of a decoder's state, by name."""
    return {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
