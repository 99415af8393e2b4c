"""Shards: safetensors files of rows of one view, written whole and checked before they are used."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastscarce.cache.checksum import checksum, seal, unseal
from fastscarce.cache.journal import Journal, Line
from fastscarce.cache.record import Layout
from fastscarce.errors import CacheError
from fastscarce.files import flush, write_whole

__all__ = ["NewerError", "ShardWriter", "read_shard", "recover", "rows_held", "view_folder"]

VERSION = 1
"""Of the files' layout: a reader refuses a newer one."""

ROWS = 65536
_CURE = "`fastscarce cache gc` drops it, and `cache build` makes its rows again"

Ids = npt.NDArray[np.int64]
Summary = Callable[[int, Ids, npt.NDArray[np.uint8]], tuple[dict[str, float], list[list[Any]]]]


class NewerError(CacheError):
    """A file of a newer version, which is not damaged: it is never dropped."""


def view_folder(view: int) -> str:
    """Name of the folder of a view's shards."""
    return f"view-{view:05d}"


class ShardWriter:
    """Collects rows and writes a shard when one is full.

    A process that dies loses the rows since the last whole shard: one is written beside its place,
    flushed to the disk and renamed, the folder flushed, and then its line is appended to the
    journal. A shard says of itself what its line says, so that `recover` can make up for the line.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        fingerprint: str,
        writer: str,
        rows: int = ROWS,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._fingerprint = fingerprint
        self._writer = writer
        self._journal = Journal(folder, writer)
        self._records = np.empty((rows, layout.stride), dtype=np.uint8)
        self._ids = np.empty(rows, dtype=np.int64)
        self._view = 0
        self._filled = 0
        self._sums: dict[str, float] = {}
        self._sentinels: list[list[Any]] = []
        self._numbers: dict[int, int] = {}
        self.written = 0
        """Rows in shards that are there for good."""
        self.summarise: Summary | None = None
        """Gives a shard's sums and sentinels from its view, ids and records; before it is written,
        so that what it refuses is not."""

    @property
    def capacity(self) -> int:
        """Rows of a full shard."""
        return len(self._ids)

    def add(
        self,
        view: int,
        ids: Ids,
        records: npt.NDArray[np.uint8],
        sums: Mapping[str, float] | None = None,
        sentinels: list[list[Any]] | None = None,
    ) -> None:
        """Add rows of a view; they are not cut apart by the end of a shard.

        Args:
            view: Of all of them.
            ids: int64 ``(rows,)``.
            records: uint8 ``(rows, stride)``.
            sums: Of the rows, see `Line`.
            sentinels: Of the rows, see `Line`.

        Raises:
            ValueError: There are more rows than a shard has.
            ResultsError: A shard can't be written.
        """
        count, capacity = len(ids), len(self._ids)
        if count > capacity:
            raise ValueError(f"ShardWriter needs at most {capacity} rows at a time, got {count}.")
        if self._filled and (view != self._view or self._filled + count > capacity):
            self.flush()
        self._view = view
        place = slice(self._filled, self._filled + count)
        self._records[place] = records
        self._ids[place] = ids
        self._filled += count
        for name, value in (sums or {}).items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._sentinels += sentinels or []
        if self._filled == capacity:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected as a shard.

        Raises:
            ResultsError: It can't be written; the shards before it are whole.
        """
        if self._filled == 0:
            return
        layout, count = self._layout, self._filled
        ids, records = self._ids[:count], self._records[:count]
        if self.summarise is not None:
            self._sums, self._sentinels = self.summarise(self._view, ids, records)
        said: dict[str, Any] = {
            "view": self._view,
            "rows": count,
            "first_id": int(ids.min()),
            "last_id": int(ids.max()),
            "sums": self._sums,
            "sentinels": self._sentinels,
        }
        content = safetensors.numpy.save(
            {"record": records, "sample_id": ids},
            metadata={
                "version": str(VERSION),
                "fingerprint": self._fingerprint,
                "view": str(self._view),
                "rows": str(count),
                "classes": str(layout.classes),
                "k": str(layout.k),
                "codec": layout.codec,
                "tagged": str(layout.tagged).lower(),
                "line": seal({**said, "payload": _payload(records, ids)}),
            },
        )
        name = self._next_name()
        place = self._folder / view_folder(self._view)
        if not place.exists():
            place.mkdir(exist_ok=True)
            flush(self._folder)
        write_whole(self._folder / name, lambda place: place.write_bytes(content))
        self._journal.append(Line(name, size=len(content), checksum=checksum(content), **said))
        self.written += count
        self._filled, self._sums, self._sentinels = 0, {}, []

    def _next_name(self) -> str:
        folder = self._folder / view_folder(self._view)
        number = self._numbers.get(self._view)
        if number is None:
            taken = [
                int(path.stem.rsplit("-", 1)[1])
                for path in folder.glob(f"{self._writer}-*.safetensors")
            ]
            number = max(taken, default=-1) + 1
        self._numbers[self._view] = number + 1
        return f"{view_folder(self._view)}/{self._writer}-{number:05d}.safetensors"


@dataclass(frozen=True)
class Shard:
    """Checked rows: ``records`` uint8 ``(rows, stride)``, ``ids`` int64 ``(rows,)``."""

    records: Tensor
    ids: Ids


def read_shard(
    folder: Path, line: Line, layout: Layout, fingerprint: str, *, mapped: bool = False
) -> Shard:
    """The rows of a shard, its checksum verified.

    Args:
        folder: Of the table.
        line: Of the shard.
        layout: Of the table.
        fingerprint: Of the table.
        mapped: Leave the records in the file, mapped into memory. Otherwise they are read.

    Raises:
        CacheError: The shard is missing, cut short, changed, of another table or of a newer
            version.
    """
    path = folder / line.shard
    try:
        size = path.stat().st_size
        if size != line.size:
            raise CacheError(
                f"{path} has {size} bytes where {line.size} were written: it was cut short or "
                f"added to; {_CURE}."
            )
        content = b"" if mapped else path.read_bytes()
        if (_checksum_of(path) if mapped else checksum(content)) != line.checksum:
            raise CacheError(f"{path} is damaged: its checksum does not match; {_CURE}.")
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            _check_facts(path, facts, line, layout, fingerprint)
            ids = file.get_tensor("sample_id").numpy().copy()
            records = file.get_tensor("record") if mapped else None
        if records is None:
            records = safetensors.torch.load(content)["record"]
    except OSError as error:
        raise CacheError(f"{path} can't be read ({error.strerror or error}); {_CURE}.") from error
    except (SafetensorError, KeyError) as error:
        raise CacheError(f"{path} is no shard ({error}); {_CURE}.") from error
    if records.dtype != torch.uint8 or records.shape != (len(ids), layout.stride):
        raise CacheError(f"{path} holds rows of another length; {_CURE}.")
    return Shard(records, ids)


def recover(path: Path, layout: Layout, fingerprint: str) -> tuple[Line, Ids]:
    """The line of a shard whose process died before it wrote one, and the shard's ids.

    Args:
        path: Of the shard.
        layout: Of the table.
        fingerprint: Of the table.

    Raises:
        CacheError: The shard is not whole, of another table or of a newer version.
    """
    try:
        content = path.read_bytes()
        with safe_open(path, framework="np") as file:
            facts = file.metadata() or {}
        said = unseal(facts["line"])
        tensors = safetensors.numpy.load(content)
        records, ids = tensors["record"], tensors["sample_id"]
        payload = said.pop("payload")
        line = Line(
            f"{path.parent.name}/{path.name}", size=len(content), checksum=checksum(content), **said
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} is no whole shard ({error}).") from error
    _check_facts(path, facts, line, layout, fingerprint)
    whole = payload == _payload(records, ids) and records.shape == (line.rows, layout.stride)
    if not whole or path.parent.name != view_folder(line.view):
        raise CacheError(f"{path} is no whole shard (its checksum does not match).")
    return line, ids


def rows_held(folder: Path, lines: Sequence[Line]) -> int:
    """How many different samples some shards of one view have; shards are not checked.

    Raises:
        CacheError: A shard that has to be looked into can't be read.
    """
    ordered = sorted(lines, key=lambda line: line.first_id)
    apart = all(a.last_id < b.first_id for a, b in itertools.pairwise(ordered))
    if apart:
        return sum(line.rows for line in lines)
    ids = []
    for line in lines:
        path = folder / line.shard
        try:
            with safe_open(path, framework="np") as file:
                ids.append(file.get_tensor("sample_id"))
        except (OSError, SafetensorError) as error:
            raise CacheError(f"{path} can't be read ({error}); {_CURE}.") from error
    return len(np.unique(np.concatenate(ids)))


def _payload(records: npt.NDArray[np.uint8], ids: Ids) -> str:
    """Checksum of a shard's numbers alone, which the shard itself can carry."""
    return checksum((checksum(records) + checksum(ids)).encode())


def _checksum_of(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return checksum(content)


def _check_facts(
    path: Path, facts: Mapping[str, str], line: Line, layout: Layout, fingerprint: str
) -> None:
    version = int(facts.get("version", "0"))
    if version > VERSION:
        raise NewerError(
            f"{path} was written by a newer fastscarce (layout {version}, this one reads up to "
            f"{VERSION}); update fastscarce."
        )
    expected = {
        "fingerprint": fingerprint,
        "view": str(line.view),
        "rows": str(line.rows),
        "classes": str(layout.classes),
        "k": str(layout.k),
        "codec": layout.codec,
        "tagged": str(layout.tagged).lower(),
    }
    for name, value in expected.items():
        if facts.get(name) != value:
            raise CacheError(
                f"{path} is a shard of another table: its {name} is {facts.get(name)}, not "
                f"{value}; {_CURE}."
            )
