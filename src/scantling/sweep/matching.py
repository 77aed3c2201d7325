"""Arms of equal size: `match=params` or `match=flops` chooses the feed-forward's width."""

from __future__ import annotations

import re
from collections.abc import Callable

from omegaconf import DictConfig

from scantling.config.composition import with_settings
from scantling.config.decoder import build_decoder
from scantling.config.settings import OWN_REFERENCE
from scantling.model.accounting import exact
from scantling.model.decoder import Decoder

QUANTITIES: dict[str, Callable[[Decoder], float]] = {
    "params": lambda decoder: sum(p.numel() for p in decoder.parameters()),
    "flops": lambda decoder: exact(decoder, decoder.seq_len),
}
"""All parameters; training FLOPs a token by the `exact` convention."""

TOLERANCE = 0.01


class Matching:
    """Widths that match jobs: the first job of each size is the reference of those that follow."""

    def __init__(self) -> None:
        self.references: dict[tuple[str, ...], float] = {}
        self.found: dict[tuple[str, ...], tuple[int, str]] = {}

    def width_of(self, config: DictConfig, typed: list[str]) -> tuple[int, str]:
        """The `model.d_ff` that makes a job as large as its reference, and a note of how near it comes.

        Raises ValueError where none comes within 1 %.
        """
        if config.match not in QUANTITIES:
            raise ValueError(f"match={config.match} is unknown: use {' or '.join(QUANTITIES)}")
        size = tuple(o for o in typed if re.split(r"[./=]", o)[0] in OWN_REFERENCE)
        arm = tuple(o for o in typed if not o.startswith("seed="))
        if size not in self.references:
            self.references[size] = size_with(config, config.model.d_ff)
        if arm not in self.found:
            self.found[arm] = nearest_width(config, self.references[size])
        return self.found[arm]


def nearest_width(config: DictConfig, target: float) -> tuple[int, str]:
    """The width of the feed-forward that comes nearest to `target`, and a note of how near."""
    before = size_with(config, config.model.d_ff)
    best, value = config.model.d_ff, before
    if before != target:
        low, high = 1, 64 * config.model.d_model
        tried = {d_ff: size_with(config, d_ff) for d_ff in (low, high)}
        # Sizes are a straight line in d_ff but for rounding: guesses lie on it, and every second one halves.
        while high - low > 1 and tried[low] < target < tried[high]:
            share = (target - tried[low]) / (tried[high] - tried[low]) if len(tried) % 2 == 0 else 0.5
            guess = min(max(low + round(share * (high - low)), low + 1), high - 1)
            tried[guess] = size_with(config, guess)
            low, high = (guess, high) if tried[guess] < target else (low, guess)
        best = min(tried, key=lambda d_ff: abs(tried[d_ff] - target))
        value = tried[best]
    off = value / target - 1
    if abs(off) > TOLERANCE:
        raise ValueError(
            f"match={config.match}: no model.d_ff brings "
            f"this arm within 1 % of the first one's {target:,.0f}; "
            f"{best} is nearest, {off:+.1%} off"
        )
    sizes = f"reference:{target:.0f},here:{value:.0f},off:{off:.6f}"
    note = f"{{by:{config.match},{sizes},d_ff_before:{config.model.d_ff}}}"
    return best, note


def size_with(config: DictConfig, d_ff: int) -> float:
    """The quantity that `match=` names, of the job's model with this `d_ff`."""
    sized = with_settings(config, {"model.d_ff": d_ff})
    return QUANTITIES[config.match](build_decoder(sized, sized.model.vocab_size, "meta"))
