"""Huber regression of log loss, for many starts and many resamples at once, with analytic derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TOGETHER = 40_000
"""Problems times points computed at once: more would fall out of the processor's cache."""

LONGEST_STEP = 5.0
"""Largest step in any parameter; from a poor start the quadratic model points far away."""


@dataclass(frozen=True)
class Optima:
    """Where each of S problems ended: parameters, objectives, whether the objective stopped falling."""

    theta_SP: Array
    objective_S: Array
    converged_S: NDArray[np.bool_]


def huber(residual: Array, delta: float) -> Array:
    """½r² up to δ, δ(|r| − ½δ) beyond (Huber 1964, doi:10.1214/aoms/1177703732)."""
    size = np.abs(residual)
    return np.where(size < delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def minimise(
    log_loss: Callable[[Array], tuple[Array, Array]],
    target: Array,
    starts_SP: Array,
    *,
    delta: float,
    weights_SN: Array | None = None,
    max_steps: int = 300,
    tolerance: float = 1e-12,
) -> Optima:
    """Minimise Σₙ wₙ·huber(log_loss(θ)ₙ − targetₙ) from every start.

    `log_loss`: θ (S, P) -> prediction (S, N) and its Jacobian (S, P, N). `target`: (N,), or (S, N) for each
    start its own. `weights_SN`: a row of weights for each start; None: all are 1.

    Each step solves (Jᵀ diag(w·h) J) s = −gradient, where h is 1[|r| < δ] + λ·min(1, δ/|r|): a large λ gives
    small steps of iteratively reweighted least squares, which cannot overshoot far away; λ -> 0 gives
    Newton's step of Huber's function. λ follows success, as in Levenberg-Marquardt. A problem is done when
    two steps in a row gain less than `tolerance` of its objective.
    """
    theta_SP = np.array(starts_SP, dtype=float)
    objective_S = np.empty(len(theta_SP))
    converged_S = np.zeros(len(theta_SP), dtype=bool)
    chunk = max(1, TOGETHER // target.shape[-1])
    with np.errstate(over="ignore", invalid="ignore"):  # steps that fail are taken back
        for first in range(0, len(theta_SP), chunk):
            part = slice(first, first + chunk)
            weights = None if weights_SN is None else weights_SN[part]
            targets = target if target.ndim == 1 else target[part]
            theta_SP[part], objective_S[part], converged_S[part] = minimise_together(
                log_loss, targets, theta_SP[part], weights, delta, max_steps, tolerance
            )
    return Optima(theta_SP, objective_S, converged_S)


def minimise_together(
    log_loss: Callable[[Array], tuple[Array, Array]],
    target: Array,
    theta: Array,
    weights: Array | None,
    delta: float,
    max_steps: int,
    tolerance: float,
) -> tuple[Array, Array, Array]:
    """Minimise problems few enough for the cache, as `minimise` does; those that are done leave."""
    final, final_objective = theta.copy(), np.full(len(theta), np.inf)
    converged = np.zeros(len(theta), dtype=bool)

    def evaluate(theta: Array, target: Array, weights: Array | None) -> tuple[Array, Array, Array]:
        prediction, jacobian = log_loss(theta)
        residual = prediction - target
        loss = huber(residual, delta)
        objective = (loss if weights is None else weights * loss).sum(axis=1)
        return residual, jacobian, np.where(np.isfinite(objective), objective, np.inf)

    which = np.arange(len(theta))
    damping, rests = np.ones(len(theta)), np.zeros(len(theta), dtype=int)
    target = np.broadcast_to(target, (len(theta), target.shape[-1]))
    residual, jacobian, objective = evaluate(theta, target, weights)
    for _ in range(max_steps):
        size = np.abs(residual)
        slope = np.clip(residual, -delta, delta)
        curvature = (size < delta) + damping[:, None] * (delta / np.maximum(size, delta))
        if weights is not None:
            slope, curvature = slope * weights, curvature * weights
        gradient = (jacobian @ slope[:, :, None])[:, :, 0]
        hessian = (jacobian * curvature[:, None, :]) @ jacobian.transpose(0, 2, 1)
        diagonal = np.einsum("spp->sp", hessian)
        # A parameter that the loss no longer depends on must not make the matrix singular.
        diagonal += 1e-6 * np.minimum(damping, 1e6)[:, None] * diagonal + 1e-13 + 1e-10 * diagonal
        solvable = np.isfinite(hessian).all(axis=(1, 2)) & np.isfinite(gradient).all(axis=1)
        hessian[~solvable] = np.eye(theta.shape[1])
        step = -np.linalg.solve(hessian, np.where(solvable[:, None], gradient, 0.0)[:, :, None])[:, :, 0]
        step *= np.minimum(1.0, LONGEST_STEP / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]

        tried = evaluate(theta + step, target, weights)
        better = tried[2] < objective
        gain = np.where(better, objective - tried[2], 0.0)
        resting = np.where(better, gain <= tolerance * objective, damping > 1e8)
        rests = np.where(resting, rests + 1, np.where(better, 0, rests))
        damping = np.where(better, np.maximum(0.3 * damping, 1e-6), 5 * damping)
        theta[better] += step[better]
        residual[better], jacobian[better], objective[better] = (new[better] for new in tried)

        done = (rests >= 2) | ~solvable
        if done.any():
            final[which[done]], final_objective[which[done]] = theta[done], objective[done]
            converged[which[done & solvable]] = True
            left = ~done
            theta, target, damping, rests, which = (a[left] for a in (theta, target, damping, rests, which))
            residual, jacobian, objective = residual[left], jacobian[left], objective[left]
            weights = None if weights is None else weights[left]
            if not len(theta):
                break
    final[which], final_objective[which] = theta, objective
    return final, final_objective, converged
