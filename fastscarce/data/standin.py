"""Whose pixels a broken image is given."""

from __future__ import annotations

import numpy as np

from fastscarce.augment.philox import keyed_order
from fastscarce.data.source import Positions, Source

__all__ = ["stand_ins"]

_DRAW = 0x57A4D1  # the counter's word that sets these draws apart from a view's


def stand_ins(source: Source, position: int) -> Positions:
    """Positions of the samples that may stand in for one, the first choice first.

    They have its label and are of its split; the order is a function of the ids alone.
    """
    alike = (source.labels == source.labels[position]) & (
        source.is_test == source.is_test[position]
    )
    alike[position] = False
    others = np.flatnonzero(alike)
    order = keyed_order(int(source.ids[position]), source.ids[others], view=0, draw=_DRAW)
    return others[order]
