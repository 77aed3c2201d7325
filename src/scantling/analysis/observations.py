"""A table of finished runs, anyone's, read and checked: every row is used or named, none is dropped in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scantling.analysis.budgets import FLOPS_PER_PARAMETER_AND_TOKEN, grouped
from scantling.analysis.huber import Array

READERS = {".csv": pd.read_csv, ".tsv": lambda path: pd.read_csv(path, sep="\t")} | dict.fromkeys(
    (".jsonl", ".ndjson"), lambda path: pd.read_json(path, lines=True)
)


@dataclass(frozen=True)
class Observations:
    """`runs`: a row each with N, D, C, loss and run, under the row's number in the file, which counts from 1.

    `counts`: parameters under each convention, by the name of its column; the first is N. `left_out` says which rows the
    user asked to leave out; `warnings`, what about the table makes its fits doubtful.
    """

    runs: pd.DataFrame
    counts: dict[str, Array]
    left_out: str | None
    warnings: tuple[str, ...]

    @property
    def k(self) -> float:
        """FLOPs per parameter and token as these rows count them, C = kND: the median of all rows."""
        return float(np.median(self.runs["C"] / self.runs["N"] / self.runs["D"]))

    @property
    def bootstrap(self) -> dict[str, Any]:
        """What the bootstrap draws, as settings of `fit`: runs, of a planned grid noise, for its budgets must all stay."""
        is_grid = is_isoflop(self.runs)
        return {"runs": self.runs["run"].to_numpy(), "resampling": "noise" if is_grid else "runs"}

    def with_warnings(self, *warnings: str) -> Observations:
        return replace(self, warnings=(*self.warnings, *warnings))


def read_table(path: Path) -> pd.DataFrame:
    """A CSV, TSV or JSON-lines file, its rows numbered from 1. Raises FileNotFoundError, or ValueError for another kind."""
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

    `n`, `d`, `c`, `loss`: names of columns; several for `n` are conventions of counting. Without `d`, D = C/(6N); without
    `c`, C = 6ND. `run` names the run of each row where a run has several. `unique`: fresh tokens of the run.
    `same`: columns that, where there are such, must not mix values. `drop_highest`: so many of the highest losses are left
    out. `irreducible`: known entropy, below which no loss can be.

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
        if name not in table:
            continue
        entries = table[name].astype(str).to_numpy()
        values = pd.Series(entries).value_counts()
        if len(values) > 1:
            fewer = table.index[entries != values.index[0]]
            raise ValueError(
                f"column {name} mixes {', '.join(map(str, values.index[:5]))}: losses on different {name} are not "
                f"comparable; {values.index[0]} is in most rows, others in {numbered(fewer)}"
            )
    sizes = numbers[conventions[0]]
    if d is not None:
        tokens = numbers[d]
        compute = FLOPS_PER_PARAMETER_AND_TOKEN * sizes * tokens if c is None else numbers[c]
    else:
        compute = numbers[str(c)]
        tokens = compute / (FLOPS_PER_PARAMETER_AND_TOKEN * sizes)
    names = table.index if run is None else table[run].astype(str)
    runs = pd.DataFrame(
        {"N": sizes, "D": tokens, "C": compute, "loss": numbers[loss], "run": np.asarray(names)},
        index=table.index,
    )
    twice = runs.index[np.asarray(runs.duplicated(["N", "D", "loss"], keep=False))]
    if len(twice):
        raise ValueError(
            f"the same N, D and loss stand in {numbered(twice)}: a run counted twice narrows intervals"
        )
    if irreducible is not None:
        below = runs.index[numbers[loss] <= irreducible]
        if len(below):
            raise ValueError(f"loss is at or below the irreducible {irreducible:g} in {numbered(below)}")
    left_out = None
    if drop_highest:
        highest = runs.index[np.argsort(-numbers[loss], kind="stable")[:drop_highest]]
        left_out = f"left out as asked, the {some(drop_highest, 'highest loss', of_many='es')}: {numbered(highest.sort_values())}"
        runs = runs.drop(highest)
    if len(grouped(np.log(runs["C"].to_numpy()))) == 1:
        raise ValueError(
            f"one budget only: all {len(runs)} rows have about {runs['C'].mean():.3g} FLOPs, and how loss falls with "
            "compute cannot be seen"
        )
    kept = table.index.isin(runs.index)
    counts = {name: numbers[name][kept] for name in conventions}
    fresh = None if unique is None else numbers[unique][kept]
    return Observations(runs, counts, left_out, tuple(doubts(runs, fresh, several=run is not None)))


def numeric(table: pd.DataFrame, name: str) -> Array:
    """The column as positive, finite numbers; raises ValueError naming every row that is not."""
    values = np.asarray(pd.to_numeric(table[name], errors="coerce"), dtype=float)
    wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(wrong):
        entries = dict.fromkeys(str(entry) for entry in table[name].iloc[wrong[:10]])
        raise ValueError(
            f"column {name} must be positive and finite: {', '.join(entries)} in {numbered(table.index[wrong])}"
        )
    return values


def numbered(index: pd.Index | np.ndarray) -> str:
    """'row 3' or 'rows 3, 7', of many the first ten."""
    listed = ", ".join(map(str, index[:10]))
    return f"row{'s' if len(index) > 1 else ''} {listed}" + (
        f" and {len(index) - 10} more" if len(index) > 10 else ""
    )


def some(n: int, noun: str, *, of_many: str = "s") -> str:
    """'1 run', '2 runs'."""
    return f"{n} {noun}{'' if n == 1 else of_many}"


def digits(number: float, n: int) -> str:
    """So many that count, zeros among them: 13.0 beside 13.2."""
    return f"{number:#.{n}g}".rstrip(".")


def doubts(runs: pd.DataFrame, unique: Array | None, several: bool) -> list[str]:
    found = []
    n, d, c = (runs[name].to_numpy() for name in ("N", "D", "C"))
    ratio = c / (FLOPS_PER_PARAMETER_AND_TOKEN * n * d)
    if ratio.max() / ratio.min() > 1.5:
        found.append(
            f"mixed conventions: C/(6ND) runs from {ratio.min():.2f} to {ratio.max():.2f}, so FLOPs, parameters and tokens "
            "are not counted in one way"
        )
    if unique is not None:
        repeats = d / unique
        if (repeats > 1.01).any():
            n_repeated = int((repeats > 1.01).sum())
            pass_their = "passes its" if n_repeated == 1 else "pass their"
            found.append(
                f"repeated epochs: {some(n_repeated, 'row')} {pass_their} data up to {repeats.max():.1f} times, which this form "
                "counts as fresh"
            )
    if several and len(np.unique(runs["run"])) < len(runs):
        found.append(
            "several rows of one run: those before its end are of a learning rate that has not decayed, unless the "
            "schedule was matched to each length"
        )
    return found


def is_isoflop(runs: pd.DataFrame, sizes: int = 4) -> bool:
    """Whether at least two budgets have `sizes` models each, and no row lies outside of such a budget."""
    n, c = np.asarray(runs["N"]), np.log(np.asarray(runs["C"]))
    groups = grouped(c)
    return len(groups) > 1 and all(len(np.unique(n[g])) >= sizes for g in groups)
