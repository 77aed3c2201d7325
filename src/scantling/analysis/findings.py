"""Findings beside the numbers of a fit or a study: what was left out, what makes them doubtful.

`report` puts them into words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# --- of a fit ---


@dataclass(frozen=True)
class NotFalling:
    """An exponent that is not positive: loss does not fall along its axis."""

    exponent: str
    value: float


@dataclass(frozen=True)
class FloorLost:
    """E near 0: the runs do not bend enough to determine the irreducible loss."""

    floor: float


@dataclass(frozen=True)
class FewBudgets:
    """Exponents of compute rest on only this many budgets."""

    budgets: int


@dataclass(frozen=True)
class WideBootstrap:
    """Huber's delta is below most residuals: intervals of a bootstrap over runs are too wide."""


# --- of a power law through best sizes ---


@dataclass(frozen=True)
class FewOptima:
    """The exponent rests on only this many best sizes, one a budget."""

    budgets: int


@dataclass(frozen=True)
class OptimaAtEdge:
    """Budgets, in FLOPs, whose best size is the smallest or largest that was run."""

    budgets: tuple[float, ...]


@dataclass(frozen=True)
class ParabolaBias:
    """What parabolas miss the exponent by on a noiseless law, and the standard deviation that noise adds."""

    bias: float
    spread: float


@dataclass(frozen=True)
class UndecayedCurves:
    """The envelope of training curves takes losses before the learning rate has decayed."""


# --- of a table of runs ---


@dataclass(frozen=True)
class HighestDropped:
    """Numbers of the rows of highest loss, which the user asked to leave out."""

    rows: tuple[int, ...]


@dataclass(frozen=True)
class MixedConventions:
    """The range of C/(6ND), too wide for FLOPs, parameters and tokens that are counted in one way."""

    lowest: float
    highest: float


@dataclass(frozen=True)
class RepeatedEpochs:
    """How many rows go over their fresh tokens again, and how often the one that does so most."""

    rows: int
    epochs: float


@dataclass(frozen=True)
class UnfinishedRows:
    """Several rows of one run: all but its last are of a learning rate that has not decayed."""


# --- of a study ---


@dataclass(frozen=True)
class Unreadable:
    """A directory that is not a whole run, and why."""

    run: str
    reason: str


@dataclass(frozen=True)
class NotFinished:
    """Runs that failed, or are not finished."""

    status: Literal["failed", "unfinished"]
    runs: tuple[str, ...]


@dataclass(frozen=True)
class ConstantSchedule:
    """The learning rate does not fall with a run's end."""


@dataclass(frozen=True)
class PartnerLost:
    """A run without which a seed (of the baseline) or an arm (of another) is not compared at a scale."""

    status: str
    scale: str
    arm: str
    seed: int
    baseline: str


# --- of arms compared ---


@dataclass(frozen=True)
class NothingCompared:
    """A scale at which one arm alone has runs."""

    scale: str


@dataclass(frozen=True)
class NoBaselineLaw:
    """Why the baseline's runs give no law, and differences no gain in compute."""

    reason: str


@dataclass(frozen=True)
class BaselineLawDoubt:
    """What makes the baseline's law doubtful."""

    doubt: Finding


@dataclass(frozen=True)
class OtherLength:
    """An arm that trains on more tokens than the baseline, or fewer: by this share of them."""

    scale: str
    arm: str
    baseline: str
    share: float


@dataclass(frozen=True)
class OffTheLaw:
    """The baseline's mean loss, and the law's with its interval, apart by more than both intervals."""

    scale: str
    loss: float
    predicted: float
    low: float
    high: float


@dataclass(frozen=True)
class Extrapolated:
    """Arms whose gains read the law far beyond its largest run, of `largest` FLOPs, each
    with how many times as far.
    """

    largest: float
    beyond: tuple[tuple[str, float], ...]


Finding = (
    NotFalling
    | FloorLost
    | FewBudgets
    | WideBootstrap
    | FewOptima
    | OptimaAtEdge
    | ParabolaBias
    | UndecayedCurves
    | HighestDropped
    | MixedConventions
    | RepeatedEpochs
    | UnfinishedRows
    | Unreadable
    | NotFinished
    | ConstantSchedule
    | PartnerLost
    | NothingCompared
    | NoBaselineLaw
    | BaselineLawDoubt
    | OtherLength
    | OffTheLaw
    | Extrapolated
)
