"""Which pseudo-labels a student learns from: the most confident of each class, equally many."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fastscarce.pseudo.label import PseudoLabels

__all__ = ["select"]


def select(
    labels: PseudoLabels,
    *,
    threshold: float = 0.0,
    keep_per_class: int | None = None,
    minimum_per_class: int = 1,
    minimum_agreement: float = 0.0,
    max_repeats: int | None = None,
) -> PseudoLabels:
    """Choose the most confident rows of each class, and repeat them up to the same number.

    A row is eligible with ``confidence >= threshold`` and ``agreement >= minimum_agreement``. Each
    class takes its most confident eligible rows, lowest id first where confidences are equal,
    ``keep_per_class`` at most. A class with fewer than ``minimum_per_class`` of these takes its
    most confident other rows up to that number, so that no class that the teacher predicts at all
    vanishes from the student's lessons. Of the ``n`` rows that a class then has, each counts
    ``keep_per_class // n`` times and the ``keep_per_class % n`` most confident once more.

    No random number is drawn, and the answer depends on the set of rows, not on their order.

    Args:
        labels: One row an image; earlier choices in it are disregarded.
        threshold: Lowest confidence, 0 or more. Above 1 nothing is eligible.
        keep_per_class: Rows a class, counting repeats. ``None`` takes every eligible row once.
        minimum_per_class: Rows a class has even where fewer are eligible, if the class is
            predicted that often; ``keep_per_class`` bounds it. 0 or more.
        minimum_agreement: Lowest agreement over views, in [0, 1].
        max_repeats: The most often that a row may count; classes short of rows then stay smaller.

    Returns:
        The same rows in the same order, with ``chosen`` and ``repeats`` set.

    Raises:
        ValueError: A number is out of its range.
    """
    if not threshold >= 0.0:
        raise ValueError(f"select needs a threshold of 0 or more, got {threshold}.")
    if not 0.0 <= minimum_agreement <= 1.0:
        raise ValueError(f"select needs minimum_agreement in [0, 1], got {minimum_agreement}.")
    if minimum_per_class < 0:
        raise ValueError(f"select needs minimum_per_class of 0 or more, got {minimum_per_class}.")
    for name, value in (("keep_per_class", keep_per_class), ("max_repeats", max_repeats)):
        if value is not None and value < 1:
            raise ValueError(f"select needs {name} of 1 or more, or none, got {value}.")

    rows = len(labels)
    # float32 against float32, so that a threshold read off a confidence keeps that very row.
    eligible = (labels.confidence >= np.float32(threshold)) & (
        labels.agreement >= np.float32(minimum_agreement)
    )
    predicted = np.bincount(labels.labels, minlength=labels.classes)
    kept = np.bincount(labels.labels[eligible], minlength=labels.classes)
    kept = np.maximum(kept, np.minimum(minimum_per_class, predicted))
    if keep_per_class is not None:
        kept = np.minimum(kept, keep_per_class)

    # Place 0 is a class's best row: by class, eligible first, most confident first, lowest id.
    order = np.lexsort((labels.ids, -labels.confidence, ~eligible, labels.labels))
    first = np.cumsum(predicted) - predicted
    place = np.empty(rows, dtype=np.int64)
    place[order] = np.arange(rows) - first[labels.labels[order]]

    share = kept[labels.labels]
    chosen = place < share
    if keep_per_class is None:
        repeats = chosen.astype(np.int64)
    else:
        divisor = np.maximum(share, 1)
        repeats = keep_per_class // divisor + (place < keep_per_class % divisor)
        repeats = np.where(chosen, repeats, 0).astype(np.int64)
    if max_repeats is not None:
        repeats = np.minimum(repeats, max_repeats)
    return replace(labels, chosen=chosen, repeats=repeats)
