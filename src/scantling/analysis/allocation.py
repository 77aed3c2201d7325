"""How to spend a budget: compute-optimal parameters and tokens, by a law or by each budget's best runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from scantling.analysis.budgets import FLOPS_PER_PARAMETER_AND_TOKEN, larger
from scantling.analysis.forms import HOFFMANN, saturating
from scantling.analysis.huber import Array
from scantling.analysis.scaling import Fit, Interval, estimate, refit_hoffmann


def hoffmann_loss(law: Mapping[str, Any], n: ArrayLike, d: ArrayLike) -> Array:
    """L = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, equation 2) of one law or several."""
    return law["E"] + law["A"] / np.asarray(n) ** law["alpha"] + law["B"] / np.asarray(d) ** law["beta"]


def optimal_parameters(law: Mapping[str, Array], compute: ArrayLike, k: float) -> Array:
    """N that minimises Hoffmann's form under C = kND.

    N = (alpha·A/(beta·B))^(1/(alpha+beta))·(C/k)^(beta/(alpha+beta)) (Hoffmann et al. 2022, equation 4).
    """
    alpha, beta = law["alpha"], law["beta"]
    log_g = (np.log(alpha * law["A"]) - np.log(beta * law["B"])) / (alpha + beta)
    return np.exp(log_g + beta / (alpha + beta) * np.log(np.asarray(compute, dtype=float) / k))


def optimal_loss(law: Mapping[str, Array], compute: ArrayLike, k: float) -> Array:
    """The law's loss at that N, and D = C/kN."""
    n = optimal_parameters(law, compute, k)
    return hoffmann_loss(law, n, np.asarray(compute, dtype=float) / k / n)


def optimum_table(
    fit: Fit, budgets: Sequence[float], *, k: float = FLOPS_PER_PARAMETER_AND_TOKEN
) -> pd.DataFrame:
    """N, D, tokens per parameter and loss for each budget in FLOPs; `_low` and `_high`
    where the fit has resamples.

    `fit` is of Hoffmann's form; raises ValueError otherwise, and where an exponent is not positive.
    """
    if fit.form != HOFFMANN:
        raise ValueError(f"the optimum of a budget needs a fit of {HOFFMANN.formula}")
    if fit.alpha <= 0 or fit.beta <= 0:
        raise ValueError(
            f"alpha = {fit.alpha:.3g}, beta = {fit.beta:.3g}: no optimum where loss does not fall"
        )
    table = []
    for compute in budgets:
        columns = {
            "N": lambda law, c=compute: optimal_parameters(law, c, k),
            "D": lambda law, c=compute: c / k / optimal_parameters(law, c, k),
            "tokens_per_parameter": lambda law, c=compute: c / k / optimal_parameters(law, c, k) ** 2,
            "loss": lambda law, c=compute: optimal_loss(law, c, k),
        }
        row = {"C": float(compute)}
        with np.errstate(invalid="ignore"):  # resamples whose exponent is negative have no optimum
            for name, statistic in columns.items():
                row[name], interval = estimate(fit, statistic)
                if interval is not None:
                    row[f"{name}_low"], row[f"{name}_high"] = interval
        table.append(row)
    return pd.DataFrame(table)


def floor_is_near(fit: Fit, optimum: pd.DataFrame) -> bool:
    """Whether a chart of `optimum_table` has room for E: a line far below would flatten all else."""
    return bool(optimum["loss"].min() < 2 * fit.E)


def allocation_exponent(fit: Fit) -> tuple[float, Interval | None]:
    """The exponent a of N_opt ∝ C^a, which is beta/(alpha + beta)."""
    return estimate(fit, lambda law: law["beta"] / (law["alpha"] + law["beta"]))


def frontier(fit: Fit, *, k: float = FLOPS_PER_PARAMETER_AND_TOKEN) -> Fit:
    """The loss of compute-optimal training against C, exactly: L = E + B'/C^gamma.

    gamma = alpha·beta/(alpha+beta). A `Fit` of `saturating("C")` at the budgets of the runs, with the
    same resamples and doubts.
    """
    form = saturating("C")

    def along(theta_SP: Array) -> Array:
        law = HOFFMANN.published(theta_SP)
        gamma = law["alpha"] * law["beta"] / (law["alpha"] + law["beta"])
        with np.errstate(invalid="ignore"):
            reducible = optimal_loss(law, 1.0, k) - law["E"]
        return np.stack([np.log(law["E"]), np.log(reducible), gamma], axis=1)

    return Fit(
        form=form,
        sizes={"C": k * fit.sizes["N"] * fit.sizes["D"]},
        loss=fit.loss,
        theta_P=along(fit.theta_P[None])[0],
        objective=fit.objective,
        found=fit.found,
        delta=fit.delta,
        resampled_SP=None if fit.resampled_SP is None else along(fit.resampled_SP),
        spread_degrees=fit.spread_degrees,
        level=fit.level,
        warnings=fit.warnings,
    )


def convention_table(
    counts: Mapping[str, ArrayLike], tokens: ArrayLike, loss: ArrayLike, **settings
) -> pd.DataFrame:
    """The same runs under each way of counting parameters: alpha, beta, and a of N_opt ∝ C^a, C = 6ND.

    Porian et al. 2024 (arXiv:2406.19146) trace the disagreement between Kaplan and Hoffmann
    to this, among other things.
    """
    table = []
    for convention, n in counts.items():
        fit = refit_hoffmann(n, tokens, loss, **settings)
        a, interval = allocation_exponent(fit)
        row = {"convention": convention, "alpha": fit.alpha, "beta": fit.beta, "a": a}
        table.append(row | ({} if interval is None else {"a_low": interval[0], "a_high": interval[1]}))
    return pd.DataFrame(table)


@dataclass(frozen=True)
class Gate:
    """A fit of the runs up to `cutoff` FLOPs, put to the test on those above.

    `held_out`: a row each of these, with C, loss, predicted and, where an interval was computed, low and
    high. `error`: mean of |predicted/observed − 1| over the held-out runs; `bias`: the mean with its sign;
    `inside`: the share of them in the prediction interval, where one was computed.
    """

    cutoff: float
    n_fitted: int
    n_held_out: int
    error: float
    bias: float
    inside: float | None
    tolerance: float
    held_out: pd.DataFrame

    @property
    def passed(self) -> bool:
        """Whether the mean error is within the tolerance."""
        return self.error <= self.tolerance


def held_out_gate(
    N: ArrayLike,
    D: ArrayLike,
    loss: ArrayLike,
    *,
    compute: ArrayLike,
    share: float,
    tolerance: float,
    runs: ArrayLike | None = None,
    seed: int = 0,
    **settings,
) -> Gate:
    """Hold out the `share` of runs with the largest budgets, in whole budgets, and predict them.

    At least one budget is held out. `settings`: those of `fit`; with `resamples` each prediction has its
    interval. Raises ValueError where the rest is too small to fit or nothing is larger.
    """
    n, d, losses, flops = (np.asarray(x, dtype=float) for x in (N, D, loss, compute))
    above = larger(flops, np.quantile(flops, 1 - share))
    if not above.any():  # the largest budget has more than this share
        smaller = flops[larger(flops.max(), flops)]
        if not len(smaller):
            raise ValueError(
                f"no run has more than {flops.max():.3g} FLOPs: nothing larger is left to predict"
            )
        above = larger(flops, smaller.max())
    names = None if runs is None else np.asarray(runs)[~above]
    inner = refit_hoffmann(n[~above], d[~above], losses[~above], runs=names, seed=seed, **settings)
    sizes, observed = {"N": n[above], "D": d[above]}, losses[above]
    predicted = inner.predict(**sizes)
    relative = predicted / observed - 1
    held_out = pd.DataFrame({**sizes, "C": flops[above], "loss": observed, "predicted": predicted})
    inside = None
    if inner.resampled_SP is not None:
        low, high = inner.predict_interval(**sizes, seed=seed)
        inside = float(((low <= observed) & (observed <= high)).mean())
        held_out = held_out.assign(low=low, high=high)
    return Gate(
        cutoff=float(flops[~above].max()),
        n_fitted=int((~above).sum()),
        n_held_out=int(above.sum()),
        error=float(np.abs(relative).mean()),
        bias=float(relative.mean()),
        inside=inside,
        tolerance=tolerance,
        held_out=held_out,
    )
