"""The tag of a view: four bytes of a hash of the plan row that drew it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastscarce.augment import PLAN, Plan

__all__ = ["plan_tags"]

# What comes from mixing, which a student adds to the views of a table.
_MIXING = ("lam", "box", "mix")

_OFFSET = np.uint32(2166136261)
_PRIME = np.uint32(16777619)


def plan_tags(
    plan: Plan, partner_ids: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """FNV-1a over the 32-bit words of each row, int64 ``(rows,)``.

    Args:
        plan: Of the views.
        partner_ids: Of a table of mixed views: the id of each row's partner, int64 ``(rows,)``,
            which stands for its place in the batch. None: what mixes the row is left out.

    Source: Fowler, Noll and Vo, "The FNV Non-Cryptographic Hash Algorithm", with words for bytes.
    """
    table = plan.table.copy()
    table["partner"] = 0
    if partner_ids is None:
        for name in _MIXING:
            table[name] = 0
    words = table.view(np.uint32).reshape(len(table), PLAN.itemsize // 4)
    if partner_ids is not None:
        words = np.hstack((words, partner_ids.view(np.uint32).reshape(len(table), 2)))
    tag = np.full(len(table), _OFFSET, dtype=np.uint32)
    for column in range(words.shape[1]):
        tag = (tag ^ words[:, column]) * _PRIME
    # The high bits are the mixed ones.
    tag ^= tag >> np.uint32(15)
    return tag.astype(np.int64)
