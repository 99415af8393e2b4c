"""The teacher's table as a reader sees it: rows by sample id and view."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.cache.fingerprint import differing, listed, not_allowed, require_same, unexpected
from fastscarce.cache.journal import Line, journals, read_journal
from fastscarce.cache.manifest import find_tables, only_table, read_manifest, read_samples
from fastscarce.cache.record import Layout, decode, tags_of
from fastscarce.cache.shard import rows_held
from fastscarce.cache.view import RESIDENCIES, Residency, View, load_view
from fastscarce.data.images import free_memory
from fastscarce.errors import CacheError
from fastscarce.ops import TopK

__all__ = ["TeacherTable"]

# Of free memory, what resident views may take.
_SHARE = 4
# Those of a batch that spans the end of an epoch, and the next.
_LEAST_VIEWS = 3

Ids = npt.NDArray[np.int64]

_NONE: Ids = np.zeros(0, dtype=np.int64)
_NONE.flags.writeable = False


class TeacherTable:
    """What a teacher says of each (sample, view); made by `open`.

    Attributes:
        folder: Of the table.
        manifest: What it is of.
        lines: Of the shards that are there, in the order of journals and lines.
        residency: Where a view's rows are kept: ``device``, ``pinned`` memory, or ``mmap``.
    """

    def __init__(
        self, folder: Path, device: torch.device, residency: Residency | Literal["auto"]
    ) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.lines = _lines(folder)
        self._device = device
        self._ids: Ids | None = None
        self._views: OrderedDict[int, View] = OrderedDict()
        self._coming: dict[int, Future[View]] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="teacher-table")
        view_bytes = max(1, self.manifest.rows * self.layout.stride)
        budget = _memory(device) // _SHARE
        if residency == "auto":
            fits = min(_LEAST_VIEWS, self.manifest.views) * view_bytes <= budget
            residency = "device" if fits else self._beside_the_device(view_bytes)
        self.residency: Residency = residency
        self._kept = max(_LEAST_VIEWS, budget // view_bytes)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        residency: Residency | Literal["auto"] = "auto",
        expect: dict[str, Any] | None = None,
        allow_mismatch: Sequence[str] = (),
    ) -> TeacherTable:
        """Open a table for reading; nothing is written, also not to its folder.

        Args:
            path: A table's folder, or one that holds tables: then the one that is as expected.
            device: Where rows are given.
            residency: Where a view's rows are kept. ``auto``: on the device where they fit in a
                quarter of its free memory, else in pinned memory (of a GPU), else in the files.
            expect: Parts of a fingerprint that the table has to have, see fingerprint.py.
            allow_mismatch: Keys of it that may differ, or parts with all that is in them.

        Raises:
            CacheError: There is no table, it is damaged, of a newer version or was made of
                something else than expected.
            ValueError: ``residency`` is unknown.
        """
        if residency != "auto" and residency not in RESIDENCIES:
            raise ValueError(
                f"open needs residency auto, {', '.join(RESIDENCIES)}, got {residency!r}."
            )
        folder = _chosen(Path(path).expanduser(), expect, allow_mismatch)
        return cls(folder, torch.device(device), residency)

    @property
    def layout(self) -> Layout:
        """Of the rows."""
        return self.manifest.layout

    @property
    def views(self) -> int:
        """How many views the table is to have, numbered from 0."""
        return self.manifest.views

    @property
    def ids(self) -> Ids:
        """Of the samples of each view, sorted, int64 ``(rows,)``."""
        if self._ids is None:
            self._ids = read_samples(self.folder, self.manifest)
        return self._ids

    def missing(self) -> int:
        """Rows that the table is to have and has not, over all views."""
        held: dict[int, list[Line]] = {}
        for line in self.lines:
            held.setdefault(line.view, []).append(line)
        return sum(
            self.manifest.rows - rows_held(self.folder, held.get(view, []))
            for view in range(self.views)
        )

    def sentinels(self, view: int) -> list[tuple[int, str, int]]:
        """Sample id, hash of the view's pixels and the teacher's first class, of a few samples."""
        return [
            (int(number), str(pixels), int(first))
            for line in self.lines
            if line.view == view
            for number, pixels, first in line.sentinels
        ]

    def set_view(self, view: int) -> None:
        """Load a view and have the next one loaded in the background.

        Raises:
            CacheError: A shard of the view is missing or damaged.
            ValueError: There is no such view.
        """
        self._view(view)

    def rows(self, sample_ids: npt.ArrayLike | Tensor, view: int | npt.ArrayLike) -> TopK:
        """What the teacher says of samples.

        Args:
            sample_ids: int64 ``(rows,)``.
            view: Of all of them, or one a row.

        Returns:
            `TopK` of as many rows, on the table's device.

        Raises:
            CacheError: Rows are missing; says how many. Or a shard is missing or damaged.
            ValueError: There is no such view, or not one a row.
        """
        records, lacking = self.records(sample_ids, view)
        if len(lacking):
            raise CacheError(
                f"{self.folder} lacks {len(lacking)} of the {len(records)} rows asked for; run the "
                "same `fastscarce cache build` again to fill it, or give the teacher, which says "
                "what is missing."
            )
        return decode(records, self.layout)

    def records(
        self, sample_ids: npt.ArrayLike | Tensor, view: int | npt.ArrayLike
    ) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Rows as bytes, and which of those asked for are not there.

        Arguments and errors as of `rows`.

        Returns:
            uint8 ``(rows, stride)`` on the device, and places among them, int64, of rows that are
            not there, which hold anything.
        """
        if isinstance(sample_ids, Tensor):
            ids = sample_ids.to("cpu", torch.int64).contiguous()
        else:
            content = np.ascontiguousarray(sample_ids, dtype=np.int64)
            # PyTorch warns of memory that can't be written, which nobody does here.
            ids = torch.from_numpy(content if content.flags.writeable else content.copy())
        if isinstance(view, int) and ids.dim() == 1:
            return self._of_view(ids, view)
        wanted = np.asarray(view, dtype=np.int64)
        if ids.dim() != 1 or wanted.shape not in ((), (len(ids),)):
            raise ValueError(
                "rows needs sample_ids (rows,) and one view or one a row, got "
                f"{tuple(ids.shape)} and {wanted.shape}."
            )
        numbers = np.unique(wanted).tolist() or [0]
        if len(numbers) == 1:
            return self._of_view(ids, numbers[0])
        shape = (len(ids), self.layout.stride)
        records = torch.empty(shape, dtype=torch.uint8, device=self._device)
        lacking = []
        for number in numbers:
            here = np.flatnonzero(wanted == number)
            index = torch.from_numpy(here)
            part, without = self._of_view(ids[index], number)
            records[index.to(self._device)] = part
            lacking.append(here[without])
        return records, np.sort(np.concatenate(lacking))

    def tags(self, records: Tensor) -> Tensor | None:
        """The tags of rows that `records` gave, where the table has them."""
        return tags_of(records, self.layout)

    def close(self) -> None:
        """Let go of rows and of the thread that loads them."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()
        self._views.clear()

    def __enter__(self) -> TeacherTable:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _of_view(self, ids: Tensor, number: int) -> tuple[Tensor, Ids]:
        view = self._view(number)
        records, missing = view.rows(ids)
        return records, view.lacking(ids) if missing else _NONE

    def _view(self, number: int) -> View:
        view = self._views.get(number)
        if view is None:
            if not 0 <= number < self.views:
                raise ValueError(
                    f"The table {self.folder} has views 0 to {self.views - 1}, got {number}."
                )
            coming = self._coming.pop(number, None)
            view = self._load(number) if coming is None else coming.result()
            self._views[number] = view
            while len(self._views) > self._kept:
                self._views.popitem(last=False)
            self._prefetch((number + 1) % self.views)
        self._views.move_to_end(number)
        return view

    def _prefetch(self, number: int) -> None:
        if number not in self._views and number not in self._coming:
            self._coming[number] = self._loader.submit(self._load, number)

    def _load(self, number: int) -> View:
        try:
            return self._loaded(number)
        except CacheError:
            # The shards may have been joined since the table was opened.
            lines = _lines(self.folder)
            if lines == self.lines:
                raise
            self.lines = lines
            return self._loaded(number)

    def _loaded(self, number: int) -> View:
        return load_view(
            self.folder,
            [line for line in self.lines if line.view == number],
            self.layout,
            self.manifest.fingerprint,
            device=self._device,
            residency=self.residency,
        )

    def _beside_the_device(self, view_bytes: int) -> Residency:
        if self._device.type == "cpu":
            return "mmap"
        host = (free_memory() or 0) // _SHARE
        return "pinned" if _LEAST_VIEWS * view_bytes <= host else "mmap"


def _lines(folder: Path) -> list[Line]:
    return [line for path in journals(folder) for line in read_journal(path)]


def _memory(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory() or 0


def _chosen(path: Path, expect: dict[str, Any] | None, allow: Iterable[str]) -> Path:
    """The folder of the table at ``path`` that is as expected."""
    found = find_tables(path)
    if expect is None or not found:
        return only_table(path, found)
    allowed = tuple(allow)
    manifests = {folder: read_manifest(folder) for folder in found}

    def odd(folder: Path) -> list[str]:
        return not_allowed(unexpected(expect, manifests[folder].content), allowed)

    fitting = [folder for folder in found if not odd(folder)]
    if len(fitting) > 1:
        keys = differing(manifests[fitting[0]].content, manifests[fitting[1]].content)
        names = ", ".join(str(folder) for folder in fitting)
        raise CacheError(
            f"{path} holds {len(fitting)} tables that fit, which differ in {listed(keys)}; name "
            f"one of {names}."
        )
    # Where none fits, the nearest one's keys say why.
    folder = fitting[0] if fitting else min(found, key=lambda one: len(odd(one)))
    require_same(expect, manifests[folder].content, where=str(folder), allow=allowed)
    return folder
