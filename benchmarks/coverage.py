"""How often 95 % intervals hold the truth, over simulated studies of laws with planted parameters.

`python benchmarks/coverage.py --draws 200` writes results/coverage.md; with `--study "approach 2"` only the
rows of studies that begin so. Each draw makes new noise, and for scattered runs new sizes; the truth is
known, so the share of intervals that hold it should be 95 %, and over 200 draws between 92 and 98.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from scantling.analysis.allocation import (
    allocation_exponent,
    frontier,
    optimal_loss,
    optimal_parameters,
    optimum_table,
)
from scantling.analysis.findings import Finding
from scantling.analysis.forms import KAPLAN, OVERTRAINING, Form, KaplanSum, saturating
from scantling.analysis.isoflop import PowerLaw, fit_envelope, fit_isoflop
from scantling.analysis.scaling import fit, profile_interval, refit_hoffmann
from scantling.report.sentences import sentence

LAW = {"E": 1.8172, "A": 477.8, "B": 2143.0, "alpha": 0.3473, "beta": 0.3672}
UNEVEN = {"E": 2.14, "A": 213.0, "B": 4.97e6, "alpha": 0.293, "beta": 0.713}
"""Of Besiroglu et al. 2024 and of the Gemstones: alpha and beta alike, and far apart."""

NOISE = 0.003
"""Standard deviation of log loss between seeds."""

Held = Iterator[tuple[str, bool]]
"""Names of quantities, and whether their interval held the truth; and the warnings that a fit gave, marked by
WARNED."""

WARNED = "warning: "


def vector(law: dict[str, float]) -> dict[str, np.ndarray]:
    return {name: np.array([value]) for name, value in law.items()}


def loss_of(n: np.ndarray, d: np.ndarray, law: dict[str, float]) -> np.ndarray:
    return law["E"] + law["A"] / n ** law["alpha"] + law["B"] / d ** law["beta"]


def exponent(law: dict[str, float]) -> float:
    return law["beta"] / (law["alpha"] + law["beta"])


def inside(truth: float, interval: tuple[float, float] | None) -> bool:
    assert interval is not None
    return interval[0] <= truth <= interval[1]


def warned(warnings: tuple[Finding, ...]) -> Held:
    """What the code itself says, up to its first colon."""
    for warning in warnings:
        yield WARNED + sentence(warning).partition(":")[0].partition(" = ")[0], True


def isoflop_grid(
    law: dict[str, float], budgets: int = 6, sizes: int = 8, width: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """N and C of some budgets with some sizes each around the optimum."""
    c = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    return optimal_parameters(vector(law), c, 6.0) * np.tile(np.logspace(-width, width, sizes), budgets), c


def scattered(rng: np.random.Generator, runs: int = 80) -> tuple[np.ndarray, np.ndarray]:
    n, c = 10 ** rng.uniform(7.5, 10, runs), 10 ** rng.uniform(18, 21.5, runs)
    return n, c


def alike(rng: np.random.Generator, runs: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Sizes within a factor of two, which hardly determine E: in a third of the draws 0 fits best."""
    n, m = 10 ** rng.uniform(8, 8.3, runs), 10 ** rng.uniform(0.5, 2.5, runs)
    return n, 6 * m * n**2


def gaussian(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.exp(NOISE * rng.standard_normal(n))


def heavy(rng: np.random.Generator, n: int) -> np.ndarray:
    """Student's t of three degrees of freedom, of the same interquartile range: outliers now and then."""
    return np.exp(NOISE * 0.882 * rng.standard_t(3, n))


def approach_3(law, sizes, noise, resamples) -> Callable[[np.random.Generator, int], Held]:
    """`sizes`: N and C of a planned grid, or a function that draws them."""

    def draw(rng: np.random.Generator, seed: int) -> Held:
        resampling = "noise" if isinstance(sizes, tuple) else "runs"
        n, c = sizes if isinstance(sizes, tuple) else sizes(rng)
        d = c / 6 / n
        loss = loss_of(n, d, law) * noise(rng, len(n))
        fitted = refit_hoffmann(n, d, loss, resamples=resamples, resampling=resampling, seed=seed)
        for name, interval in fitted.intervals.items():
            yield name, inside(law[name], interval)
        for name in "AB":
            yield f"{name}, profile likelihood", inside(law[name], profile_interval(fitted, name))
        yield "a of N_opt ∝ C^a", inside(exponent(law), allocation_exponent(fitted)[1])
        (row,) = optimum_table(fitted, [1e23]).to_dict("records")
        truth = optimal_parameters(vector(law), 1e23, 6.0)[0]
        yield "N_opt at 1e23 FLOPs", inside(truth, (row["N_low"], row["N_high"]))
        best = float(optimal_loss(vector(law), 1e23, 6.0)[0])
        yield "loss at that optimum", inside(best, (row["loss_low"], row["loss_high"]))
        at = {"N": [truth], "D": [1e23 / 6 / truth]}
        low, high = fitted.predict_interval(seed=seed, **at)
        yield "a new run there", inside(best * noise(rng, 1)[0], (low[0], high[0]))
        assert frontier(fitted).parameters["beta"] > 0
        yield from warned(fitted.warnings)

    return draw


def approach_2(law, grid, minimum, resamples) -> Callable[[np.random.Generator, int], Held]:
    def draw(rng: np.random.Generator, seed: int) -> Held:
        n, c = grid
        loss = loss_of(n, c / 6 / n, law) * gaussian(rng, len(n))
        found = fit_isoflop(n, c, loss, minimum=minimum, resamples=resamples, seed=seed)
        yield from power_law(found, law)

    return draw


def approach_1(law, resamples) -> Callable[[np.random.Generator, int], Held]:
    """Curves whose every point is as good as a run of that length, moved as a whole by the noise of their
    run."""

    def draw(rng: np.random.Generator, seed: int) -> Held:
        sizes = np.geomspace(2e7, 5e9, 20)
        n, d = np.repeat(sizes, 60), np.tile(np.geomspace(3e8, 3e11, 60), 20)
        loss = loss_of(n, d, law) * np.repeat(gaussian(rng, 20), 60)
        yield from power_law(fit_envelope(n, n, d, loss, resamples=resamples, seed=seed), law)

    return draw


def power_law(found: PowerLaw, law: dict[str, float]) -> Held:
    yield "a of N_opt ∝ C^a", inside(exponent(law), found.exponent_interval)
    yield from warned(found.warnings)


def other_form(
    form: Form, law: dict[str, float], resamples: int
) -> Callable[[np.random.Generator, int], Held]:
    def draw(rng: np.random.Generator, seed: int) -> Held:
        n, c = scattered(rng)
        d = c / 6 / n
        every = {"N": n, "C": c, "D": d, "M": d / n, "S": d / 5e5}
        sizes = {letter: every[letter] for letter in form.inputs}
        theta = form.theta(law)
        prediction = form.predictor(sizes)(theta[None])[0][0]
        loss = np.exp(prediction) * gaussian(rng, len(n))
        fitted = fit(form, sizes, loss, starts_SP=theta[None], resamples=resamples, seed=seed)
        for name, interval in fitted.intervals.items():
            yield name, inside(law[name], interval)
        yield from warned(fitted.warnings)

    return draw


def studies(resamples: int) -> dict[str, Callable[[np.random.Generator, int], Held]]:
    grid, uneven, small = isoflop_grid(LAW), isoflop_grid(UNEVEN), isoflop_grid(LAW, budgets=2, sizes=4)
    return {
        "approach 3, 80 scattered runs, bootstrap over runs": approach_3(LAW, scattered, gaussian, resamples),
        "approach 3, the same with outliers": approach_3(LAW, scattered, heavy, resamples),
        "approach 3, 30 runs of sizes too much alike": approach_3(LAW, alike, gaussian, resamples),
        "approach 3, grid of 48 runs, bootstrap over noise": approach_3(LAW, grid, gaussian, resamples),
        "approach 3, grid of 48 runs, alpha and beta far apart": approach_3(
            UNEVEN, uneven, gaussian, resamples
        ),
        "approach 3, grid of 8 runs": approach_3(LAW, small, gaussian, resamples),
        "approach 2, parabola": approach_2(LAW, grid, "parabola", resamples),
        "approach 2, parabola, alpha and beta far apart": approach_2(UNEVEN, uneven, "parabola", resamples),
        "approach 2, parabola, grid of 8 runs": approach_2(LAW, small, "parabola", resamples),
        "approach 2, Akima": approach_2(LAW, grid, "akima", resamples),
        "approach 1, 20 training curves": approach_1(LAW, resamples),
        "Kaplan L(N)": other_form(KaplanSum(("N",)), {"N_c": 8.8e13, "alpha_N": 0.076}, resamples),
        "Kaplan L(N, D)": other_form(
            KAPLAN, {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}, resamples
        ),
        "over-training": other_form(OVERTRAINING, {"E": 1.8, "a": 140.0, "b": 180.0, "eta": 0.18}, resamples),
        "learning curve": other_form(saturating("D"), {"E": 2.0, "B": 400.0, "beta": 0.3}, resamples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=600)
    parser.add_argument("--study", default="", help="how the studies to repeat begin; rows of others stay")
    parser.add_argument("--to", type=Path, default=Path(__file__).parents[1] / "results" / "coverage.md")
    arguments = parser.parse_args()
    lines = [
        "# Coverage of 95 % intervals",
        "",
        f"`python benchmarks/coverage.py --draws {arguments.draws} --resamples {arguments.resamples}`: "
        f"simulated studies, noise of {NOISE} in log loss, percent of intervals that hold the truth. Over "
        "200 draws an honest interval's row lies between 92 and 98 in 19 cases of 20. Last: what the fits "
        "themselves warn of, and in what share of the draws.",
        "",
        "| study | quantity | held the truth, % | warning |",
        "|---|---|---|---|",
    ]
    before = arguments.to.read_text().splitlines() if arguments.to.exists() else []
    for title, draw in studies(arguments.resamples).items():
        if not title.startswith(arguments.study):
            lines += [line for line in before if line.startswith(f"| {title} |")]
            continue
        start, held = time.perf_counter(), {}
        for seed in range(arguments.draws):
            for name, hit in draw(np.random.default_rng([seed, len(title)]), seed):
                held.setdefault(name, []).append(hit)
        print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)
        warnings = {name: len(hits) for name, hits in held.items() if name.startswith(WARNED)}
        said = "; ".join(
            f"{name.removeprefix(WARNED)} ({n / arguments.draws:.0%})" for name, n in warnings.items()
        )
        for name, hits in held.items():
            if name not in warnings:
                lines.append(f"| {title} | {name} | {100 * np.mean(hits):.1f} | {said} |")
                print(f"    {name:40} {100 * np.mean(hits):.1f}", flush=True)
        print(f"    warns of: {said or 'nothing'}", flush=True)
    arguments.to.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
