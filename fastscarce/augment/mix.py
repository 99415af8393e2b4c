"""Mixing of neighbours in a batch: CutMix."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.augment import philox

__all__ = ["cutmix", "partners"]

_FIRST_DRAW = 64  # far from the draws of a view, so that mixing is independent of them


def partners(rows: int) -> npt.NDArray[np.int64]:
    """Places of partners, ``(rows,)``: 2i and 2i + 1 are a pair; an odd last row is its own."""
    place: npt.NDArray[np.int64] = np.arange(rows, dtype=np.int64) ^ 1
    return place.clip(max=rows - 1)


def cutmix(
    images: Tensor,
    ids: npt.ArrayLike | Tensor,
    *,
    view: int | npt.ArrayLike | Tensor,
    seed: int,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Paste a box of its partner into each image.

    The box covers ``1 - Beta(alpha, alpha)`` of the image before it is clipped at the border, about
    a uniform centre; both are functions of (seed, id, view). The partner of row 2i is row 2i + 1,
    and the other way round.

    Args:
        images: Any floating or uint8 dtype, ``(rows, channels, height, width)``.
        ids: Sample ids, int64 ``(rows,)``.
        view: Which view, from 0 to 2**32 - 1: int64 ``(rows,)`` or one number for all.
        seed: Any integer.
        alpha: Of the Beta distribution; 0 leaves the images as they are.

    Returns:
        The mixed images; the partners' places, int64 ``(rows,)``; and each own image's weight,
        float32 ``(rows,)``: exactly 1 minus the share of the pixels in the clipped box, 1 for a
        self-pair.

    Raises:
        ValueError: ``alpha`` is negative or not finite, or a shape is wrong.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers" (2019),
    section 3.
    """
    if not 0.0 <= alpha < float("inf"):
        raise ValueError(f"cutmix needs alpha of 0 or more, got {alpha}.")
    places = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids, dtype=np.int64)
    if images.dim() != 4 or places.shape != images.shape[:1]:
        raise ValueError(
            "cutmix needs images, (rows, channels, height, width), and an id a row,"
            f" got {tuple(images.shape)} and {places.shape}."
        )
    rows, _, height, width = images.shape
    device = images.device
    partner = partners(rows)
    if alpha == 0.0 or rows < 2:
        own = torch.arange(rows, device=device)
        return images, own, torch.ones(rows, dtype=torch.float32, device=device)
    numbers = np.asarray(view.cpu() if isinstance(view, Tensor) else view, dtype=np.int64)
    box = _boxes(places, numbers, seed, alpha, height, width)
    box[partner == np.arange(rows)] = 0
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    lam = torch.from_numpy((1.0 - area / (height * width)).astype(np.float32)).to(device)
    edges = torch.from_numpy(box).to(device)
    y = torch.arange(height, device=device)
    x = torch.arange(width, device=device)
    down = (y >= edges[:, :1]) & (y < edges[:, 2:3])
    across = (x >= edges[:, 1:2]) & (x < edges[:, 3:])
    inside = (down[:, :, None] & across[:, None, :]).unsqueeze(1)
    other = torch.from_numpy(partner).to(device)
    return torch.where(inside, images[other], images), other, lam


def _boxes(
    ids: npt.NDArray[np.int64],
    view: npt.NDArray[np.int64],
    seed: int,
    alpha: float,
    height: int,
    width: int,
) -> npt.NDArray[np.int64]:
    """Clipped boxes: top, left, bottom, right, ``(rows, 4)``; bottom and right not included."""
    uniform = philox.uniforms(seed, ids, view, first=_FIRST_DRAW, count=1)
    share = _beta(uniform[:, 0], alpha)
    side = np.sqrt(1.0 - share)
    box = np.empty((ids.shape[0], 4), dtype=np.int64)
    for axis, size in enumerate((height, width)):
        half = np.floor(size * side) / 2.0
        centre = np.floor(uniform[:, 1 + axis] * size)
        box[:, axis] = np.clip(np.floor(centre - half), 0, size)
        box[:, axis + 2] = np.clip(np.floor(centre + half), 0, size)
    return box


def _beta(uniform: npt.NDArray[np.float64], alpha: float) -> npt.NDArray[np.float64]:
    """Beta(alpha, alpha) by its inverse distribution function: one uniform a draw, no rejection."""
    if alpha == 1.0:
        return uniform
    from scipy.special import betaincinv  # type: ignore[import-untyped]

    return np.asarray(betaincinv(alpha, alpha, uniform), dtype=np.float64)
