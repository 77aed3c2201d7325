"""Hydra, with what it derives anew for every configuration derived once in a process.

Tests compose thousands of configurations of the same files and overrides; this halves the time.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, TypeVar

from hydra._internal import defaults_list
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.default_element import InputDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource

T = TypeVar("T")


def remembering(
    function: Callable[..., T], key: Callable[..., Hashable], *, copies: bool
) -> Callable[..., T]:
    """The function, called once for each `key` of its arguments; `copies`: callers change what they get."""
    known: dict[Hashable, T] = {}

    @wraps(function)
    def remembered(*args: Any, **named: Any) -> T:
        k = key(*args, **named)
        if k not in known:
            known[k] = function(*args, **named)
        return copy.deepcopy(known[k]) if copies else known[k]

    return remembered


def state_of_file(source: ConfigSource, config_path: str) -> Hashable:
    file = os.path.join(source.path, source._normalize_file_name(config_path))
    stat = os.stat(file) if os.path.exists(file) else None
    return source.provider, source.path, config_path, stat and (stat.st_mtime_ns, stat.st_size)


def choices(overrides: defaults_list.Overrides, chosen: list[InputDefault], self_added: bool) -> Hashable:
    return tuple(overrides.known_choices.items()), tuple(map(repr, chosen)), self_added


def parse_once() -> None:
    Plugins.instance()  # registers its own copies of the classes
    for scheme in ("file", "pkg"):
        source: Any = SourcesRegistry.instance().resolve(scheme)
        source.load_config = remembering(source.load_config, state_of_file, copies=True)
    parser: Any = OverridesParser
    parser.parse_rule = remembering(parser.parse_rule, lambda _, s, rule_name: (s, rule_name), copies=True)
    defaults_list._create_interpolation_map = remembering(
        defaults_list._create_interpolation_map, choices, copies=False
    )
