"""Forms of scaling laws: each predicts log loss, with derivatives, from the logarithms of a run's sizes.

Legend: S problems solved at once, P parameters, N runs. Sizes: N parameters, D tokens, C training FLOPs, S
steps, U unique tokens. Losses are in nats per token.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from scantling.analysis.huber import Array

Sizes = Mapping[str, Array]
"""By letter, each (N,)."""

Terms = list[dict[str, Array | float]]
"""For each power of a sum: what multiplies which parameter in its logarithm."""


class Form(ABC):
    """A law: `parameters` as published, `inputs` as letters of `Sizes`, and θ, in which it is fitted.

    θ holds logarithms of coefficients, so that these stay positive, and exponents as they are.
    """

    formula: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]

    @abstractmethod
    def predictor(self, sizes: Sizes) -> Callable[[Array], tuple[Array, Array]]:
        """θ (S, P) -> log loss (S, N) and its Jacobian (S, P, N)."""

    @abstractmethod
    def starts(self) -> Array:
        """Points (S, P) at which a search begins."""

    @abstractmethod
    def published(self, theta_SP: Array) -> dict[str, Array]:
        """θ as the parameters that papers print, each (S,)."""

    @abstractmethod
    def theta(self, parameters: Mapping[str, float]) -> Array:
        """The vector θ, (P,), of published parameters."""


@dataclass(frozen=True)
class PowerSum(Form):
    """A sum of powers, L = Σₖ exp(xₖ·θ): its log is the log-sum-exp of functions affine in θ.

    `terms`: sizes' logarithms -> what multiplies each parameter in each summand's exponent.
    `grid`: the values of θ, by parameter, whose product the search starts from.
    `logarithms`: the parameters that θ holds the logarithm of.
    """

    formula: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    terms: Callable[[Sizes], Terms]
    grid: Mapping[str, tuple[float, ...]]
    logarithms: tuple[str, ...]

    def predictor(self, sizes: Sizes) -> Callable[[Array], tuple[Array, Array]]:
        logs = {letter: np.log(sizes[letter]) for letter in self.inputs}
        n = len(next(iter(logs.values())))
        summands = [
            [
                (self.parameters.index(name), np.broadcast_to(np.asarray(x, dtype=float), (n,)))
                for name, x in term.items()
            ]
            for term in self.terms(logs)
        ]

        def log_loss(theta_SP: Array) -> tuple[Array, Array]:
            exponents = [
                np.add.reduce([theta_SP[:, p, None] * x for p, x in summand]) for summand in summands
            ]
            top = np.maximum.reduce(exponents)
            shares = [np.exp(exponent - top) for exponent in exponents]
            total = np.add.reduce(shares)
            jacobian = np.zeros((len(theta_SP), len(self.parameters), n))
            for summand, share in zip(summands, shares, strict=True):
                share /= total
                for p, x in summand:
                    jacobian[:, p] += share * x
            return top + np.log(total), jacobian

        return log_loss

    def starts(self) -> Array:
        return np.array(list(itertools.product(*(self.grid[name] for name in self.parameters))))

    def projected_starts(self, sizes: Sizes, loss: Array, *, alike: bool = False) -> Array:
        """Starts (S, P) on a grid of exponents, each with the coefficients of least relative squared error.

        Variable projection (Golub & Pereyra 1973): L is linear in its coefficients, so few starts do for
        many. `alike`: only the three whose exponents are all equal.
        """
        logs = {letter: np.log(sizes[letter]) for letter in self.inputs}
        exponents = [name for name in self.parameters if name not in self.logarithms]
        one = zip(*[PROJECTED_EXPONENTS[1:-1]] * len(exponents), strict=True)
        starts = []
        for values in one if alike else itertools.product(PROJECTED_EXPONENTS, repeat=len(exponents)):
            theta = dict(zip(exponents, values, strict=True))
            columns, names = [], []
            for term in self.terms(logs):
                power = sum(theta[name] * np.asarray(x) for name, x in term.items() if name in theta)
                columns.append(np.broadcast_to(np.exp(power), loss.shape) / loss)
                names.append(next(name for name in term if name in self.logarithms))
            scale = np.array([column.mean() for column in columns])
            coefficients, _ = nnls(np.stack(columns, axis=1) / scale, np.ones(len(loss)))
            theta |= dict(zip(names, np.log(np.maximum(coefficients, 1e-3) / scale), strict=True))
            starts.append([theta[name] for name in self.parameters])
        return np.array(starts)

    def published(self, theta_SP: Array) -> dict[str, Array]:
        columns = dict(zip(self.parameters, theta_SP.T, strict=True))
        return {name: np.exp(x) if name in self.logarithms else x for name, x in columns.items()}

    def theta(self, parameters: Mapping[str, float]) -> Array:
        return np.array(
            [
                np.log(parameters[name]) if name in self.logarithms else parameters[name]
                for name in self.parameters
            ]
        )


EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)
COEFFICIENTS = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
IRREDUCIBLE = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""The starts of Hoffmann et al. 2022, appendix D.3: 4500 for the five parameters of their form."""

PROJECTED_EXPONENTS = (0.1, 0.25, 0.4, 0.6, 0.9)

HOFFMANN = PowerSum(
    formula="L = E + A/N^alpha + B/D^beta",
    parameters=("E", "A", "B", "alpha", "beta"),
    inputs=("N", "D"),
    terms=lambda log: [{"E": 1.0}, {"A": 1.0, "alpha": -log["N"]}, {"B": 1.0, "beta": -log["D"]}],
    grid={"E": IRREDUCIBLE, "A": COEFFICIENTS, "B": COEFFICIENTS, "alpha": EXPONENTS, "beta": EXPONENTS},
    logarithms=("E", "A", "B"),
)
"""Hoffmann et al. 2022 (arXiv:2203.15556), equation 2."""

OVERTRAINING = PowerSum(
    formula="L = E + (a*M^eta + b*M^-eta)/C^eta, M = D/N",
    parameters=("E", "a", "b", "eta"),
    inputs=("C", "M"),
    terms=lambda log: [
        {"E": 1.0},
        {"a": 1.0, "eta": log["M"] - log["C"]},
        {"b": 1.0, "eta": -log["M"] - log["C"]},
    ],
    grid={"E": IRREDUCIBLE, "a": COEFFICIENTS, "b": COEFFICIENTS, "eta": EXPONENTS},
    logarithms=("E", "a", "b"),
)
"""Gadre et al. 2024 (arXiv:2403.08540), equation 4: Hoffmann's form with alpha = beta = 2·eta."""


def saturating(letter: str) -> PowerSum:
    """L = E + B/x^beta: a learning curve (x = D of one run), or losses of best runs against one size."""
    return PowerSum(
        formula=f"L = E + B/{letter}^beta",
        parameters=("E", "B", "beta"),
        inputs=(letter,),
        terms=lambda log: [{"E": 1.0}, {"B": 1.0, "beta": -log[letter]}],
        grid={"E": IRREDUCIBLE, "B": COEFFICIENTS, "beta": EXPONENTS},
        logarithms=("E", "B"),
    )


@dataclass(frozen=True)
class KaplanSum(Form):
    """L = Σₓ (x_c/x)^alpha_x over `inputs`.

    Kaplan et al. 2020 (arXiv:2001.08361), equations 1.1 to 1.3 with one input, 1.6 with N and S
    (steps corrected by `minimum_steps`).
    """

    inputs: tuple[str, ...]

    @property
    def formula(self) -> str:  # type: ignore[override]
        """The sum in letters, for reports."""
        return "L = " + " + ".join(f"({x}_c/{x})^alpha_{x}" for x in self.inputs)

    @property
    def parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        """x_c and alpha_x of each input x."""
        return tuple(name for x in self.inputs for name in (f"{x}_c", f"alpha_{x}"))

    @property
    def powers(self) -> PowerSum:
        """The same with x_c^alpha_x as coefficient, which is affine."""
        return PowerSum(
            formula=self.formula,
            parameters=self.parameters,
            inputs=self.inputs,
            terms=lambda log: [{f"{x}_c": 1.0, f"alpha_{x}": -log[x]} for x in self.inputs],
            grid={
                **{f"{x}_c": (0.0, 1.0, 2.0, 5.0, 10.0) for x in self.inputs},
                **{f"alpha_{x}": (0.05, 0.1, 0.3, 0.5, 1.0) for x in self.inputs},
            },
            logarithms=(),
        )

    def predictor(self, sizes: Sizes) -> Callable[[Array], tuple[Array, Array]]:
        return self.powers.predictor(sizes)

    def starts(self) -> Array:
        return self.powers.starts()

    def published(self, theta_SP: Array) -> dict[str, Array]:
        found = {}
        for i, x in enumerate(self.inputs):
            found[f"{x}_c"] = np.exp(theta_SP[:, 2 * i] / theta_SP[:, 2 * i + 1])
            found[f"alpha_{x}"] = theta_SP[:, 2 * i + 1]
        return found

    def theta(self, parameters: Mapping[str, float]) -> Array:
        pairs = [(parameters[f"{x}_c"], parameters[f"alpha_{x}"]) for x in self.inputs]
        return np.array([value for c, alpha in pairs for value in (alpha * np.log(c), alpha)])


class Kaplan(Form):
    """Kaplan et al. 2020, equation 1.5. θ = (alpha_N·log N_c, alpha_D·log D_c, alpha_N, alpha_D)."""

    formula = "L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D"
    parameters = ("N_c", "D_c", "alpha_N", "alpha_D")
    inputs = ("N", "D")

    def predictor(self, sizes: Sizes) -> Callable[[Array], tuple[Array, Array]]:
        n, d = np.log(sizes["N"]), np.log(sizes["D"])

        def log_loss(theta_SP: Array) -> tuple[Array, Array]:
            a, b, alpha_n, alpha_d = (theta_SP[:, i, None] for i in range(4))
            powers = np.stack([a - alpha_n * n, b - alpha_d * d])
            scaled = powers / alpha_d
            top = scaled.max(axis=0)
            shares = np.exp(scaled - top)
            total = shares.sum(axis=0)
            shares /= total
            value = top + np.log(total)
            explicit = value - (shares * scaled).sum(axis=0)
            jacobian = np.stack([shares[0], shares[1], -shares[0] * n, explicit - shares[1] * d], axis=1)
            return alpha_d * value, jacobian

        return log_loss

    def starts(self) -> Array:
        coefficients, exponents = (0.0, 1.0, 2.0, 5.0, 10.0), (0.05, 0.1, 0.3, 0.5)
        return np.array(list(itertools.product(coefficients, coefficients, exponents, exponents)))

    def published(self, theta_SP: Array) -> dict[str, Array]:
        a, b, alpha_n, alpha_d = theta_SP.T
        return {
            "N_c": np.exp(a / alpha_n),
            "D_c": np.exp(b / alpha_d),
            "alpha_N": alpha_n,
            "alpha_D": alpha_d,
        }

    def theta(self, parameters: Mapping[str, float]) -> Array:
        alpha_n, alpha_d = parameters["alpha_N"], parameters["alpha_D"]
        return np.array(
            [alpha_n * np.log(parameters["N_c"]), alpha_d * np.log(parameters["D_c"]), alpha_n, alpha_d]
        )


KAPLAN = Kaplan()


@dataclass(frozen=True)
class Repeated(Form):
    """A law of fresh data with its sizes discounted for repetition.

    Muennighoff et al. 2023 (arXiv:2305.16264), equations 5 and 6. D' = U + U·R_D·(1 − exp(−r/R_D)) with r =
    D/U − 1 repetitions, and N' likewise of the excess over the parameters that are compute-optimal for U
    fresh tokens. `law`: Hoffmann's five parameters, fitted to runs of one epoch and held fixed, as in the
    paper; only R_D and R_N are fitted here.
    """

    law: Mapping[str, float]
    formula = "L = E + A/N'^alpha + B/D'^beta, D' = U + U*R_D*(1 - exp(-(D/U - 1)/R_D)), N' likewise"
    parameters = ("R_D", "R_N")
    inputs = ("N", "D", "U")

    def predictor(self, sizes: Sizes) -> Callable[[Array], tuple[Array, Array]]:
        law = self.law
        unique_d = np.minimum(sizes["U"], sizes["D"])
        share = (law["alpha"] * law["A"] / (law["beta"] * law["B"])) ** (1 / law["alpha"])
        unique_n = np.minimum(share * unique_d ** (law["beta"] / law["alpha"]), sizes["N"])

        def discounted(log_r: Array, size: Array, unique: Array) -> tuple[Array, Array]:
            """Logarithm of the effective size, and its derivative by log R."""
            r, repeats = np.exp(log_r)[:, None], size / unique - 1
            decay = np.exp(-repeats / r)
            effective = 1 + r * (1 - decay)
            return np.log(unique * effective), (r * (1 - decay) - repeats * decay) / effective

        def log_loss(theta_SP: Array) -> tuple[Array, Array]:
            d, by_r_d = discounted(theta_SP[:, 0], sizes["D"], unique_d)
            n, by_r_n = discounted(theta_SP[:, 1], sizes["N"], unique_n)
            of_n, of_d = law["A"] * np.exp(-law["alpha"] * n), law["B"] * np.exp(-law["beta"] * d)
            loss = law["E"] + of_n + of_d
            jacobian = [-law["beta"] * of_d * by_r_d / loss, -law["alpha"] * of_n * by_r_n / loss]
            return np.log(loss), np.stack(jacobian, axis=1)

        return log_loss

    def starts(self) -> Array:
        return np.array(list(itertools.product((-1.0, 0.5, 2.0, 3.5), repeat=2)))

    def published(self, theta_SP: Array) -> dict[str, Array]:
        return {"R_D": np.exp(theta_SP[:, 0]), "R_N": np.exp(theta_SP[:, 1])}

    def theta(self, parameters: Mapping[str, float]) -> Array:
        return np.log([parameters["R_D"], parameters["R_N"]])


def critical_batch(loss: Array | float, *, b_star: float = 2e8, alpha_b: float = 0.21) -> Array | float:
    """B_crit = B*/L^(1/alpha_B), in tokens (Kaplan et al. 2020, equation 1.4 and table 4's constants)."""
    return b_star / loss ** (1 / alpha_b)


def minimum_steps(steps: Array | float, batch: Array | float, loss: Array | float) -> Array | float:
    """S_min = S/(1 + B_crit(L)/B): steps that reach the same loss at a batch far above critical.

    Kaplan et al. 2020, equation 5.4.
    """
    return steps / (1 + critical_batch(loss) / batch)


def minimum_compute(compute: Array | float, batch: Array | float, loss: Array | float) -> Array | float:
    """C_min = C/(1 + B/B_crit(L)): FLOPs that reach the same loss at a batch far below critical.

    Kaplan et al. 2020, equation 5.5.
    """
    return compute / (1 + batch / critical_batch(loss))
