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
from fastscarce.cache.shard import Shard, read_shard

__all__ = ["RESIDENCIES", "Residency", "View", "load_view"]

Residency = Literal["device", "pinned", "mmap"]
RESIDENCIES = ("device", "pinned", "mmap")

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """Checked rows of one view.

    Attributes:
        ids: Sorted, each once, int64 ``(rows,)``.
        records: uint8 ``(rows, stride)`` in the order of ``ids``: on the device, or in pinned
            memory. Empty where the rows are mapped.
        shards: Mapped records, in the order of their lowest ids.
        place: Of each id where rows are mapped: ``(rows, 2)``, shard and row in it.
        device: Where rows are given.
        layout: Of the rows.
        lookup: Of ids.
    """

    ids: Ids
    records: Tensor
    shards: tuple[npt.NDArray[np.uint8], ...]
    place: Ids
    device: torch.device
    layout: Layout
    lookup: Lookup

    def find(self, ids: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Where each id's row is, and whether there is one; the place of one that isn't is 0."""
        return self.lookup(ids)

    def take(self, places: Ids) -> Tensor:
        """Records at places that `find` gave, uint8 ``(rows, stride)`` on the device."""
        if self.shards:
            return torch.from_numpy(self._take_mapped(places)).to(self.device)
        if self.records.device.type == "cpu":
            # NumPy gathers rows of odd lengths faster than PyTorch.
            chosen = torch.from_numpy(np.take(self.records.numpy(), places, axis=0, mode="clip"))
            if self.device.type == "cpu":
                return chosen
            return chosen.pin_memory().to(self.device, non_blocking=True)
        index = torch.from_numpy(places).to(self.device, non_blocking=True)
        return self.records.index_select(0, index)

    def _take_mapped(self, places: Ids) -> npt.NDArray[np.uint8]:
        out = np.empty((len(places), self.layout.stride), dtype=np.uint8)
        if len(self.shards) == 1:
            np.take(self.shards[0], self.place[places, 1], axis=0, out=out, mode="clip")
            return out
        # Sorted, so that each shard is asked once, for rows that lie one after the other.
        order = np.argsort(places)
        where = self.place[places[order]]
        ends = np.searchsorted(where[:, 0], np.arange(len(self.shards)), side="right")
        ordered, rows, begin = np.empty_like(out), where[:, 1], 0
        for shard, end in zip(self.shards, ends.tolist(), strict=True):
            if end > begin:
                np.take(shard, rows[begin:end], axis=0, out=ordered[begin:end], mode="clip")
                begin = end
        out[order] = ordered
        return out


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
        empty = np.zeros((0, 2), dtype=np.int64)
        records = torch.empty((0, layout.stride), dtype=torch.uint8, device=device)
        return View(empty[:, 0], records, (), empty, device, layout, Lookup.of(empty[:, 0]))
    everything = np.concatenate([shard.ids for shard in shards])
    if bool((everything[1:] > everything[:-1]).all()):  # as one process writes them
        ids, first = everything, np.arange(len(everything), dtype=np.int64)
    else:
        ids, first = np.unique(everything, return_index=True)
    if mapped:
        return _mapped(ids, first, shards, device, layout)
    records = torch.cat([shard.records for shard in shards])
    if ids is not everything:
        records = records[torch.from_numpy(first)]
    if residency == "device":
        records = records.to(device)
    elif torch.cuda.is_available():
        records = records.pin_memory()
    place = np.zeros((0, 2), dtype=np.int64)
    return View(ids, records, (), place, device, layout, Lookup.of(ids))


def _mapped(
    ids: Ids, first: Ids, shards: Sequence[Shard], device: torch.device, layout: Layout
) -> View:
    starts = np.cumsum([0, *(len(shard.ids) for shard in shards)])
    number = np.searchsorted(starts, first, side="right") - 1
    place = np.stack([number, first - starts[number]], axis=1)
    records = torch.empty((0, layout.stride), dtype=torch.uint8)
    mapped = tuple(shard.records.numpy() for shard in shards)
    return View(ids, records, mapped, place, device, layout, Lookup.of(ids))
