"""Findings in words, one sentence each, as pages and terminals show them."""

from __future__ import annotations

from functools import singledispatch

from scantling.analysis import findings as f
from scantling.analysis.observations import listed, numbered
from scantling.report.numbers import interval, some


@singledispatch
def sentence(finding: f.Finding) -> str:
    """A finding in words, without a full stop, for a list."""
    raise TypeError(f"{type(finding).__name__} has no sentence")


# --- of a fit ---


@sentence.register
def _(found: f.NotFalling) -> str:
    return f"{found.exponent} = {found.value:.3g} is not positive: loss does not fall along this axis"


@sentence.register
def _(found: f.FloorLost) -> str:
    return f"E = {found.floor:.3g}: these runs do not bend enough to determine the irreducible loss"


@sentence.register
def _(found: f.FewBudgets) -> str:
    points = some(found.budgets, "point")
    return f"only {some(found.budgets, 'budget')}: exponents of compute rest on {points}"


@sentence.register
def _(found: f.WideBootstrap) -> str:
    return (
        "wide intervals: Huber's delta is below most residuals, which makes the fit much like a median, "
        "whose bootstrap over runs held the truth in 94 to 99 % of simulated studies where 95 % was meant"
    )


# --- of a power law through best sizes ---


@sentence.register
def _(found: f.FewOptima) -> str:
    return f"only {some(found.budgets, 'budget')}: the exponent rests on {some(found.budgets, 'point')}"


@sentence.register
def _(found: f.OptimaAtEdge) -> str:
    flops = ", ".join(f"{budget:.3g}" for budget in found.budgets)
    return f"the minimum lies at the edge of the grid of sizes at {flops} FLOPs"


@sentence.register
def _(found: f.ParabolaBias) -> str:
    return (
        "parabola bias: on this grid parabolas through a noiseless law of alpha + beta terms miss its "
        f"exponent by {found.bias:+z.3f}, and noise adds ±{found.spread:.3f}"
    )


@sentence.register
def _(found: f.UndecayedCurves) -> str:
    return (
        "envelope: losses before the end of a schedule are higher than those of runs planned for that "
        "length, and the lowest of noisy curves is biased"
    )


# --- of a table of runs ---


@sentence.register
def _(found: f.HighestDropped) -> str:
    losses = some(len(found.rows), "highest loss", of_many="es")
    return f"left out as asked, the {losses}: {numbered(found.rows)}"


@sentence.register
def _(found: f.MixedConventions) -> str:
    return (
        f"mixed conventions: C/(6ND) runs from {found.lowest:.2f} to {found.highest:.2f}, so FLOPs, "
        "parameters and tokens are not counted in one way"
    )


@sentence.register
def _(found: f.RepeatedEpochs) -> str:
    pass_their = "passes its" if found.rows == 1 else "pass their"
    return (
        f"repeated epochs: {some(found.rows, 'row')} {pass_their} data up to {found.epochs:.1f} times, which "
        "this form counts as fresh"
    )


@sentence.register
def _(found: f.UnfinishedRows) -> str:
    return (
        "several rows of one run: those before its end are of a learning rate that has not decayed, unless "
        "the schedule was matched to each length"
    )


# --- of a study ---


@sentence.register
def _(found: f.Unreadable) -> str:
    return f"left out: {found.run}, {found.reason}"


@sentence.register
def _(found: f.NotFinished) -> str:
    words = "failed" if found.status == "failed" else "not finished"
    return f"left out, {words}: {listed(found.runs)}"


@sentence.register
def _(found: f.ConstantSchedule) -> str:
    return (
        "schedule=constant: the learning rate does not fall with a run's end, so runs are not matched to "
        "their length"
    )


@sentence.register
def _(found: f.PartnerLost) -> str:
    is_baseline = found.arm == found.baseline
    lost = f"seed {found.seed}" if is_baseline else f"arm {found.arm}"
    cause = f"the run of {found.baseline}" if is_baseline else f"its seed {found.seed}"
    state = "failed" if found.status == "failed" else "is not finished"
    return f"{lost} is not compared{at(found.scale)}: {cause} {state}"


# --- of arms compared ---


@sentence.register
def _(found: f.NothingCompared) -> str:
    return f"nothing is compared at {found.scale}"


@sentence.register
def _(found: f.NoBaselineLaw) -> str:
    return f"no gains in compute: {found.reason}"


@sentence.register
def _(found: f.BaselineLawDoubt) -> str:
    return f"law of the baseline: {sentence(found.doubt)}"


@sentence.register
def _(found: f.OtherLength) -> str:
    more = "more" if found.share > 0 else "fewer"
    return (
        f"{at(found.scale)} {found.arm} trains on {abs(found.share):.1%} {more} tokens than "
        f"{found.baseline}, and its difference is of these too"
    ).lstrip()


@sentence.register
def _(found: f.OffTheLaw) -> str:
    return (
        f"{at(found.scale)} the baseline comes to {found.loss:.4f} where the law says {found.predicted:.4f} "
        f"({interval(found.low, found.high, '.4f')}): a gain is what a difference as large takes on the law, "
        "and from the baseline's own loss on it may take more or less"
    ).lstrip()


@sentence.register
def _(found: f.Extrapolated) -> str:
    arms = ", ".join(f"{arm} {beyond:.2g} times" for arm, beyond in found.beyond)
    return (
        f"gains read the baseline's law beyond its largest run, of {found.largest:.2g} FLOPs ({arms} as "
        "far): there it is a guess, and intervals hold only if it goes on as fitted"
    )


def at(scale: str) -> str:
    """Which scale is meant, where a study has several."""
    return f" at {scale}" if scale else ""
