"""Which numbers a setting may be, looked at before anything is written or computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fastscarce.config import to_dict
from fastscarce.errors import ConfigError

__all__ = ["check_ranges"]


class _Range(NamedTuple):
    low: float = -math.inf
    high: float = math.inf
    low_belongs: bool = True
    high_belongs: bool = True

    def __contains__(self, value: object) -> bool:
        # Written so that a NaN, which no comparison holds for, is outside.
        if not isinstance(value, (int, float)):
            return False
        above = value >= self.low if self.low_belongs else value > self.low
        below = value <= self.high if self.high_belongs else value < self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{self.low:g} or more" if self.low_belongs else f"above {self.low:g}"
        if math.isinf(self.high):
            return low
        return f"{low} and {'at most' if self.high_belongs else 'below'} {self.high:g}"


_COUNT = _Range(low=1)
_NOT_NEGATIVE = _Range(low=0)
_POSITIVE = _Range(low=0, low_belongs=False)
_PART = _Range(low=0, high=1)
_PART_BELOW_ONE = _Range(low=0, high=1, high_belongs=False)

# By a setting's own name, wherever it stands; one that may be null is checked where it is not.
_RANGES = {
    "alpha": _PART,
    "backbone_rate": _NOT_NEGATIVE,
    "batch_size": _COUNT,
    "checkpoint_every": _COUNT,
    "cutmix_alpha": _NOT_NEGATIVE,
    "cutmix_probability": _PART,
    "deep": _NOT_NEGATIVE,
    "dropout": _PART_BELOW_ONE,
    "ema_decay": _PART_BELOW_ONE,
    "gradient_accumulation_steps": _COUNT,
    "holdout_per_class": _NOT_NEGATIVE,
    "image_size": _Range(low=1, high=32767),
    "k": _COUNT,
    "keep_per_class": _COUNT,
    "label_smoothing": _PART,
    "labels_per_class": _COUNT,
    "layer_decay": _Range(low=0, high=1, low_belongs=False),
    "learning_rate": _NOT_NEGATIVE,
    "log_every": _COUNT,
    "max_gradient_norm": _POSITIVE,
    "rounds": _NOT_NEGATIVE,
    "rows_per_shard": _COUNT,
    "steps": _COUNT,
    "stochastic_depth": _PART_BELOW_ONE,
    "teacher_batch_size": _COUNT,
    "teacher_image_size": _Range(low=1, high=32767),
    "temperature": _POSITIVE,
    "test_fraction": _PART_BELOW_ONE,
    "threads": _COUNT,
    "threshold": _PART,
    "unlabelled_batch_size": _COUNT,
    "views": _COUNT,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "workers": _NOT_NEGATIVE,
}


def check_ranges(config: Any) -> None:
    """Refuse a number that no run can go on with.

    Args:
        config: Of any command.

    Raises:
        ConfigError: Names the first setting that is out of its range, and the range.
    """
    for place, name, value in _settings(to_dict(config)):
        allowed = _RANGES.get(name)
        if allowed is not None and value is not None and value not in allowed:
            raise ConfigError(f"{place} must be {allowed}, got {value}.")


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Each setting's dotted name, its last part and its value."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", name, value
