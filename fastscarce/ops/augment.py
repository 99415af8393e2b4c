"""Carry out an augmentation plan in one fused pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastscarce import _ops  # noqa: F401  loads the kernels
from fastscarce.ops.tensors import mark_written

__all__ = [
    "PLAN_ROW_BYTES",
    "augment",
    "check_index",
    "check_result",
    "checked_normalisation",
]

PLAN_ROW_BYTES = 128
_PIXELS = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_LAYOUTS = (torch.contiguous_format, torch.channels_last)

_augment = torch.ops.fastscarce.augment.default
_augment_out = torch.ops.fastscarce.augment_out.default


def augment(
    images: Tensor,
    plan: Tensor,
    *,
    index: Tensor | None = None,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    colour: Literal["exact", "fast"] = "exact",
    out: Tensor | None = None,
) -> Tensor:
    """Carry out a plan's rows: read uint8 images, write normalised ones.

    Each row reads its image once and writes its result once; only rows whose operations need
    something of the whole image look at it before. No gradient.

    Args:
        images: uint8 ``(n, height, width, channels)``, contiguous, 1 or 3 channels: a batch, or
            with ``index`` a pool.
        plan: The rows of a `fastscarce.augment.Plan`, uint8 ``(rows, 128)``, on the images'
            device.
        index: Which image each row reads, int64 ``(rows,)``. None: row i reads image i. On a CPU
            a place outside the pool is refused; on a GPU, where looking would wait for it, such a
            row is black.
        mean: Subtracted from levels scaled to 0..1: one number or one a channel.
        std: What the difference is divided by: one number or one a channel. Positive.
        dtype: float32, bfloat16 or float16; or uint8 for levels, which are not normalised.
        layout: ``torch.contiguous_format`` or ``torch.channels_last``.
        colour: ``exact``: each operation rounds as torchvision's on uint8 images. ``fast``:
            brightness, contrast and color in a row are one matrix, clamped once at its end.
        out: Where the result is written: ``(rows, channels, height, width)`` of ``dtype`` and
            ``layout``.

    Returns:
        ``(rows, channels, height, width)``; ``out`` where it is given.

    Raises:
        ValueError: A dtype, a shape, a layout or a number is none of these.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            "augment needs uint8 images, (n, height, width, 1 or 3 channels), got"
            f" {images.dtype} {tuple(images.shape)}."
        )
    if plan.dtype != torch.uint8 or plan.dim() != 2 or plan.shape[1] != PLAN_ROW_BYTES:
        raise ValueError(
            f"augment needs a plan's rows, uint8 (rows, {PLAN_ROW_BYTES}), got {plan.dtype}"
            f" {tuple(plan.shape)}."
        )
    rows, (count, height, width, channels) = plan.shape[0], images.shape
    check_index("augment", index, count, rows)
    if len({t.device for t in (images, plan, index, out) if t is not None}) != 1:
        raise ValueError(
            "augment needs images, plan, index and out on one device, got"
            f" {[str(t.device) for t in (images, plan, index, out) if t is not None]}."
        )
    shape = (rows, channels, height, width)
    check_result("augment", shape, dtype, layout, colour, out)
    if out is not None and not torch.compiler.is_compiling():
        _check_memory(images, out)
    means, deviations = checked_normalisation("augment", mean, std, channels)
    images = images.contiguous()
    plan = plan.contiguous()
    index = None if index is None else index.contiguous()
    last, fast = layout == torch.channels_last, colour == "fast"
    if out is None:
        pixels = _PIXELS.index(dtype)
        result: Tensor = _augment(images, plan, index, means, deviations, pixels, last, fast)
        return result
    _augment_out(images, plan, index, means, deviations, last, fast, out)
    if not torch.compiler.is_compiling():
        mark_written(out)
    return out


def _check_memory(images: Tensor, out: Tensor) -> None:
    """Refuse to write over the images, which rows after this one may read, or over a parameter."""
    if out.requires_grad:
        raise ValueError("augment needs an out that requires no gradient; pass out.detach().")
    if out.numel() and out.untyped_storage().data_ptr() == images.untyped_storage().data_ptr():
        raise ValueError("augment needs an out of other memory than the images'.")


def check_index(name: str, index: Tensor | None, count: int, rows: int) -> None:
    """Refuse an index that isn't one place a row, and none where there isn't an image a row."""
    if index is None:
        if count != rows:
            raise ValueError(f"{name} needs an image a row of the plan, {rows}, got {count}.")
    elif index.dtype != torch.int64 or index.shape != (rows,):
        raise ValueError(
            f"{name} needs an int64 index of shape ({rows},), got {index.dtype}"
            f" {tuple(index.shape)}."
        )


def check_result(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format,
    colour: str,
    out: Tensor | None,
) -> None:
    """Refuse a result that can't be asked for, and an ``out`` that it doesn't fit."""
    if dtype not in _PIXELS:
        raise ValueError(f"{name} needs dtype float32, bfloat16, float16 or uint8, got {dtype}.")
    if layout not in _LAYOUTS:
        raise ValueError(f"{name} needs contiguous_format or channels_last, got {layout}.")
    if colour not in ("exact", "fast"):
        raise ValueError(f"{name} needs colour of exact or fast, got {colour!r}.")
    if out is None:
        return
    if out.dtype != dtype or out.shape != shape or not out.is_contiguous(memory_format=layout):
        raise ValueError(
            f"{name} needs out of {shape} in {dtype} and {layout}, got {tuple(out.shape)} in"
            f" {out.dtype} with strides {out.stride()}."
        )


def checked_normalisation(
    name: str, mean: float | Sequence[float], std: float | Sequence[float], channels: int
) -> tuple[list[float], list[float]]:
    """Mean and std as lists of one number or one a channel."""
    means, deviations = _numbers(name, "mean", mean, channels), _numbers(name, "std", std, channels)
    # float32 holds no larger number than 3.4e38: so neither a scale nor a shift overflows.
    if not all(abs(m) <= 1e6 for m in means):
        raise ValueError(f"{name} needs a finite mean, in parts of 255 levels, got {mean}.")
    if not all(1e-30 <= d < math.inf for d in deviations):
        raise ValueError(f"{name} needs positive, finite std of at least 1e-30, got {std}.")
    return means, deviations


def _numbers(name: str, of: str, value: float | Sequence[float], channels: int) -> list[float]:
    try:
        numbers = [float(value)] if isinstance(value, (int, float)) else [float(x) for x in value]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) not in (1, channels):
        raise ValueError(f"{name} needs {of}, one number or {channels}, got {value!r}.")
    return numbers
