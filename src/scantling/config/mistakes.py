"""How an entry ends before its work is done: with one line for the user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hydra.errors import InstantiationException, MissingConfigException


class Mistake(Exception):
    """Something the user can put right. The message says what is wrong, where, and what would be right."""


class Failed(Exception):
    """What was computed did not all succeed. The message says which and why; exit code 1."""


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """Turn a ValueError or OSError, raised before anything is computed, into a Mistake."""
    try:
        yield
    except MissingConfigException:  # an OSError to Python; `one_line` says more of it
        raise
    except (ValueError, OSError, InstantiationException) as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise Mistake(str(cause)) from error
