"""An IsoFLOP study before it is run: budgets, sizes, learning rates, and how wide its intervals will be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from scantling.analysis.allocation import optimal_loss, optimal_parameters
from scantling.analysis.budgets import FLOPS_PER_PARAMETER_AND_TOKEN, SAME_BUDGET, grouped
from scantling.analysis.forms import HOFFMANN
from scantling.analysis.huber import Array, minimise
from scantling.analysis.isoflop import best_sizes, slopes
from scantling.analysis.resampling import density_degrees_of_freedom, expanded_percentiles
from scantling.analysis.scaling import HUBER_DELTA

Law = Mapping[str, float]
"""Hoffmann's E, A, B, alpha, beta."""


@dataclass(frozen=True)
class Grid:
    """`budgets` budgets, each `ratio` times the one before, and `sizes` sizes around the optimum of each.

    They go from 1/`spread` to `spread` times the optimum; every cell has `seeds` seeds.
    """

    budgets: int
    ratio: float
    sizes: int
    spread: float
    seeds: int

    def check(self) -> None:
        """Raise ValueError for a grid that no law can be fitted to."""
        for name, least in {"budgets": 2, "sizes": 4, "seeds": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"isoflop.{name}={getattr(self, name)}: {least} are the least")
        for name, least in {"ratio": 1.1, "spread": 1.1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"isoflop.{name}={getattr(self, name)} must be at least {least}")

    @property
    def runs(self) -> int:
        """Number of runs."""
        return self.budgets * self.sizes * self.seeds

    def budgets_of(self, flops: float) -> list[float]:
        """FLOPs of one run in each budget, so that all runs together take `flops`."""
        powers = self.ratio ** np.arange(self.budgets)
        return (flops / (self.sizes * self.seeds) / powers.sum() * powers).tolist()

    def sizes_of(self, law: Law, budget: float, k: float = FLOPS_PER_PARAMETER_AND_TOKEN) -> list[float]:
        """Parameters around the law's optimum under C = kND."""
        optimum = optimal_size(law, budget, k)
        return (optimum * np.geomspace(1 / self.spread, self.spread, self.sizes)).tolist()

    def ideal(self, law: Law, flops: float) -> tuple[Array, Array, Array]:
        """N, D and C of every run, if every size could be built."""
        budgets = self.budgets_of(flops)
        n = np.array([size for budget in budgets for size in self.sizes_of(law, budget)])
        c = np.repeat(budgets, self.sizes)
        n, c = np.repeat(n, self.seeds), np.repeat(c, self.seeds)
        return n, c / FLOPS_PER_PARAMETER_AND_TOKEN / n, c


def optimal_size(law: Law, budget: float, k: float) -> float:
    """N_opt under C = kND."""
    return float(optimal_parameters({name: np.array([x]) for name, x in law.items()}, budget, k)[0])


# --- shapes ---


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_ff: int


@dataclass(frozen=True)
class Proportions:
    """What stays about alike from size to size.

    `aspect`: d_model per layer; `widening`: d_ff per d_model; `kv_share`: n_kv_heads per head. Kaplan et al.
    2020 (arXiv:2001.08361), section 3.1: at equal parameters the loss hardly depends on the shape; 6 layers
    of 4288 come within 3 % of 48 layers of 1600.
    """

    aspect: float
    d_head: int
    widening: float
    kv_share: float

    def shape(self, n_layers: int, d_model: int) -> Shape:
        """The shape with these proportions.

        The heads divide d_model, into an even number for rotary positions, and the
        key/value heads divide the heads.
        """
        heads = [n for n in range(1, d_model // 2 + 1) if d_model % (2 * n) == 0]
        n_heads = min(heads, key=lambda n: abs(np.log(n * self.d_head / d_model)))
        n_kv_heads = max(
            k for k in range(1, n_heads + 1) if n_heads % k == 0 and k <= max(1, n_heads * self.kv_share)
        )
        return Shape(n_layers, d_model, n_heads, n_kv_heads, round(self.widening * d_model))


def width(d_model: float) -> int:
    """The nearest multiple of 8, of 32 from 256 on, of 128 from 1024 on."""
    step = 8 if d_model < 256 else 32 if d_model < 1024 else 128
    return max(step, step * round(d_model / step))


def nearest_shape(
    target: float,
    proportions: Proportions,
    parameters: Callable[[Shape], float],
    *,
    most_layers: int = 256,
    off_shape: float = 0.05,
) -> Shape:
    """The shape with about `target` parameters and about the preset's aspect.

    It has the least ln²(N/target) + `off_shape`·ln²(aspect/its own). Raises ValueError where the smallest
    shape is over one and a half times too large.
    """

    def cost(shape: Shape) -> float:
        aspect = shape.d_model / shape.n_layers
        size = np.log(parameters(shape) / target)
        return float(size**2 + off_shape * np.log(aspect / proportions.aspect) ** 2)

    tried: list[Shape] = []
    for n_layers in range(1, most_layers + 1):
        widths = {width(proportions.aspect * n_layers * factor) for factor in np.geomspace(1 / 4, 4, 25)}
        tried += [proportions.shape(n_layers, d_model) for d_model in sorted(widths)]
        if parameters(proportions.shape(n_layers, min(widths))) > 4 * target:
            break
    best = min(tried, key=cost)
    n = parameters(best)
    if n > 1.5 * target:
        raise ValueError(
            f"no model of these parts has as few as {target:,.0f} parameters: the smallest has {n:,.0f}; "
            "give more FLOPs, fewer isoflop.budgets, or a smaller isoflop.spread or model.vocab_size"
        )
    return best


# --- learning rate ---


def porian(n: float, reference_n: float, reference_lr: float) -> float:
    """lr ∝ N^-0.36, N the parameters of linear layers with the output head (Porian et al. 2024,
    arXiv:2406.19146, figure 3: 3.7·N^-0.36, tuned AdamW between 5 M and 901 M). The constant, which moves
    with batch and optimiser, is the preset's.
    """  # noqa: D403
    return reference_lr * (n / reference_n) ** -0.36


def constant(n: float, reference_n: float, reference_lr: float) -> float:
    """The preset's rate at every size."""
    return reference_lr


LEARNING_RATES: dict[str, Callable[[float, float, float], float]] = {"porian": porian, "constant": constant}

PORIAN_RANGE = (5e6, 9.01e8)
"""Parameters between which `porian` was fitted."""


# --- forecast ---


@dataclass(frozen=True)
class Forecast:
    """Half-widths of the intervals that a study of these runs would have if `law` were the truth.

    `a_isoflop`, `a_parametric`: of the exponent of N_opt ∝ C^a, by parabolas and by Hoffmann's form.
    `n_optimal`, `loss`: of the optimum at `target` FLOPs, as fractions of it, by Hoffmann's form. `bias`: the
    error of a by parabolas without noise.
    """

    target: float
    a: float
    a_isoflop: float
    bias: float
    a_parametric: float
    n_optimal: float
    loss: float


def forecast(
    law: Law,
    n: Array,
    d: Array,
    c: Array,
    *,
    noise: float,
    target: float,
    draws: int,
    level: float,
    seed: int,
    tolerance: float = SAME_BUDGET,
) -> Forecast:
    """What a study of these runs would find, by simulated studies.

    Each has the law's losses at these sizes with normal noise in log loss, and is fitted as a real one would
    be; all draws at once. `noise`: standard deviation of log loss between seeds.
    """
    predictor = HOFFMANN.predictor({"N": n, "D": d})
    truth = HOFFMANN.theta(law)
    clean = predictor(truth[None])[0][0]
    losses_SN = clean + np.random.default_rng(seed).normal(0, noise, (draws, len(n)))

    log_n, log_c = np.log(n), np.log(c)
    groups = grouped(log_c, tolerance)
    budgets = np.array([log_c[g].mean() for g in groups])

    def exponents(log_loss_SN: Array) -> Array:
        return slopes(budgets, best_sizes(log_n, log_loss_SN, groups))

    ends = minimise(predictor, losses_SN, np.repeat(truth[None], draws, axis=0), delta=HUBER_DELTA)
    fitted = HOFFMANN.published(ends.theta_SP)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        share = fitted["beta"] / (fitted["alpha"] + fitted["beta"])
        n_optimal = optimal_parameters(fitted, target, FLOPS_PER_PARAMETER_AND_TOKEN)
        loss = optimal_loss(fitted, target, FLOPS_PER_PARAMETER_AND_TOKEN)

    def half_width(estimates_S: Array, degrees_of_freedom: float) -> float:
        low, high = expanded_percentiles(
            estimates_S, level=level, degrees_of_freedom=max(degrees_of_freedom, 1)
        )
        return float(high - low) / 2

    parametric = min(density_degrees_of_freedom(len(n)), len(n) - len(truth))

    a = law["beta"] / (law["alpha"] + law["beta"])
    return Forecast(
        target=target,
        a=a,
        a_isoflop=half_width(exponents(losses_SN), len(n) - 3 * len(groups)),
        bias=float(exponents(clean[None])[0] - a),
        a_parametric=half_width(share, parametric),
        n_optimal=half_width(np.log(n_optimal), parametric),
        loss=half_width(np.log(loss), parametric),
    )


def alternatives(grid: Grid, law: Law, flops: float, **settings) -> list[tuple[Grid, Forecast]]:
    """`grid` and others of the same cost, with ideal sizes and their forecasts; `settings`: of `forecast`."""
    tried = [
        grid,
        *(replace(grid, budgets=grid.budgets + more) for more in (-2, 2)),
        *(replace(grid, ratio=grid.ratio**power) for power in (0.5, 2.0)),
        *(replace(grid, sizes=grid.sizes + more) for more in (-2, 2)),
        *(replace(grid, spread=grid.spread**power) for power in (0.5, 1.5)),
        replace(grid, seeds=grid.seeds + 1),
    ]
    fittable = [each for each in tried if each.budgets >= 2 and each.sizes >= 4]
    return [(each, forecast(law, *each.ideal(law, flops), **settings)) for each in fittable]
