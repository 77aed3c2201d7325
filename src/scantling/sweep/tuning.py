"""`tune=lr`: before a comparison each arm's learning rate is chosen among shorter runs of one seed.

These runs stand in `runs/<study>/tuning/` and are the record of the search: the same command finds them
finished, and chooses the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scantling.config.mistakes import Mistake
from scantling.runs.directory import RunDirectory

FOLDER = "tuning"
"""Folder of the search's runs, inside the study's."""


@dataclass(frozen=True)
class TuningSettings:
    """`conf/tune/lr.yaml`. Raises Mistake for numbers that do not make a search."""

    factors: list[float]
    extend: int
    budget: float
    seed: int

    def __post_init__(self) -> None:
        if len(self.factors) < 3 or sorted({f for f in self.factors if f > 0}) != self.factors:
            raise Mistake(f"tune.factors={self.factors} must be three or more positive numbers that rise")
        if not 0 < self.budget <= 1:
            raise Mistake(f"tune.budget={self.budget} is a share of a run: above 0, at most 1")
        if self.extend < 0:
            raise Mistake(f"tune.extend={self.extend} must not be negative")


@dataclass
class Search:
    """The search of one arm: which rates are still to be tried, and which is best.

    `overrides` are the arm's without a seed, matched where arms are; `lr` its own rate, `budget`
    what of `budget.` it sets.
    """

    label: str
    overrides: list[str]
    lr: float
    budget: dict[str, float]
    settings: TuningSettings
    tried: dict[float, float | None] = field(default_factory=dict)
    """Bits per byte by rate: infinite where the loss was not finite, None where the run
    failed for another reason.
    """

    def wanted(self) -> list[float]:
        """The rates to try: the grid, then one at a time beyond an outermost best; none once it has ended."""
        if not self.tried:
            return [round_rate(self.lr * factor) for factor in self.settings.factors]
        rates = sorted(self.tried)
        if self.failed or not self.edge or len(rates) >= len(self.settings.factors) + self.settings.extend:
            return []
        if self.best == rates[0]:
            return [round_rate(rates[0] ** 2 / rates[1])]
        return [round_rate(rates[-1] ** 2 / rates[-2])]

    def command(self, rate: float, study: str) -> list[str]:
        """The overrides with which a rate is tried."""
        shares = {key: amount * self.settings.budget for key, amount in self.budget.items()}
        shorter = [f"budget.{key}={int(n) if key == 'steps' else n:g}" for key, n in shares.items()]
        return [
            *self.overrides,
            "tuned={}",  # so that a try is none of the runs that await their rate
            f"seed={self.settings.seed}",
            f"lr={rate:g}",
            *shorter,
            f"study={study}/{FOLDER}",
            "match=null",
        ]

    @property
    def failed(self) -> bool:
        """Whether a try gave no answer, or none could be trained."""
        return None in self.tried.values() or min(self.scores.values(), default=math.inf) == math.inf

    @property
    def scores(self) -> dict[float, float]:
        """Bits per byte by rate, of the tries that gave an answer."""
        return {rate: score for rate, score in self.tried.items() if score is not None}

    @property
    def best(self) -> float:
        """The rate with the fewest bits per byte, of equal ones the lowest."""
        return min(sorted(self.scores), key=self.scores.__getitem__)

    @property
    def edge(self) -> bool:
        """Whether the best is the lowest or the highest tried, so that a better one may lie beyond."""
        return self.best in (min(self.tried), max(self.tried))

    def chosen(self) -> list[str]:
        """Overrides with the rate, and a note of the search."""
        rates = sorted(self.scores)
        scores = ["null" if self.scores[r] == math.inf else f"{self.scores[r]:.6g}" for r in rates]
        lists = f"lr:[{','.join(f'{rate:g}' for rate in rates)}],bpb:[{','.join(scores)}]"
        settings = f"budget:{self.settings.budget:g},seed:{self.settings.seed}"
        return [f"lr={self.best:g}", f"tuned={{{lists},edge:{str(self.edge).lower()},{settings}}}"]


def plan_searches(
    looks: Sequence[dict[str, Any]], named: Sequence[str], settings: TuningSettings
) -> list[Search]:
    """A search for each job, the same for jobs that differ only in their seed.

    Raises Mistake where jobs differ only in the learning rate.
    """
    found: dict[tuple[str, ...], Search] = {}
    rates: dict[tuple[str, ...], float] = {}
    of_jobs = []
    for look, label in zip(looks, named, strict=True):
        arm = tuple(o for o in look["overrides"] if not o.startswith("seed="))
        if rates.setdefault(tuple(o for o in arm if not o.startswith("lr=")), look["lr"]) != look["lr"]:
            raise Mistake("tune=lr chooses lr: leave lr out of the sweep")
        name = " ".join(word for word in label.split() if not word.startswith("seed="))
        search = Search(name or "the only arm", list(arm), look["lr"], look["budget"], settings)
        of_jobs.append(found.setdefault(arm, search))
    return of_jobs


def round_rate(rate: float) -> float:
    """A rate to four significant digits, which a command line can hold."""
    return float(f"{rate:.4g}")


def stop_reason(directory: RunDirectory) -> str | None:
    """Why the guard stopped the run, if it did: that is an answer, and not a reason to try again."""
    return next((row["reason"] for row in directory.guarded() if row["action"] == "stop"), None)


def run_score(directory: RunDirectory) -> float | None:
    """Bits per byte of a run that finished.

    Infinite where the loss was not finite, or the guard stopped the run; None for a run that gave no answer.
    """
    if directory.is_finished:
        bpb = directory.summary["val/bpb"]
        return bpb if math.isfinite(bpb) else math.inf
    return None if stop_reason(directory) is None else math.inf
