"""Checks that parts of a model share with what is built around them."""

from __future__ import annotations

from typing import Any


def check_whole(name: str, value: Any, *, least: int = 1) -> None:
    """Raises ValueError unless `value`, the setting `name`, is a whole number, at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value} must be a whole number, at least {least}")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value`, the setting `name`, is more than 0."""
    if not value > 0:
        raise ValueError(f"{name}={value:g} must be positive")
