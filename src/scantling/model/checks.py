"""Checks of settings, which parts of a model share with what is built around them."""

from __future__ import annotations

import math
from typing import Any


def check_whole(name: str, value: Any, *, least: int = 1) -> None:
    """Raises ValueError unless `value`, the setting `name`, is a whole number, at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value} must be a whole number, at least {least}")


def check_positive(name: str, value: Any, *, or_null: bool = False) -> None:
    """Raises ValueError unless `value`, the setting `name`, is a number above 0, or with `or_null` None."""
    if not (or_null and value is None) and not (is_number(value) and value > 0):
        raise ValueError(f"{name}={value} must be positive{', or null' if or_null else ''}")


def check_not_negative(name: str, value: Any) -> None:
    """Raises ValueError unless `value`, the setting `name`, is a number, 0 or more."""
    if not (is_number(value) and value >= 0):
        raise ValueError(f"{name}={value} must be 0 or more")


def check_share(name: str, value: Any) -> None:
    """Raises ValueError unless `value`, the setting `name`, is a number from 0 to 1."""
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name}={value} must be from 0 to 1")


def check_below_one(name: str, value: Any) -> None:
    """Raises ValueError unless `value`, the setting `name`, is a number, 0 or more and below 1."""
    if not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"{name}={value} must be 0 or more, below 1")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
