"""What every operator asks of a tensor before it looks at its shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "mark_written",
    "of_size_one",
    "require_floats",
    "require_numbers",
    "require_temperature",
    "require_tensor",
    "without_gaps",
]

_HOTTEST = 1e18

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


def without_gaps(matrix: Tensor) -> Tensor:
    """The matrix where the numbers of a row lie side by side, else such a copy."""
    if matrix.stride(1) == 1:
        return matrix
    if matrix.numel() <= 1:  # which PyTorch calls contiguous, whatever its strides
        return matrix.clone(memory_format=torch.contiguous_format)
    return matrix.contiguous()


def require_numbers(operator: str, **values: object) -> None:
    """Refuse what is no number.

    Raises:
        ValueError: Names the first that is none.
    """
    for name, value in values.items():
        if not hasattr(value, "__float__"):
            raise ValueError(f"{operator} needs {name} as a number, got {value!r}.")


def require_temperature(operator: str, temperature: float) -> None:
    """Refuse a temperature that logits can't be divided by.

    Raises:
        ValueError: It is none, or float32 does not hold its square.
    """
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{operator} needs a positive, finite temperature, got {temperature}.")
    if temperature > _HOTTEST:
        raise ValueError(
            f"{operator} needs a temperature of at most {_HOTTEST:g}, got {temperature}."
        )


def mark_written(memory: Tensor) -> None:
    """Tell autograd that a kernel wrote to memory: what was saved of it before is stale."""
    if not memory.is_inference():
        torch.autograd.graph.increment_version(memory)


def of_size_one(weight: Tensor) -> Tensor:
    """Weights of rows, float32 ``(rows,)``, the largest 1: means are the same for any size.

    Gradients of rows in float16 are not: small ones would round to zero, large ones overflow.
    """
    if not weight.numel():
        return weight
    return weight / weight.amax().clamp(min=torch.finfo(torch.float32).tiny)
