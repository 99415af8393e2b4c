"""An epoch's order and its pairs: pure functions of (seed, id, view, epoch), of nothing else.

CutMix and MixUp need a partner in the same batch, and a teacher's row of a mixed view can be drawn
again only if the partner does not come from the batch. So a permutation keyed by (seed, view) deals
the data set into pairs, and an epoch shuffles whole pairs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastscarce.augment import neighbours
from fastscarce.augment.philox import keyed_order

__all__ = [
    "DEALING_VERSION",
    "Numbers",
    "dealt_order",
    "epoch_order",
    "occurrences",
    "partner_ids",
    "with_partners",
]

DEALING_VERSION = 1
"""Of the dealing into pairs. Raised where the same ids, seed and view would make other pairs."""

# The counter's words that set these draws apart from a view's.
_DEAL = 0x0DEA100
_SHUFFLE = 0x57EEA30

Numbers = npt.NDArray[np.int64]


def occurrences(ids: Numbers) -> Numbers:
    """How many equal ids come before each one, int64 ``(n,)``: 0 where all are different."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    lengths = np.diff(np.append(starts, ids.size))
    result = np.empty_like(ids)
    result[order] = np.arange(ids.size) - np.repeat(starts, lengths)
    return result


def epoch_order(
    ids: Numbers,
    *,
    seed: int,
    epoch: npt.ArrayLike,
    view: npt.ArrayLike | None = None,
    odd_first: bool = False,
) -> Numbers:
    """Places of ``ids`` in the order of an epoch.

    Args:
        ids: int64 ``(n,)``. Equal ones need different epochs and views.
        seed: Any integer; its low 64 bits count.
        epoch: Number of the epoch, 0 to 2**32 - 1, or one a row.
        view: None: single samples are shuffled. A number, or one a row, int64 ``(n,)``: the samples
            are dealt into pairs by (seed, view), and pairs are shuffled.
        odd_first: Where the sample that is left over stands, if there are pairs: first or last.

    Returns:
        int64 ``(n,)``, a permutation. With a view and an even ``n``, places 2i and 2i + 1 hold
        partners; with an odd one, likewise, but for the one left over that stands before or after.
    """
    if view is None:
        return keyed_order(seed, ids, view=epoch, draw=_SHUFFLE)
    dealt = dealt_order(ids, seed=seed, view=view)
    pairs = dealt[: dealt.size // 2 * 2].reshape(-1, 2)
    heads = pairs[:, 0]
    epochs = np.broadcast_to(np.asarray(epoch, dtype=np.int64), ids.shape)[heads]
    shuffled = pairs[keyed_order(seed, ids[heads], view=epochs, draw=_SHUFFLE)].reshape(-1)
    left = dealt[shuffled.size :]
    return np.concatenate((left, shuffled) if odd_first else (shuffled, left))


def dealt_order(ids: Numbers, *, seed: int, view: npt.ArrayLike) -> Numbers:
    """Places of ``ids`` as they are dealt into pairs: 2i and 2i + 1 of the result are partners.

    Args:
        ids: int64 ``(n,)``, in any order. Equal ones need different views.
        seed: Any integer; its low 64 bits count.
        view: Number of the view, or one a row.

    Returns:
        int64 ``(n,)``, a permutation. The last of an odd number has no partner.
    """
    return keyed_order(seed, ids, view=view, draw=_DEAL)


def with_partners(places: Numbers, partners: Numbers) -> tuple[Numbers, Numbers]:
    """Some rows, and the partners that it takes to draw them.

    Args:
        places: Of the rows, int64 ``(m,)``.
        partners: Place of each row's partner, its own where it has none, int64 ``(n,)``. Two
            partners name each other.

    Returns:
        Places of those rows and then of the partners that are not among them, and for each of these
        the place among them of its partner, both int64 ``(m + others,)``.
    """
    rows = np.concatenate((places, np.setdiff1d(partners[places], places)))
    found, first = np.unique(rows, return_index=True)
    return rows, first[np.searchsorted(found, partners[rows])]


def partner_ids(ids: npt.ArrayLike, *, seed: int, view: int) -> Numbers:
    """Who is mixed into whom in a view, whatever the batches and the processes.

    Args:
        ids: All of the data set, int64 ``(n,)``, each once, in any order.
        seed: The sampler's.
        view: Number of the view, 0 to 2**32 - 1.

    Returns:
        int64 ``(n,)``: the partner's id, and its own for the one left over of an odd number.
    """
    numbers = np.ascontiguousarray(ids, dtype=np.int64)
    dealt = dealt_order(numbers, seed=seed, view=view)
    result = np.empty_like(numbers)
    result[dealt] = numbers[dealt[neighbours(dealt.size)]]
    return result
