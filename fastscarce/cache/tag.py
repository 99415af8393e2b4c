"""The tag of a view: four bytes of a hash of the plan row that drew it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastscarce.augment import PLAN, Plan

__all__ = ["plan_tags"]

# What comes from the batch or from mixing, which a student adds to the views of a table.
_LEFT_OUT = ("partner", "lam", "box", "mix")

_OFFSET = np.uint32(2166136261)
_PRIME = np.uint32(16777619)


def plan_tags(plan: Plan) -> npt.NDArray[np.int64]:
    """FNV-1a over the 32-bit words of each row but what mixes it, int64 ``(rows,)``.

    Source: Fowler, Noll and Vo, "The FNV Non-Cryptographic Hash Algorithm", with words for bytes.
    """
    table = plan.table.copy()
    for name in _LEFT_OUT:
        table[name] = 0
    words = table.view(np.uint32).reshape(len(table), PLAN.itemsize // 4)
    tag = np.full(len(table), _OFFSET, dtype=np.uint32)
    for column in range(words.shape[1]):
        tag = (tag ^ words[:, column]) * _PRIME
    # The high bits are the mixed ones.
    tag ^= tag >> np.uint32(15)
    return tag.astype(np.int64)
