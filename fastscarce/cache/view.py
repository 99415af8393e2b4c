"""The rows of one view in memory, found by sample id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.cache.journal import Line
from fastscarce.cache.lookup import Lookup
from fastscarce.cache.record import Layout
from fastscarce.cache.shard import read_shard

__all__ = ["RESIDENCIES", "Residency", "View", "load_view"]

Residency = Literal["device", "pinned", "mmap"]
RESIDENCIES = ("device", "pinned", "mmap")

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """Checked rows of one view.

    Attributes:
        lookup: Of ids.
        shards: Rows in host memory, one shard after the other, uint8 ``(rows, stride)`` each:
            pinned, or mapped from files. None where they are on a device.
        order: Place among all shards' rows of each of the sorted ids, int64 ``(rows,)``. None: they
            are in the ids' order.
        resident: Rows on another device than the CPU, in the ids' order.
        device: Where rows are given.
    """

    lookup: Lookup
    shards: list[Tensor]
    order: Tensor | None
    resident: Tensor | None
    device: torch.device

    @classmethod
    def of(cls, ids: Ids, records: Tensor, device: torch.device) -> View:
        """Rows that are kept where ``records`` lie, in the order of the sorted ``ids``."""
        # A device gathers no rows of none.
        if records.device.type == "cpu" or len(ids) == 0:
            return cls(Lookup.of(ids), [records.cpu()], None, None, device)
        return cls(Lookup.of(ids), [], None, records, device)

    def rows(self, ids: Tensor) -> tuple[Tensor, int]:
        """Rows by sample id.

        Args:
            ids: int64 ``(rows,)``, on the CPU.

        Returns:
            uint8 ``(rows, stride)`` on the device, where a row that is not there holds anything,
            and how many are not.
        """
        if self.resident is not None:
            places, missing = self.lookup.places(ids)
            index = places.clamp(min=0).to(self.device, non_blocking=True)
            return self.resident.index_select(0, index), missing
        records, missing = self.lookup.rows(ids, self.shards, self.order)
        if self.device.type != "cpu":
            records = records.pin_memory().to(self.device, non_blocking=True)
        return records, missing

    def lacking(self, ids: Tensor) -> Ids:
        """Which of some ids have no row: places among them, int64."""
        places, _ = self.lookup.places(ids)
        return np.flatnonzero(places.numpy() < 0)


def load_view(
    folder: Path,
    lines: Sequence[Line],
    layout: Layout,
    fingerprint: str,
    *,
    device: torch.device,
    residency: Residency,
) -> View:
    """Read a view's shards and verify their checksums; of a row that is there twice the first wins.

    Raises:
        CacheError: A shard is missing, damaged or of another table.
    """
    mapped = residency == "mmap"
    # By their ids: where each shard has a range of its own, sorted places are sorted by shard.
    ordered = sorted(lines, key=lambda line: (line.first_id, line.shard))
    shards = [read_shard(folder, line, layout, fingerprint, mapped=mapped) for line in ordered]
    if not shards:
        empty = torch.empty((0, layout.stride), dtype=torch.uint8)
        return View.of(np.zeros(0, dtype=np.int64), empty, device)
    everything = np.concatenate([shard.ids for shard in shards])
    order = None
    if bool((everything[1:] > everything[:-1]).all()):  # as one process writes them
        ids = everything
    else:
        ids, first = np.unique(everything, return_index=True)
        order = torch.from_numpy(first)
    parts = [shard.records for shard in shards]
    if mapped:
        return View(Lookup.of(ids), parts, order, None, device)
    # NumPy's large arrays lie in huge pages: a row in a small one costs a look-up of its address.
    records = torch.from_numpy(np.empty((len(everything), layout.stride), dtype=np.uint8))
    torch.cat(parts, out=records)
    if order is not None:
        records = torch.from_numpy(records.numpy()[order.numpy()])
    if residency == "device":
        records = records.to(device)
    elif torch.cuda.is_available():
        records = records.pin_memory()
    return View.of(ids, records, device)
