"""Carries a plan out with Kornia's functional operations: readable, differentiable, any device.

One operation after the other, each over the rows that have it; levels are whole after each, as in a
chain of operations on uint8 images. It is what the fused kernel is tested against: to a level, but
for what the two define differently:

- After brightness, contrast, sharpness, color, hue and autocontrast levels are rounded here and cut
  off there, as torchvision does: a level. A later operation makes more of it: contrast by 1.9 two
  levels, equalize any number.
- Here color goes towards the grey as it is, there towards whole levels of it: two levels.
- Under nearest sampling a coordinate half-way between two pixels goes to either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.augment.plan import Plan
from fastscarce.augment.point import POINT_OPERATIONS, whole
from fastscarce.augment.table import BORDERS, MIXES, OPERATIONS, SAMPLINGS, SLOTS, PlanTable

__all__ = ["carry_out"]

Rows = npt.NDArray[np.intp]


def carry_out(
    plan: Plan,
    images: Tensor,
    *,
    index: Tensor | None = None,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Carry a plan out; see `fastscarce.augment.apply` for the arguments and the result.

    Raises:
        ValueError: The images are none; `fastscarce.augment.apply` looks at all else.
    """
    if (
        not (images.dtype == torch.uint8 or images.is_floating_point())
        or images.dim() != 4
        or images.shape[3] not in (1, 3)
    ):
        raise ValueError(
            "apply needs uint8 or floating-point images, (n, height, width, 1 or 3 channels), got"
            f" {images.dtype} {tuple(images.shape)}."
        )
    if 1 in images.shape[1:3]:
        raise ValueError(
            "apply needs images of at least 2x2 pixels for executor kornia, whose warps move a "
            f"single row or column of pixels nowhere, got {images.shape[1]}x{images.shape[2]}; "
            "take native."
        )
    read = images if index is None else images[index]
    levels = read.permute(0, 3, 1, 2).contiguous().float()
    table = plan.table
    for slot in range(SLOTS + 1):
        levels = _warp(levels, table, slot)
        if slot < SLOTS:
            levels = _point(levels, table["operation"][:, slot], table["argument"][:, slot])
    levels = _mix(_erase(levels, table), table)
    if dtype == torch.uint8:
        return levels.detach().round().to(torch.uint8)
    return _normalise(levels, mean, std).to(dtype)


def _warp(levels: Tensor, table: PlanTable, slot: int) -> Tensor:
    """One gather a row, of those that are warped before this slot."""
    moved = (table["matrix"] != np.eye(2, 3, dtype=np.float32)).any(axis=(1, 2))
    moved &= table["warp_at"] == slot
    for sampling in np.unique(table["sampling"][moved]):
        for border in np.unique(table["border"][moved]):
            chosen = moved & (table["sampling"] == sampling) & (table["border"] == border)
            rows = np.flatnonzero(chosen)
            if rows.size:
                warped = _sample(
                    _take(levels, rows), table[rows], SAMPLINGS[sampling], BORDERS[border]
                )
                levels = _put(levels, rows, whole(warped))
    return levels


def _sample(images: Tensor, table: PlanTable, sampling: str, border: str) -> Tensor:
    from kornia.geometry.transform import remap

    matrix = torch.from_numpy(np.ascontiguousarray(table["matrix"])).to(images.device)
    channels, height, width = images.shape[1:]
    x = torch.arange(width, device=images.device, dtype=torch.float32) - (width - 1) / 2
    y = torch.arange(height, device=images.device, dtype=torch.float32) - (height - 1) / 2
    # Multiplied out, not a matrix product, so that a row's bits can't depend on its neighbours.
    maps = [
        matrix[:, axis, 0, None, None] * x
        + matrix[:, axis, 1, None, None] * y.unsqueeze(1)
        + matrix[:, axis, 2, None, None]
        + (side - 1) / 2
        for axis, side in enumerate((width, height))
    ]
    # Kornia's border is black, so the fill is made black and put back.
    fill = torch.from_numpy(table["fill"][:, :channels].astype(np.float32)).to(images.device)
    fill = fill[:, :, None, None]
    result: Tensor = remap(
        images if border == "reflect" else images - fill,
        *maps,
        mode=sampling,
        padding_mode="reflection" if border == "reflect" else "zeros",
        align_corners=True,
    )
    return result if border == "reflect" else result + fill


def _point(
    levels: Tensor, operations: npt.NDArray[np.uint8], arguments: npt.NDArray[np.float32]
) -> Tensor:
    """One slot of operations on levels: each runs once, over its own rows."""
    for code in np.unique(operations):
        apply = POINT_OPERATIONS.get(OPERATIONS[code])
        if apply is None:
            continue
        rows = np.flatnonzero(operations == code)
        argument = torch.from_numpy(arguments[rows]).to(levels.device)
        levels = _put(levels, rows, apply(_take(levels, rows), argument))
    return levels


def _inside(box: npt.NDArray[np.int16], height: int, width: int, device: torch.device) -> Tensor:
    """Which pixels are in the boxes, ``(rows, 1, height, width)``."""
    edges = torch.from_numpy(box.astype(np.int64)).to(device)
    y = torch.arange(height, device=device)
    x = torch.arange(width, device=device)
    down = (y >= edges[:, :1]) & (y < edges[:, 2:3])
    across = (x >= edges[:, 1:2]) & (x < edges[:, 3:])
    return (down[:, :, None] & across[:, None, :]).unsqueeze(1)


def _erase(levels: Tensor, table: PlanTable) -> Tensor:
    rows = np.flatnonzero(table["erase"][:, 2] > table["erase"][:, 0])
    if rows.size == 0:
        return levels
    channels, height, width = levels.shape[1:]
    fill = torch.from_numpy(table["erase_fill"][rows, :channels].astype(np.float32))
    inside = _inside(table["erase"][rows], height, width, levels.device)
    fill = fill.to(levels.device)[:, :, None, None]
    return _put(levels, rows, torch.where(inside, fill, _take(levels, rows)))


def _mix(levels: Tensor, table: PlanTable) -> Tensor:
    """With the partners as they were before any was mixed."""
    if not table["mix"].any():
        return levels
    other = _take(levels, table["partner"].astype(np.intp))
    height, width = levels.shape[2:]
    inside = _inside(table["box"], height, width, levels.device)
    mix = torch.from_numpy(table["mix"].astype(np.int64)).to(levels.device).view(-1, 1, 1, 1)
    lam = torch.from_numpy(np.ascontiguousarray(table["lam"])).to(levels.device)
    lam = lam.view(-1, 1, 1, 1)
    pasted = torch.where(inside & (mix == MIXES.index("cutmix")), other, levels)
    return torch.where(mix == MIXES.index("mixup"), lam * levels + (1.0 - lam) * other, pasted)


def _normalise(
    levels: Tensor, mean: float | Sequence[float], std: float | Sequence[float]
) -> Tensor:
    from kornia.enhance import normalize

    channels = levels.shape[1]
    numbers = []
    for name, value in (("mean", mean), ("std", std)):
        given = (value,) if isinstance(value, (int, float)) else tuple(value)
        if len(given) not in (1, channels):
            raise ValueError(f"apply needs {name}, one number or {channels}, got {len(given)}.")
        numbers.append(torch.tensor(given, device=levels.device).expand(channels))
    result: Tensor = normalize(levels / 255.0, *numbers)
    return result


def _take(levels: Tensor, rows: Rows) -> Tensor:
    """A copy of the rows."""
    return levels[torch.from_numpy(rows).to(levels.device)]


def _put(levels: Tensor, rows: Rows, values: Tensor) -> Tensor:
    return levels.index_copy(0, torch.from_numpy(rows).to(levels.device), values)
