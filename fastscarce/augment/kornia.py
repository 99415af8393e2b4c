"""Carries a plan out with Kornia's functional operations, on any device.

First all geometry as one bilinear warp, then the point operations in the plan's order, then
erasing, then normalisation. After each step levels are whole, as in a chain of operations on uint8
images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.augment.point import POINT_OPERATIONS
from fastscarce.augment.policy import OPERATIONS, SLOTS, Plan, Policy, draw

__all__ = ["carry_out", "views"]


def views(
    images: Tensor,
    ids: npt.ArrayLike | Tensor,
    *,
    policy: str | Policy,
    view: int | npt.ArrayLike | Tensor,
    seed: int,
    flip: bool,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    reflect: bool | None = None,
) -> Tensor:
    """Draw a view of each image and carry it out: a function of (seed, id, view) and the image.

    Args:
        images: uint8 ``(rows, channels, height, width)``, 1 or 3 channels.
        ids: Sample ids, int64 ``(rows,)``.
        policy: ``eval``, ``weak``, ``standard``, ``strong``, or a policy of one's own.
        view: Which view, from 0 to 2**32 - 1: int64 ``(rows,)`` or one number for all.
        seed: Any integer.
        flip: Whether a mirrored image keeps its label.
        mean: Subtracted from levels scaled to 0..1: one number or one a channel.
        std: What the difference is divided by: one number or one a channel.
        reflect: Fill what a warp uncovers with the image's mirror image, or else with black. By
            default three channels are reflected and one channel is not.

    Returns:
        float32 of the images' shape and device.

    Raises:
        ValueError: A dtype, a shape, the policy or a view is not as above.
    """
    _check(images)
    rows, channels, height, width = images.shape
    places = _host(ids)
    if places.shape != (rows,):
        raise ValueError(f"views needs one id an image, ({rows},), got {places.shape}.")
    numbers = _host(view)
    if numbers.shape not in ((), (rows,)):
        raise ValueError(f"views needs one view number or {rows}, got {numbers.shape}.")
    plan = draw(
        places,
        numbers,
        policy=policy,
        seed=seed,
        height=height,
        width=width,
        flip=flip,
        reflect=channels == 3 if reflect is None else reflect,
    )
    return carry_out(images, plan, mean=mean, std=std)


def carry_out(
    images: Tensor,
    plan: Plan,
    *,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
) -> Tensor:
    """Carry a plan out; see `views` for the arguments and the result.

    Raises:
        ValueError: A dtype or a shape is wrong, or the plan's rows are not the images'.
    """
    _check(images)
    if plan.shape != (images.shape[0],):
        raise ValueError(f"A plan needs a row an image, ({images.shape[0]},), got {plan.shape}.")
    levels = images.contiguous().float()
    levels = _warp(levels, plan)
    for slot in range(SLOTS):
        _point(levels, plan["operation"][:, slot], plan["argument"][:, slot])
    _erase(levels, plan)
    return _normalise(levels, mean, std)


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "views needs uint8 images, (rows, 1 or 3 channels, height, width),"
            f" got {images.dtype} {tuple(images.shape)}."
        )


def _host(numbers: int | npt.ArrayLike | Tensor) -> npt.NDArray[np.int64]:
    if isinstance(numbers, Tensor):
        numbers = numbers.cpu().numpy()
    return np.asarray(numbers, dtype=np.int64)


def _warp(levels: Tensor, plan: Plan) -> Tensor:
    """One bilinear gather a row; rows whose matrix is the unit matrix are left alone."""
    moved = (plan["matrix"] != np.eye(2, 3, dtype=np.float32)).any(axis=(1, 2))
    for reflect in (False, True):
        rows = np.flatnonzero(moved & (plan["reflect"] == reflect))
        if rows.size == 0:
            continue
        from kornia.geometry.transform import remap

        matrix = torch.from_numpy(plan["matrix"][rows]).to(levels.device)
        height, width = levels.shape[2:]
        x = torch.arange(width, device=levels.device, dtype=torch.float32)
        y = torch.arange(height, device=levels.device, dtype=torch.float32).unsqueeze(1)
        # Multiplied out, not a matrix product, so that a row's bits can't depend on its neighbours.
        maps = [
            matrix[:, axis, 0, None, None] * x
            + matrix[:, axis, 1, None, None] * y
            + matrix[:, axis, 2, None, None]
            for axis in range(2)
        ]
        warped = remap(
            _take(levels, rows),
            maps[0],
            maps[1],
            mode="bilinear",
            padding_mode="reflection" if reflect else "zeros",
            align_corners=True,
        )
        levels = _put(levels, rows, warped.round_().clamp_(0.0, 255.0))
    return levels


def _point(
    levels: Tensor, operations: npt.NDArray[np.uint8], arguments: npt.NDArray[np.float32]
) -> None:
    """One slot of point operations, in place: each operation runs once, over its own rows."""
    for code in np.unique(operations):
        apply = POINT_OPERATIONS.get(OPERATIONS[code])
        if apply is None:
            continue
        rows = np.flatnonzero(operations == code)
        argument = torch.from_numpy(arguments[rows]).to(levels.device)
        _put(levels, rows, apply(_take(levels, rows), argument))


def _erase(levels: Tensor, plan: Plan) -> None:
    box = plan["erase"]
    rows = np.flatnonzero(box[:, 2] > box[:, 0])
    if rows.size == 0:
        return
    height, width = levels.shape[2:]
    edges = torch.from_numpy(box[rows].astype(np.int64)).to(levels.device)
    y = torch.arange(height, device=levels.device)
    x = torch.arange(width, device=levels.device)
    down = (y >= edges[:, :1]) & (y < edges[:, 2:3])
    across = (x >= edges[:, 1:2]) & (x < edges[:, 3:])
    inside = (down[:, :, None] & across[:, None, :]).unsqueeze(1)
    fill = torch.from_numpy(plan["erase_level"][rows]).to(levels.device).view(-1, 1, 1, 1)
    erased = torch.where(inside, fill, _take(levels, rows))
    _put(levels, rows, erased)


def _normalise(
    levels: Tensor, mean: float | Sequence[float], std: float | Sequence[float]
) -> Tensor:
    channels = levels.shape[1]
    for name, value in (("mean", mean), ("std", std)):
        if not isinstance(value, (int, float)) and len(value) not in (1, channels):
            raise ValueError(f"{name} needs one number or {channels}, got {len(value)}.")
    shift = torch.as_tensor(mean, dtype=levels.dtype, device=levels.device).view(-1, 1, 1)
    scale = torch.as_tensor(std, dtype=levels.dtype, device=levels.device).view(-1, 1, 1)
    return levels.div_(255.0).sub_(shift).div_(scale)


def _take(levels: Tensor, rows: npt.NDArray[np.intp]) -> Tensor:
    """A copy of the rows."""
    return levels[torch.from_numpy(rows).to(levels.device)]


def _put(levels: Tensor, rows: npt.NDArray[np.intp], values: Tensor) -> Tensor:
    return levels.index_copy_(0, torch.from_numpy(rows).to(levels.device), values)
