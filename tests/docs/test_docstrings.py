"""Every public class, function and method of the source says what it does; an override inherits its words."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

import pytest

import hydra_plugins
import scantling


def modules(package: ModuleType) -> list[str]:
    """The modules of a package, those of its packages too, by dotted name."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [m.name for m in found if m.name.startswith(("scantling", "hydra_plugins.scantling"))]


MODULES = modules(scantling) + modules(hydra_plugins)


def lacking(module: ModuleType) -> Iterator[str]:
    """Public classes, functions and methods that are written in `module` and have no docstring."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            if not documented(value):
                yield name
            yield from (f"{name}.{method}" for method in lacking_methods(value))
        elif inspect.isfunction(inspect.unwrap(value)) and not value.__doc__:
            yield name


def documented(cls: type) -> bool:
    """Whether a class has words of its own: dataclasses and named tuples else have their signature there."""
    words = cls.__dict__.get("__doc__")
    return bool(words) and not words.startswith(f"{cls.__name__}(")


def lacking_methods(cls: type) -> Iterator[str]:
    """Public methods and properties that `cls` itself defines, that override none and have no docstring."""
    inherited = {name for base in cls.__mro__[1:] if base is not object for name in base.__dict__}
    for name, value in cls.__dict__.items():
        if name.startswith("_") or name in inherited:
            continue
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        elif isinstance(value, cached_property):
            value = value.func
        is_method = inspect.isfunction(value) or isinstance(value, property)
        if is_method and not value.__doc__:
            yield name


@pytest.mark.parametrize("name", MODULES)
def test_public_names_have_docstrings(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    found = [f"{name}: {missing}" for missing in lacking(module)]
    assert not found, "\n".join(found)


def test_lacking_methods_sees_every_kind_of_method():
    class Base:
        def told(self):
            """Told."""

    class Child(Base):
        @property
        def shown(self): ...

        @classmethod
        def made(cls): ...

        @staticmethod
        def alone(): ...

        @cached_property
        def kept(self): ...

        def told(self): ...

        def plain(self): ...

        def _private(self): ...

    assert list(lacking_methods(Child)) == ["shown", "made", "alone", "kept", "plain"]


def test_a_generated_signature_is_no_docstring():
    @dataclasses.dataclass
    class Point:
        x: int

    class Pair(NamedTuple):
        x: int

    for cls in (Point, Pair):
        assert (cls.__doc__ or "").startswith(f"{cls.__name__}(x")
        assert not documented(cls)
