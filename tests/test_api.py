"""The public names: sorted, present, and nothing loaded before it is touched."""

from __future__ import annotations

import importlib

import pytest

PACKAGES = [
    "fastscarce",
    "fastscarce.augment",
    "fastscarce.cache",
    "fastscarce.data",
    "fastscarce.models",
    "fastscarce.ops",
    "fastscarce.ops.converters",
    "fastscarce.pseudo",
    "fastscarce.report",
    "fastscarce.train",
]


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_sorted_and_every_name_is_there(name: str) -> None:
    package = importlib.import_module(name)
    names = package.__all__
    # As ruff sorts them: constants, classes, then functions and modules.
    kinds = [(not n.isupper(), not n[0].isupper(), n) for n in names]
    assert kinds == sorted(kinds)
    for entry in names:
        assert getattr(package, entry) is not None
        assert entry in dir(package)


@pytest.mark.parametrize("name", [n for n in PACKAGES if n != "fastscarce"])
def test_public_functions_and_classes_are_documented(name: str) -> None:
    package = importlib.import_module(name)
    for entry in package.__all__:
        thing = getattr(package, entry)
        if callable(thing):
            assert (thing.__doc__ or "").strip(), f"{name}.{entry} has no docstring"
