"""What every operator asks of a tensor before it looks at its shape."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FLOATS", "require_floats", "require_tensor"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_tensor(operator: str, name: str, value: object) -> None:
    """Refuse what is no tensor: an array, a list, a number.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{operator} needs {name} as a tensor, got {type(value).__name__}; torch.as_tensor "
            "makes one of numbers."
        )


def require_floats(operator: str, name: str, value: object) -> None:
    """Refuse what is no tensor of logits.

    Raises:
        ValueError: It is none, or of another dtype than `FLOATS`.
    """
    require_tensor(operator, name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in FLOATS:
        raise ValueError(
            f"{operator} needs {name} in float32, bfloat16, float16 or float64, got {value.dtype}."
        )
