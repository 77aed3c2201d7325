"""Any table of finished runs, read and checked: every row is used or named, none silently dropped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scantling.analysis.budgets import FLOPS_PER_PARAMETER_AND_TOKEN, grouped
from scantling.analysis.findings import (
    Finding,
    HighestDropped,
    MixedConventions,
    RepeatedEpochs,
    UnfinishedRows,
)
from scantling.analysis.huber import Array

READERS = {".csv": pd.read_csv, ".tsv": lambda path: pd.read_csv(path, sep="\t")} | dict.fromkeys(
    (".jsonl", ".ndjson"), lambda path: pd.read_json(path, lines=True)
)

SAME_CONVENTION = 1.5
"""Rows whose C/(6ND) differ by a larger factor are not counted in one way."""

FRESH = 1.01
"""A run of at most this many times its fresh tokens is one of a single epoch."""


@dataclass(frozen=True)
class Observations:
    """`runs`: a row each with N, D, C, loss and run, under the row's number in the file, which counts from 1.

    `counts`: parameters under each convention, by the name of its column; the first is N. `left_out`: which
    rows the user asked to leave out; `warnings`, what about the table makes its fits doubtful.
    """

    runs: pd.DataFrame
    counts: dict[str, Array]
    left_out: HighestDropped | None
    warnings: tuple[Finding, ...]

    @property
    def k(self) -> float:
        """FLOPs per parameter and token as these rows count them, C = kND: the median of all rows."""
        return float(np.median(self.runs["C"] / self.runs["N"] / self.runs["D"]))

    @property
    def bootstrap(self) -> dict[str, Any]:
        """What the bootstrap draws, as settings of `fit`: runs; for a planned grid noise, as
        its budgets must all stay.
        """
        is_grid = is_isoflop(self.runs)
        return {"runs": self.runs["run"].to_numpy(), "resampling": "noise" if is_grid else "runs"}

    def with_warnings(self, *warnings: Finding) -> Observations:
        """A copy with further reasons for doubt."""
        return replace(self, warnings=(*self.warnings, *warnings))


def read_table(path: Path) -> pd.DataFrame:
    """A CSV, TSV or JSON-lines file, its rows numbered from 1.

    Raises FileNotFoundError, or ValueError for another kind of file.
    """
    if path.suffix not in READERS:
        raise ValueError(f"{path} is none of {', '.join(READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        table = READERS[path.suffix](path)
    except (ValueError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    table.index = pd.RangeIndex(1, len(table) + 1)
    return table


def observe(
    table: pd.DataFrame,
    *,
    n: str | Sequence[str],
    d: str | None,
    c: str | None,
    loss: str,
    run: str | None,
    unique: str | None,
    same: Sequence[str],
    drop_highest: int,
    irreducible: float | None,
) -> Observations:
    """Pick the columns and check them.

    `n`, `d`, `c`, `loss`: names of columns; several for `n` are conventions of counting. Without `d`,
    D = C/(6N); without `c`, C = 6ND. `run` names the run of each row where a run has several. `unique`:
    fresh tokens of the run. `same`: columns that, where there are such, must not mix values. `drop_highest`:
    this many of the highest losses are left out. `irreducible`: known entropy, below which no loss can be.

    Raises ValueError naming the rows.
    """
    conventions = [n] if isinstance(n, str) else list(n)
    if d is None and c is None:
        raise ValueError(
            "tokens are not known: name their column with d=…, or training FLOPs with c=… for D = C/(6N)"
        )
    named = [*conventions, *(name for name in (d, c, loss, run, unique) if name is not None)]
    for name in named:
        if name not in table:
            raise ValueError(f"there is no column {name!r}: columns are {', '.join(map(str, table))}")
    numbers = {name: numeric(table, name) for name in named if name != run}
    for name in same:
        if name in table:
            check_one_value(table, name)
    sizes = numbers[conventions[0]]
    if d is not None:
        tokens = numbers[d]
        compute = FLOPS_PER_PARAMETER_AND_TOKEN * sizes * tokens if c is None else numbers[c]
    else:
        compute = numbers[str(c)]
        tokens = compute / (FLOPS_PER_PARAMETER_AND_TOKEN * sizes)
    names = table.index if run is None else table[run].astype(str)
    every = pd.DataFrame(
        {"N": sizes, "D": tokens, "C": compute, "loss": numbers[loss], "run": np.asarray(names)},
        index=table.index,
    )
    check_losses(every, irreducible)
    highest = every.index[np.argsort(-numbers[loss], kind="stable")[:drop_highest]].sort_values()
    runs = every.drop(highest)
    check_budgets(runs)
    kept = table.index.isin(runs.index)
    fresh = None if unique is None else numbers[unique][kept]
    return Observations(
        runs=runs,
        counts={name: numbers[name][kept] for name in conventions},
        left_out=HighestDropped(tuple(highest)) if len(highest) else None,
        warnings=tuple(doubts(runs, fresh, several=run is not None)),
    )


def check_one_value(table: pd.DataFrame, name: str) -> None:
    """Raise ValueError naming the rows whose entry in a column is not that of most."""
    entries = table[name].astype(str).to_numpy()
    values = pd.Series(entries).value_counts()
    if len(values) > 1:
        fewer = table.index[entries != values.index[0]]
        raise ValueError(
            f"column {name} mixes {', '.join(map(str, values.index[:5]))}: losses on different {name} are "
            f"not comparable; {values.index[0]} is in most rows, others in {numbered(fewer)}"
        )


def check_losses(runs: pd.DataFrame, irreducible: float | None) -> None:
    """Raise ValueError naming rows that stand twice, and losses that no model can have."""
    twice = runs.index[np.asarray(runs.duplicated(["N", "D", "loss"], keep=False))]
    if len(twice):
        raise ValueError(
            f"the same N, D and loss stand in {numbered(twice)}: a run counted twice narrows intervals"
        )
    if irreducible is not None:
        below = runs.index[runs["loss"].to_numpy() <= irreducible]
        if len(below):
            raise ValueError(f"loss is at or below the irreducible {irreducible:g} in {numbered(below)}")


def check_budgets(runs: pd.DataFrame) -> None:
    """Raise ValueError where all runs have one budget."""
    if len(grouped(np.log(runs["C"].to_numpy()))) == 1:
        raise ValueError(
            f"one budget only: all {len(runs)} rows have about {runs['C'].mean():.3g} FLOPs, and how loss "
            "falls with compute cannot be seen"
        )


def numeric(table: pd.DataFrame, name: str) -> Array:
    """The column as positive, finite numbers; raises ValueError naming every row that is not."""
    values = np.asarray(pd.to_numeric(table[name], errors="coerce"), dtype=float)
    wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(wrong):
        entries = dict.fromkeys(str(entry) for entry in table[name].iloc[wrong[:10]])
        raise ValueError(
            f"column {name} must be positive and finite: {', '.join(entries)} in "
            f"{numbered(table.index[wrong])}"
        )
    return values


def numbered(rows: Sequence[int] | pd.Index | np.ndarray) -> str:
    """'row 3' or 'rows 3, 7', of many the first ten."""
    return f"row{'s' if len(rows) > 1 else ''} {listed(rows)}"


def listed(names: Iterable[object], most: int = 10) -> str:
    """Names with commas between them; of more than `most` the first, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return f"{', '.join(texts[:most])}{more}"


def doubts(runs: pd.DataFrame, unique: Array | None, several: bool) -> list[Finding]:
    """What about a table should make one careful.

    `unique`: fresh tokens of each row; `several`: whether a run may have several rows.
    """
    found: list[Finding] = []
    n, d, c = (runs[name].to_numpy() for name in ("N", "D", "C"))
    ratio = c / (FLOPS_PER_PARAMETER_AND_TOKEN * n * d)
    if ratio.max() / ratio.min() > SAME_CONVENTION:
        found.append(MixedConventions(float(ratio.min()), float(ratio.max())))
    if unique is not None:
        epochs = d / unique
        if (epochs > FRESH).any():
            found.append(RepeatedEpochs(int((epochs > FRESH).sum()), float(epochs.max())))
    if several and len(np.unique(runs["run"])) < len(runs):
        found.append(UnfinishedRows())
    return found


def is_isoflop(runs: pd.DataFrame, sizes: int = 4) -> bool:
    """Whether at least two budgets have `sizes` models each, and no row lies outside of such a budget."""
    n, c = np.asarray(runs["N"]), np.log(np.asarray(runs["C"]))
    groups = grouped(c)
    return len(groups) > 1 and all(len(np.unique(n[g])) >= sizes for g in groups)
