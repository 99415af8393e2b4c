"""Keeping a table in order: what a dead process left, what is damaged, and many small shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastscarce.cache.journal import Journal, Line, journals, read_journal, rewrite_journal
from fastscarce.cache.manifest import Manifest, locked, only_table, read_manifest
from fastscarce.cache.shard import (
    ROWS,
    NewerError,
    Shard,
    ShardWriter,
    read_shard,
    recover,
    view_folder,
)
from fastscarce.errors import CacheError

__all__ = ["adopt_own", "compact", "gc", "repair"]

_JOINED = "compact"


def repair(folder: Path, manifest: Manifest) -> list[str]:
    """Adopt whole shards without a line, and drop half shards, damaged shards and damaged lines.

    The rows of a damaged shard are missing afterwards, and `build` makes them again. The caller
    holds the table's lock, under which nobody writes shards; manifests may be written.

    Returns:
        A sentence for each thing that was adopted or dropped.

    Raises:
        CacheError: A shard is of a newer version.
    """
    said: list[str] = []
    named = set()
    for path in journals(folder):
        damage: list[str] = []
        lines = read_journal(path, damage)
        sound = []
        for line in lines:
            try:
                read_shard(folder, line, manifest.layout, manifest.fingerprint, mapped=True)
            except NewerError:
                raise
            except CacheError as error:
                damage.append(str(error).split(";")[0])
                continue
            sound.append(line)
            named.add(folder / line.shard)
        if damage:
            rewrite_journal(path, sound)
            said += [f"dropped: {text}" for text in damage]
    for path in _halves(folder):
        path.unlink()
        said.append(f"removed {path}")
    for path in _strangers(folder, named):
        if adopt(folder, manifest, path):
            said.append(f"adopted {path}")
        else:
            path.unlink()
            said.append(f"removed {path}")
    return said


def adopt_own(folder: Path, manifest: Manifest, writer: str) -> None:
    """Adopt the whole shards that an earlier process of this number left without a line.

    Others may be writing; the caller holds this writer's lock.
    """
    path = folder / f"{writer}.journal"
    named = {folder / line.shard for line in read_journal(path)} if path.exists() else set()
    for stranger in _strangers(folder, named, writer):
        adopt(folder, manifest, stranger)


def adopt(folder: Path, manifest: Manifest, path: Path) -> bool:
    """Write the line of a whole shard that has none, unless all of its rows are there without it.

    Returns:
        Whether it has a line now.

    Raises:
        CacheError: The shard is of a newer version.
    """
    try:
        line, ids = recover(path, manifest.layout, manifest.fingerprint)
    except NewerError:
        raise
    except CacheError:
        return False
    held = [
        read_shard(folder, other, manifest.layout, manifest.fingerprint, mapped=True).ids
        for journal in journals(folder)
        for other in read_journal(journal)
        if other.view == line.view
        and other.first_id <= line.last_id
        and other.last_id >= line.first_id
    ]
    if held and bool(np.isin(ids, np.concatenate(held)).all()):
        return False  # of a process that joined shards and died before it removed the old ones
    Journal(folder, path.stem.rsplit("-", 1)[0]).append(line)
    return True


def gc(path: str | Path) -> list[str]:
    """Adopt what a dead process left whole and drop what counts for nothing, see `repair`.

    Args:
        path: Of the table.

    Returns:
        A sentence for each thing that was adopted or dropped.

    Raises:
        CacheError: There is no table, it is being written, or a part of it is of a newer version.
    """
    folder = only_table(Path(path).expanduser())
    manifest = read_manifest(folder)
    with locked(folder, "table"):
        return repair(folder, manifest)


def compact(path: str | Path, *, rows_per_shard: int = ROWS) -> tuple[int, int]:
    """Join the shards of each view into full ones, sorted by id, each row once.

    The old shards go when the new ones are there: whenever the process dies, every row is.

    Args:
        path: Of the table.
        rows_per_shard: Rows of a full shard.

    Returns:
        How many shards there were, and how many there are.

    Raises:
        CacheError: There is no table, it is being written, or a shard is damaged.
        ValueError: ``rows_per_shard`` is below 1.
    """
    if rows_per_shard < 1:
        raise ValueError(f"compact needs rows_per_shard of at least 1, got {rows_per_shard}.")
    folder = only_table(Path(path).expanduser())
    manifest = read_manifest(folder)
    with locked(folder, "table"):
        old = {path: read_journal(path) for path in journals(folder)}
        lines = [line for found in old.values() for line in found]
        writer = ShardWriter(
            folder,
            manifest.layout,
            fingerprint=manifest.fingerprint,
            writer=_JOINED,
            rows=rows_per_shard,
        )
        for view in sorted({line.view for line in lines}):
            _join(folder, manifest, writer, [line for line in lines if line.view == view])
        writer.flush()
        for path, found in old.items():
            before = {line.shard for line in found}
            rewrite_journal(path, [x for x in read_journal(path) if x.shard not in before])
        for line in lines:
            (folder / line.shard).unlink()
        left = sum(len(read_journal(path)) for path in journals(folder))
    return len(lines), left


def _join(folder: Path, manifest: Manifest, writer: ShardWriter, lines: list[Line]) -> None:
    shards: list[Shard] = [
        read_shard(folder, line, manifest.layout, manifest.fingerprint, mapped=True)
        for line in lines
    ]
    ids, first = np.unique(np.concatenate([shard.ids for shard in shards]), return_index=True)
    records = np.concatenate([shard.records.numpy() for shard in shards])
    view = lines[0].view
    remembered = {entry[0]: entry for line in lines for entry in line.sentinels}
    # Sums are known a shard and not a row: each piece gets its part of the view's.
    total = {name: sum(x.sums.get(name, 0.0) for x in lines) for x in lines for name in x.sums}
    held = sum(line.rows for line in lines)
    for start in range(0, len(ids), writer.capacity):
        part = slice(start, start + writer.capacity)
        here = ids[part]
        writer.add(
            view,
            here,
            records[first[part]],
            {name: value * len(here) / held for name, value in total.items()},
            [remembered[number] for number in here.tolist() if number in remembered],
        )
    writer.flush()


def _view_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{view_folder(0)[:5]}*") if path.is_dir())


def _halves(folder: Path) -> list[Path]:
    """Files that were being written."""
    shards = [path for place in _view_folders(folder) for path in sorted(place.glob(".*.tmp"))]
    return [*sorted(folder.glob(".*.journal.*.tmp")), *shards]


def _strangers(folder: Path, named: set[Path], writer: str = "*") -> list[Path]:
    """Shards of a writer, or of all, that no journal names."""
    return [
        path
        for place in _view_folders(folder)
        for path in sorted(place.glob(f"{writer}-*.safetensors"))
        if path not in named
    ]
