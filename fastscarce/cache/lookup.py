"""Rows by sample id: a table of buckets, then a search among the few ids of one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce import _ops  # noqa: F401  loads the kernel

__all__ = ["Lookup"]

Ids = npt.NDArray[np.int64]

_table_places = torch.ops.fastscarce.table_places.default
_table_rows = torch.ops.fastscarce.table_rows.default


@dataclass(frozen=True)
class Lookup:
    """Finds ids among ``ids``, which are sorted and come once each, int64 ``(rows,)``.

    Hashed ids spread evenly over the buckets, so that one memory access finds most; numbers without
    a gap have a bucket each.
    """

    ids: Tensor
    starts: Tensor
    shift: int

    @classmethod
    def of(cls, ids: Ids) -> Lookup:
        """Make the table of buckets, at most four a row."""
        if len(ids) == 0:
            return cls(torch.from_numpy(ids), torch.zeros(1, dtype=torch.int32), 0)
        span = int(ids[-1]) - int(ids[0])
        shift = max(0, span.bit_length() - (2 * len(ids)).bit_length())
        number = (ids - ids[0]).view(np.uint64) >> np.uint64(shift)
        starts = np.zeros((span >> shift) + 2, dtype=np.int32)
        np.cumsum(np.bincount(number.astype(np.int64), minlength=len(starts) - 1), out=starts[1:])
        return cls(torch.from_numpy(ids), torch.from_numpy(starts), shift)

    def places(self, wanted: Tensor, order: Tensor | None = None) -> tuple[Tensor, int]:
        """Where rows are.

        Args:
            wanted: Sample ids, int64 ``(rows,)``.
            order: Place of the row of each of the sorted ids, int64 ``(ids,)``. None: they are in
                the ids' order.

        Returns:
            int64 ``(rows,)``, -1 of an id that is not there, and how many are not.
        """
        found: tuple[Tensor, int] = _table_places(wanted, self.ids, self.starts, self.shift, order)
        return found

    def rows(
        self, wanted: Tensor, shards: list[Tensor], order: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Rows in host memory, found and gathered in one pass.

        Args:
            wanted: As of `places`.
            shards: Uint8 ``(rows, stride)`` each, one or more, one after the other.
            order: As of `places`, among the rows of all shards.

        Returns:
            uint8 ``(rows, stride)``, zeros for an id that is not there, and how many are not.
        """
        found: tuple[Tensor, int] = _table_rows(
            wanted, self.ids, self.starts, self.shift, order, shards
        )
        return found
