"""Seconds for the 4500 starts of Hoffmann's form and for 4000 bootstrap resamples: `python
benchmarks/scaling.py`.

The runs are simulated, as many as Besiroglu et al. 2024 fitted. The same starts go to SciPy's BFGS, one after
the other, with the same derivatives, as many as `--scipy` says; its time is scaled up.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import scipy
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from scantling.analysis.forms import HOFFMANN
from scantling.analysis.huber import huber, minimise
from scantling.analysis.scaling import HUBER_DELTA, fit_hoffmann

RUNS, STARTS_AND_RESAMPLES = 240, (4500, 4000)
TRUTH = {"E": 1.82, "A": 480.0, "B": 2100.0, "alpha": 0.348, "beta": 0.366}


def simulated(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, compute = 10 ** rng.uniform(7.5, 10.2, RUNS), 10 ** rng.uniform(18.5, 21.5, RUNS)
    d = compute / (6 * n)
    prediction, _ = HOFFMANN.predictor({"N": n, "D": d})(HOFFMANN.theta(TRUTH)[None])
    return n, d, np.exp(prediction[0] + 0.005 * rng.standard_t(3, RUNS))


def scipy_ends(n: np.ndarray, d: np.ndarray, loss: np.ndarray, starts_SP: np.ndarray) -> np.ndarray:
    """Objectives where BFGS ends from each start."""
    predictor, target = HOFFMANN.predictor({"N": n, "D": d}), np.log(loss)

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        prediction, jacobian = predictor(theta[None])
        residual = prediction[0] - target
        slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
        return float(huber(residual, HUBER_DELTA).sum()), jacobian[0] @ slope

    return np.array([minimize(objective, s, jac=True, method="BFGS").fun for s in starts_SP])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scipy", type=int, default=100, help="starts for SciPy; 0: none")
    arguments = parser.parse_args()
    n, d, loss = simulated(np.random.default_rng(0))
    print(f"{RUNS} runs, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, NumPy {np.__version__}")

    start = time.perf_counter()
    ends = minimise(HOFFMANN.predictor({"N": n, "D": d}), np.log(loss), HOFFMANN.starts(), delta=HUBER_DELTA)
    starts_seconds = time.perf_counter() - start
    lowest = ends.objective_S.min()
    found = np.mean(ends.objective_S < lowest * (1 + 1e-6))
    print(f"{STARTS_AND_RESAMPLES[0]} starts     {starts_seconds:6.2f} s, {found:.0%} end at the optimum")

    start = time.perf_counter()
    fit = fit_hoffmann(n, d, loss, resamples=STARTS_AND_RESAMPLES[1])
    both = time.perf_counter() - start
    print(
        f"and {STARTS_AND_RESAMPLES[1]} resamples {both:6.2f} s, "
        f"alpha {fit.alpha:.4f} {fit.intervals['alpha']}"
    )

    if arguments.scipy:
        chosen = np.random.default_rng(1).choice(HOFFMANN.starts(), arguments.scipy, replace=False)
        start = time.perf_counter()
        with np.errstate(all="ignore"):
            theirs = scipy_ends(n, d, loss, chosen)
        seconds = (time.perf_counter() - start) * STARTS_AND_RESAMPLES[0] / arguments.scipy
        found = np.mean(theirs < lowest * (1 + 1e-6))
        print(
            f"SciPy {scipy.__version__} BFGS: {seconds:.0f} s for as many starts "
            f"({seconds / starts_seconds:.0f} times), {found:.0%} end at the optimum"
        )


if __name__ == "__main__":
    main()
