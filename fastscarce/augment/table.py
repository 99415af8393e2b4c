"""The table that a plan is: a row a result, 128 bytes, read by Python and by the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "MAPPING_VERSION",
    "OPERATIONS",
    "PLAN",
    "SLOTS",
    "PlanTable",
    "byte_of",
    "checked_size",
    "new_table",
]

MAPPING_VERSION = 3
"""Of the mapping from random words to parameters: part of every fingerprint of drawn views."""

SLOTS = 4
"""How many operations on levels a row holds."""

OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "invert",
    "hue",
)
"""A row's ``operation`` is a place in this tuple; the first 14 are RandAugment's."""

MIXES = ("none", "cutmix", "mixup")
SAMPLINGS = ("nearest", "bilinear")
BORDERS = ("fill", "reflect")

PLAN = np.dtype(
    [
        ("id", np.int64),
        ("view", np.uint32),
        ("partner", np.int32),  # place in the batch of the row that is mixed in
        ("lam", np.float32),  # weight of the own image, and of its label
        ("box", np.int16, (4,)),  # of the partner's pixels: top, left, bottom, right, last two out
        ("matrix", np.float32, (2, 3)),  # output to source pixel, each counted from its centre
        ("argument", np.float32, (SLOTS,)),  # factor, threshold (grey level), bits, or turn of hue
        ("rest", np.float32, (SLOTS,)),  # 1 - argument, subtracted in double
        ("operation", np.uint8, (SLOTS,)),
        ("erase", np.int16, (4,)),  # like box
        ("fill", np.uint8, (4,)),  # levels of what a warp uncovers, where the border is filled
        ("erase_fill", np.uint8, (4,)),
        ("mix", np.uint8),  # place in MIXES
        ("warp_at", np.uint8),  # how many slots come before the warp
        ("sampling", np.uint8),  # place in SAMPLINGS
        ("border", np.uint8),  # place in BORDERS
        ("amount", np.float32, (SLOTS,)),  # of the operations as drawn, for people
        ("drawn", np.uint8, (SLOTS,)),  # RandAugment's operations as drawn, geometry too
    ]
)

PlanTable = npt.NDArray[np.void]


def byte_of(name: str) -> int:
    """Where a field of a row begins."""
    fields = PLAN.fields
    assert fields is not None
    return int(fields[name][1])


def new_table(rows: int) -> PlanTable:
    """Rows that leave their images as they are."""
    # From whole numbers of eight bytes, so that each row lies where the kernels can read it.
    table = np.zeros(rows * PLAN.itemsize // 8, dtype=np.int64).view(PLAN)
    table["matrix"][:, 0, 0] = 1.0
    table["matrix"][:, 1, 1] = 1.0
    table["lam"] = 1.0
    table["partner"] = np.arange(rows)
    return table


def checked_size(name: str, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width.

    Raises:
        ValueError: They are not from 1 to 32767.
    """
    pair: Any = (image_size, image_size) if isinstance(image_size, int) else image_size
    sound = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not sound or not all(isinstance(s, int) and 1 <= s <= 32767 for s in pair):
        raise ValueError(
            f"{name} needs image_size, one side or (height, width) of 1 to 32767 pixels, got"
            f" {image_size!r}."
        )
    return pair[0], pair[1]
