"""Numbers as people read them: each kind is written in one way, wherever it stands."""

from __future__ import annotations

import math

PREFIXES = (
    *((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P")),
    *((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")),
)

PERIODS = ((365.25 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "minutes"))


def short(number: float, unit: str = "") -> str:
    """Three digits and a prefix of the SI: 2.68 G."""
    for size, prefix in PREFIXES:
        if number >= size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {prefix}{unit}"
    return f"{number:.0f} {unit}"


def counted(number: float) -> str:
    """Parameters or tokens, in the literature's units: 80.5 k, 3.35 M, 13.0 B."""
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{digits(number / unit, 3)}{name}" if number < 1000 * unit else f"{number:.3g}"
    return digits(number, 3)


def digits(number: float, n: int) -> str:
    """The number with `n` significant digits, zeros among them: 13.0 beside 13.2."""
    return f"{number:#.{n}g}".rstrip(".")


def cell_text(value: object) -> str:
    """A cell's text: numbers have five digits, large ones powers of ten; whole numbers and words stay."""
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    if abs(value) >= 1e5:
        return f"{value:.3e}"
    return f"{value:z.0f}" if value.is_integer() else digits(value, 5)


def number_or_blank(value: float | None, form: str) -> str:
    """A number in the form of a format specification, as `.4f`; nothing where there is none."""
    return "" if value is None or value != value else f"{value:{form}}"


def interval(low: float, high: float, form: str) -> str:
    """An interval by its ends, each in `form`: +0.0167 to +0.0224."""
    return f"{low:{form}} to {high:{form}}"


def some(n: int, noun: str, *, of_many: str = "s") -> str:
    """A count and its noun: '1 run', '2 runs'."""
    return f"{n} {noun}{'' if n == 1 else of_many}"


def duration(seconds: float) -> str:
    """A time in the largest unit of which it is at least one: 1.5 hours."""
    for size, name in PERIODS:
        if seconds >= size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.1f} seconds"


def hours(seconds: float) -> str:
    """A time as costs are counted: in hours from two on, however many."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def clock(seconds: float) -> str:
    """A time as on a clock, 1:02:03."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
