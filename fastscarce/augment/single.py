"""Plans of one named operation, for tests and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from fastscarce.augment.draw import checked_ids, neighbours
from fastscarce.augment.plan import Plan
from fastscarce.augment.program import warp_of
from fastscarce.augment.table import (
    MIXES,
    OPERATIONS,
    SAMPLINGS,
    PlanTable,
    checked_size,
    new_table,
)

__all__ = ["plan_of"]

_LARGEST = 1e5  # in an affine map
_WARPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_OTHERS = ("flip", "crop", "affine", "erase", "cutmix", "mixup")
# Least and most magnitude, and its unit.
_RANGES = {
    "rotate": (-360.0, 360.0, "degrees"),
    "solarize": (0.0, 255.0, "a grey level"),
    "color": (0.0, 100.0, "a factor"),
    "posterize": (0.0, 8.0, "whole bits"),
    "contrast": (0.0, 100.0, "a factor"),
    "brightness": (0.0, 100.0, "a factor"),
    "sharpness": (0.0, 100.0, "a factor"),
    "shear_x": (-10.0, 10.0, "a fraction of the height"),
    "shear_y": (-10.0, 10.0, "a fraction of the width"),
    "translate_x": (-32767.0, 32767.0, "pixels"),
    "translate_y": (-32767.0, 32767.0, "pixels"),
    "hue": (-0.5, 0.5, "a part of a turn"),
    "crop": (0.01, 1.0, "the part of each side that is kept"),
    "erase": (0.0, 1.0, "the part of the area"),
    "cutmix": (0.0, 1.0, "the partner's part of the area"),
    "mixup": (0.0, 1.0, "the partner's weight"),
}


def plan_of(
    operation: str,
    sample_ids: npt.ArrayLike,
    *,
    magnitude: float | Sequence[float] = 0.0,
    image_size: int | tuple[int, int],
    sampling: Literal["nearest", "bilinear"] = "nearest",
    fill: int = 0,
) -> Plan:
    """A plan that does one operation to every image; nothing is drawn.

    Args:
        operation: One of RandAugment's 14, ``invert``, ``hue``, ``flip``, ``crop``, ``affine``,
            ``erase``, ``cutmix`` or ``mixup``; ``saturation`` is ``color``.
        sample_ids: int64 ``(rows,)``.
        magnitude: In the operation's own unit: degrees, a factor, a grey level, bits, pixels, a
            fraction of a side or of the area. Boxes and crops are about the image's centre. Of
            ``affine`` six numbers a, b, c, d, e, f: the result at (x, y), in pixels from the
            centre, is the image at (a x + b y + c, d x + e y + f).
        image_size: Side in pixels, or height and width.
        sampling: Of a warp.
        fill: Level of what a warp uncovers and of what is erased, 0 to 255.

    Raises:
        ValueError: The operation is unknown, or a number is out of range.
    """
    name = "color" if operation == "saturation" else operation
    if name not in OPERATIONS and name not in _OTHERS:
        raise ValueError(
            f"plan_of needs one of {', '.join((*OPERATIONS, *_OTHERS))}, got {operation!r}."
        )
    numbers = _magnitudes(name, magnitude)
    if sampling not in SAMPLINGS or not (isinstance(fill, int) and 0 <= fill <= 255):
        raise ValueError(
            f"plan_of needs sampling nearest or bilinear and fill from 0 to 255, got {sampling!r}"
            f" and {fill!r}."
        )
    size = checked_size("plan_of", image_size)
    ids = checked_ids("plan_of", sample_ids)
    table = new_table(len(ids))
    table["id"] = ids
    table["partner"] = neighbours(len(ids))
    table["sampling"] = SAMPLINGS.index(sampling)
    table["fill"][:, :3] = fill
    one = numbers[0]
    if name in _WARPS or name in ("flip", "crop", "affine"):
        matrix = np.array(numbers) if name == "affine" else _matrix(name, one, size)
        table["matrix"] = np.reshape(matrix, (2, 3))
    elif name in OPERATIONS:
        table["operation"][:, 0] = OPERATIONS.index(name)
        table["argument"][:, 0] = one
        table["rest"][:, 0] = 1.0 - one
    else:
        _fill_box(table, name, one, size, fill)
    if name in OPERATIONS:
        table["drawn"][:, 0] = OPERATIONS.index(name)
        table["amount"][:, 0] = one
    return Plan(table, size)


def _magnitudes(name: str, magnitude: float | Sequence[float]) -> list[float]:
    """One number, or the six of an affine map, each in its range."""
    alone = isinstance(magnitude, (int, float))
    given = [magnitude] if alone else magnitude
    several = isinstance(given, (list, tuple)) and all(isinstance(x, (int, float)) for x in given)
    try:
        numbers = [float(x) for x in given] if several else []  # type: ignore[union-attr, arg-type]
    except OverflowError:
        numbers = [math.inf]
    if name == "affine":
        if alone or len(numbers) != 6 or not all(abs(x) <= _LARGEST for x in numbers):
            raise ValueError(
                f"plan_of needs affine by six numbers from {-_LARGEST:g} to {_LARGEST:g}, got"
                f" {magnitude!r}."
            )
        return numbers
    least, most, unit = _RANGES.get(name, (-_LARGEST, _LARGEST, "a number"))
    whole = name != "posterize" or (alone and numbers[0].is_integer())
    if not alone or not whole or not least <= numbers[0] <= most:
        raise ValueError(
            f"plan_of needs {name} by {unit} from {least:g} to {most:g}, got {magnitude!r}."
        )
    return numbers


def _matrix(name: str, magnitude: float, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    matrix = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    if name == "flip":
        matrix[0] = -1.0
    elif name == "crop":
        matrix[0] = matrix[4] = magnitude
    else:
        amount = float(int(magnitude)) if name.startswith("translate") else magnitude
        matrix[:] = warp_of(OPERATIONS.index(name), amount, *size)[1:]
    return matrix


def _fill_box(table: PlanTable, name: str, share: float, size: tuple[int, int], fill: int) -> None:
    box = []
    for side in size:
        length = math.floor(side * math.sqrt(share))
        box.append(((side - length) // 2, (side - length) // 2 + length))
    edges = [box[0][0], box[1][0], box[0][1], box[1][1]]
    if name == "erase":
        table["erase"] = edges
        table["erase_fill"][:, :3] = fill
        return
    paired = table["partner"] != np.arange(len(table))
    table["mix"] = np.where(paired, MIXES.index(name), 0)
    if name == "mixup":
        lam = 1.0 - share
    else:
        table["box"] = np.where(paired[:, None], edges, 0)
        lam = 1.0 - (edges[2] - edges[0]) * (edges[3] - edges[1]) / (size[0] * size[1])
    table["lam"] = np.where(paired, lam, 1.0)
