"""Places of ids in a sorted list: a table of buckets, then a search among the few ids of one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["Lookup"]

Ids = npt.NDArray[np.int64]
_NOT_THERE = np.int64(-1)


@njit(cache=True)
def _find(wanted, ids, starts, first, shift, places):  # type: ignore[no-untyped-def]
    buckets = np.uint64(starts.shape[0] - 1)
    for row in range(wanted.shape[0]):
        number = wanted[row]
        places[row] = _NOT_THERE
        bucket = (np.uint64(number) - np.uint64(first)) >> shift
        if bucket >= buckets:
            continue
        low, high = starts[bucket], starts[bucket + np.uint64(1)]
        while low < high:
            middle = (low + high) // 2
            if ids[middle] < number:
                low = middle + 1
            else:
                high = middle
        if low < ids.shape[0] and ids[low] == number:
            places[row] = low


@dataclass(frozen=True)
class Lookup:
    """Finds ids among ``ids``, which are sorted and come once each, int64 ``(rows,)``.

    Hashed ids spread evenly over the buckets, so that one memory access finds most; numbers without
    a gap have a bucket each.
    """

    ids: Ids
    starts: Ids
    shift: int

    @classmethod
    def of(cls, ids: Ids) -> Lookup:
        """Make the table of buckets, at most four a row."""
        if len(ids) == 0:
            return cls(ids, np.zeros(1, dtype=np.int64), 0)
        span = int(ids[-1]) - int(ids[0])
        shift = max(0, span.bit_length() - (2 * len(ids)).bit_length())
        number = (ids - ids[0]).view(np.uint64) >> np.uint64(shift)
        counts = np.bincount(number.astype(np.int64), minlength=(span >> shift) + 1)
        return cls(ids, np.concatenate([[0], np.cumsum(counts)]), shift)

    def __call__(self, wanted: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Place of each id, 0 for one that is not there, and whether it is."""
        places = np.empty(len(wanted), dtype=np.int64)
        first = self.ids[0] if len(self.ids) else np.int64(0)
        _find(wanted, self.ids, self.starts, first, np.uint64(self.shift), places)
        found = places >= 0
        return np.maximum(places, 0), found
