"""fastscarce: the best small model from few labelled and many unlabelled images.

Sub-packages are loaded when they are first touched, so ``import fastscarce`` costs no more than
its own few lines.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import fastscarce.augment as augment
    import fastscarce.cache as cache
    import fastscarce.data as data
    import fastscarce.models as models
    import fastscarce.ops as ops
    import fastscarce.pseudo as pseudo
    import fastscarce.report as report
    import fastscarce.train as train

__all__ = ["__version__", "augment", "cache", "data", "models", "ops", "pseudo", "report", "train"]

__version__ = "0.1.0"

_SUBPACKAGES = frozenset(__all__) - {"__version__"}


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
