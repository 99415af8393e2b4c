"""What a row of a plan does, in words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastscarce.augment.plan import Plan, require_plan
from fastscarce.augment.table import MIXES, OPERATIONS, SLOTS

__all__ = ["describe"]

_UNITS = {
    "solarize": "from {:.0f}",
    "posterize": "{:.0f} bits",
    "hue": "{:+.2f} turn",
    "autocontrast": "",
    "equalize": "",
    "invert": "",
}


def describe(plan: Plan) -> list[str]:
    """One text a row: the warp as drawn, the operations in their order, erasing and mixing.

    Returns:
        Parts of a text are joined by ``", "``; a row that does nothing is ``"as it is"``.

    Raises:
        ValueError: It is no plan.
    """
    require_plan("describe", plan)
    return [_of_row(row) for row in plan.table]


def _of_row(row: Any) -> str:
    parts = []
    for slot in range(SLOTS + 1):
        if slot == row["warp_at"]:
            parts += _warp(row["matrix"].astype(np.float64))
        if slot < SLOTS:
            name = OPERATIONS[row["operation"][slot]]
            if name != "identity":
                unit = _UNITS.get(name, "x {:.2f}")
                parts.append(f"{name} {unit.format(row['argument'][slot])}".strip())
    top, left, bottom, right = (int(edge) for edge in row["erase"])
    if bottom > top and right > left:
        parts.append(f"erase {right - left}x{bottom - top} at {left},{top}")
    if MIXES[row["mix"]] != "none" and row["lam"] < 1.0:
        parts.append(f"{MIXES[row['mix']]} with {1 - row['lam']:.2f} of the partner")
    return ", ".join(parts) if parts else "as it is"


def _warp(matrix: Any) -> list[str]:
    """The matrix as mirroring, rotation, scale, shear and translation; what is not there is left.

    The translation is of the image's centre, in pixels, right and down; the scale enlarges.
    """
    parts = []
    if abs(np.linalg.det(matrix[:, :2])) < 1e-12:
        return ["one point or line of it"]
    m = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))  # where a source pixel goes
    if np.linalg.det(m) < 0:
        parts.append("flip")
        m = m @ np.diag([-1.0, 1.0, 1.0])
    rotate = -math.degrees(math.atan2(m[1, 0], m[0, 0]))
    across = math.hypot(m[0, 0], m[1, 0])
    along = (m[0, 0] * m[0, 1] + m[1, 0] * m[1, 1]) / across
    down = np.linalg.det(m) / across
    if abs(rotate) >= 0.5:
        parts.append(f"rotate {rotate:+.0f}°")
    if abs(across - 1) >= 0.005 or abs(down - 1) >= 0.005:
        parts.append(f"scale {across:.2f}" + (f"x{down:.2f}" if abs(across - down) > 0.01 else ""))
    if abs(along / down) >= 0.005:
        parts.append(f"shear {along / down:+.2f}")
    if abs(m[0, 2]) >= 0.05 or abs(m[1, 2]) >= 0.05:
        parts.append(f"move {m[0, 2]:+.1f},{m[1, 2]:+.1f}")
    return parts
