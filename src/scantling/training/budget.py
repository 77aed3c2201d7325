"""How long to train, `budget=`, and how long between validations, `val_every=`.

Any of four currencies becomes a number of optimiser steps.
"""

from __future__ import annotations

import math


def steps_for(
    *,
    tokens_per_step: int,
    n_params: int,
    flops_per_token: float,
    steps: float | None = None,
    tokens: float | None = None,
    flops: float | None = None,
    tokens_per_param: float | None = None,
) -> int:
    """Whole optimiser steps that the one given amount pays for, rounded down.

    `flops` counts forward and backward under the budget's convention, whose `flops_per_token` is
    passed beside it; `tokens_per_param` is D/N over all parameters (Hoffmann et al. 2022,
    arXiv:2203.15556, table 3: about 20).

    Raises ValueError when the amount is not positive and finite, or pays for less than one step.
    """
    flops_per_step = flops_per_token * tokens_per_step
    price = {
        "steps": (steps, 1),
        "tokens": (tokens, tokens_per_step),
        "flops": (flops, flops_per_step),
        "tokens_per_param": (tokens_per_param, tokens_per_step / n_params),
    }
    given = {name: pair for name, pair in price.items() if pair[0] is not None}
    if len(given) != 1:
        raise ValueError(
            f"a budget is one of {', '.join(price)}; {len(given)} are given: {' and '.join(given)}"
            + (f"; ~budget.{next(iter(given))} takes one away" if given else "")
        )
    ((name, (amount, one_step)),) = given.items()
    if not 0 < amount < math.inf:
        raise ValueError(f"budget.{name}={amount:g} must be positive and finite")
    if amount < one_step:
        taken = f"{tokens_per_step:,} tokens"
        if name != "tokens":
            taken = f"{one_step:.4g} {name} ({taken})"
        raise ValueError(
            f"budget.{name}={amount:g} is below one optimiser step, which takes {taken}: "
            "raise the budget or lower batch_size"
        )
    if name == "steps" and not float(amount).is_integer():
        raise ValueError(f"budget.steps={amount:g} must be a whole number")
    return int(amount / one_step + 1e-9)


def steps_between_validations(val_every: float, steps: int) -> int:
    """The steps between validations in a run of `steps`: up to 1.0 a float is a share, a
    whole number counts steps.

    Raises ValueError for what is neither.
    """
    if isinstance(val_every, float) and 0 < val_every <= 1:
        return max(1, round(val_every * steps))
    if val_every < 1 or not float(val_every).is_integer():
        raise ValueError(
            f"val_every={val_every} is neither a share of the run, up to 1.0, nor a whole number of steps"
        )
    return int(val_every)
