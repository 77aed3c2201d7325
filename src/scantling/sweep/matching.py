"""Arms of equal size: `match=params` or `match=flops` chooses the feed-forward's width."""

from __future__ import annotations

import copy
from collections.abc import Callable

from omegaconf import DictConfig, open_dict

from scantling.accounting import exact
from scantling.composition import build_decoder
from scantling.model.decoder import Decoder

QUANTITIES: dict[str, Callable[[Decoder], float]] = {
    "params": lambda decoder: sum(p.numel() for p in decoder.parameters()),
    "flops": lambda decoder: exact(decoder, decoder.seq_len),
}
"""All parameters; training FLOPs a token by the `exact` convention."""

TOLERANCE = 0.01
SIZES = ("model", "data", "tokenizer", "embed", "budget")
"""Jobs that differ in these are not arms of one comparison: each combination has a reference of its own."""


class Matching:
    """The first job of each size is the reference of those that follow."""

    def __init__(self) -> None:
        self.references: dict[tuple[str, ...], float] = {}
        self.found: dict[tuple[str, ...], list[str]] = {}

    def overrides(self, config: DictConfig, typed: list[str]) -> list[str]:
        """What makes a job as large as its reference. Raises ValueError where no d_ff comes within 1 %."""
        if config.match not in QUANTITIES:
            raise ValueError(f"match={config.match} is unknown: use {' or '.join(QUANTITIES)}")
        size = tuple(o for o in typed if o.partition("=")[0].partition(".")[0].partition("/")[0] in SIZES)
        arm = tuple(o for o in typed if not o.startswith("seed="))
        if size not in self.references:
            self.references[size] = measured(config, config.model.d_ff)
        if arm not in self.found:
            self.found[arm] = match(config, self.references[size])
        return self.found[arm]


def match(config: DictConfig, target: float) -> list[str]:
    """Overrides with the width of the feed-forward that comes nearest to `target`, and a note of how near."""
    before = measured(config, config.model.d_ff)
    best, value = config.model.d_ff, before
    if before != target:
        low, high = 0, 64 * config.model.d_model  # the answer lies above low and is at most high
        while high - low > 1:
            middle = (low + high) // 2
            if measured(config, middle) < target:
                low = middle
            else:
                high = middle
        tried = {d_ff: measured(config, d_ff) for d_ff in (max(low, 1), high)}
        best = min(tried, key=lambda d_ff: abs(tried[d_ff] - target))
        value = tried[best]
    off = value / target - 1
    if abs(off) > TOLERANCE:
        raise ValueError(
            f"match={config.match}: no model.d_ff brings this arm within 1 % of the first one's {target:,.0f}; "
            f"{best} is nearest, {off:+.1%} off"
        )
    note = f"matched={{by:{config.match},reference:{target:.0f},here:{value:.0f},off:{off:.6f},d_ff_before:{config.model.d_ff}}}"
    return [f"model.d_ff={best}", note]


def measured(config: DictConfig, d_ff: int) -> float:
    sized = copy.deepcopy(config)
    with open_dict(sized):
        sized.model.d_ff = d_ff
    return QUANTITIES[config.match](build_decoder(sized, sized.model.vocab_size, "meta"))
