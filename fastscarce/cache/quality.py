"""How well a table's rows stand for what the teacher said: whether k is large enough."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.cache.journal import Line
from fastscarce.cache.record import Layout
from fastscarce.ops import TopK

__all__ = ["quality_of", "sums_of"]


def sums_of(
    rows: TopK, layout: Layout, labels: npt.NDArray[np.int64]
) -> tuple[dict[str, float], Tensor]:
    """What a journal's line adds up, and each row's first class, int64 ``(rows,)``."""
    values = rows.log_probs.float()
    first = rows.indices.gather(1, values.argmax(1, keepdim=True))[:, 0].long()
    tail = rows.log_tail.float().exp() * (layout.classes - layout.k)
    known = torch.from_numpy(labels) >= 0
    right = first[known] == torch.from_numpy(labels)[known]
    sums = {
        "mass": float(values.exp().sum(1).double().sum()),
        "tail": float(tail.double().sum()),
        "confidence": float(values.amax(1).exp().double().sum()),
        "labelled": float(known.sum()),
        "right": float(right.sum()),
    }
    return sums, first


def quality_of(lines: Sequence[Line]) -> dict[str, float]:
    """Means over rows: share of the k classes and of the others, and confidence.

    With labels also the part of labelled rows whose first class is the label.
    """
    rows = sum(line.rows for line in lines)
    total = {
        name: sum(line.sums.get(name, 0.0) for line in lines)
        for name in ("mass", "tail", "confidence", "labelled", "right")
    }
    quality = {
        "top_k_mass": total["mass"] / rows,
        "tail": total["tail"] / rows,
        "confidence": total["confidence"] / rows,
    }
    if total["labelled"]:
        quality["teacher_top1"] = total["right"] / total["labelled"]
    return quality
