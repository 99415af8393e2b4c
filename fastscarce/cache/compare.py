"""What a table is, how two differ, and its rows for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fastscarce.cache.fingerprint import differing
from fastscarce.cache.manifest import only_table
from fastscarce.cache.record import Layout, decode
from fastscarce.cache.table import TeacherTable
from fastscarce.files import write_whole

__all__ = ["Difference", "diff", "export_parquet", "info"]

_PIECE = 4096


def info(path: str | Path) -> dict[str, Any]:
    """What a table is of and how much of it is there, as plain data.

    Raises:
        CacheError: There is no table, or its manifest or a journal is damaged.
    """
    with TeacherTable.open(only_table(Path(path).expanduser()), residency="mmap") as table:
        manifest, layout = table.manifest, table.layout
        return {
            "folder": str(table.folder),
            "fingerprint": manifest.fingerprint,
            "samples": manifest.rows,
            "views": manifest.views,
            "classes": layout.classes,
            "k": layout.k,
            "codec": layout.codec,
            "bytes_per_row": layout.stride,
            "bytes": sum(line.size for line in table.lines),
            "shards": len(table.lines),
            "missing": table.missing(),
            "quality": manifest.quality,
            "versions": manifest.versions,
            "transform": manifest.content["transform"],
        }


@dataclass(frozen=True)
class Difference:
    """How two tables differ.

    Attributes:
        keys: Of the fingerprints, that are not the same.
        shared: (sample, view) that both have.
        equal: Of those, rows that are the same to the last bit (0 where their layouts differ).
        kl: Mean divergence of the second's from the first's, in nats; None without shared rows or
            of other classes.
        flips: Rows whose first class is another one.
    """

    keys: list[str]
    shared: int
    equal: int
    kl: float | None
    flips: int


def diff(first: str | Path, second: str | Path) -> Difference:
    """Compare what two tables were made of, and the rows that both have.

    Raises:
        CacheError: A table is not there or is damaged.
    """
    with (
        TeacherTable.open(only_table(Path(first).expanduser()), residency="mmap") as one,
        TeacherTable.open(only_table(Path(second).expanduser()), residency="mmap") as two,
    ):
        keys = differing(one.manifest.content, two.manifest.content)
        shared = equal = flips = 0
        total = 0.0
        ids = np.intersect1d(one.ids, two.ids)
        comparable = one.layout.classes == two.layout.classes
        for view in range(min(one.views, two.views)):
            for start in range(0, len(ids), _PIECE):
                here = ids[start : start + _PIECE]
                a, not_in_one = one.records(here, view)
                b, not_in_two = two.records(here, view)
                both = np.delete(np.arange(len(here)), np.union1d(not_in_one, not_in_two))
                a, b = a[torch.from_numpy(both)], b[torch.from_numpy(both)]
                shared += len(a)
                if one.layout == two.layout:
                    equal += int((a == b).all(1).sum())
                if comparable:
                    p = _log_probs(a, one.layout)
                    q = _log_probs(b, two.layout).clamp(min=-100.0)
                    total += float(torch.where(p.isinf(), 0.0, p.exp() * (p - q)).sum())
                    flips += int((p.argmax(1) != q.argmax(1)).sum())
    kl = total / shared if shared and comparable else None
    return Difference(keys, shared, equal, kl, flips)


def _log_probs(records: Tensor, layout: Layout) -> Tensor:
    """Of all classes; rounded rows are brought to a sum of 1."""
    return torch.log_softmax(decode(records, layout).dense(layout.classes).double(), dim=1)


def export_parquet(path: str | Path, out: str | Path) -> int:
    """Write a table's rows as Parquet.

    Columns: ``sample_id``, ``view``, ``indices`` and ``log_probs`` (lists of k), ``log_tail``.

    Args:
        path: Of the table.
        out: The file.

    Returns:
        How many rows were written.

    Raises:
        CacheError: There is no table, or a shard is damaged.
        ResultsError: The file can't be written.
    """
    written = 0
    schema = pa.schema(
        [
            ("sample_id", pa.int64()),
            ("view", pa.int32()),
            ("indices", pa.list_(pa.int32())),
            ("log_probs", pa.list_(pa.float32())),
            ("log_tail", pa.float32()),
        ]
    )

    def write(place: Path) -> None:
        nonlocal written
        with pq.ParquetWriter(place, schema) as writer:
            for view in range(table.views):
                for start in range(0, len(table.ids), _PIECE):
                    ids = table.ids[start : start + _PIECE]
                    records, lacking = table.records(ids, view)
                    there = np.delete(np.arange(len(ids)), lacking)
                    rows = decode(records[torch.from_numpy(there)], table.layout)
                    count, k = rows.indices.shape
                    ends = pa.array(np.arange(count + 1, dtype=np.int32) * k)
                    lists = (rows.indices.numpy(), rows.log_probs.float().numpy())
                    columns = [
                        pa.array(ids[there]),
                        pa.array(np.full(count, view, dtype=np.int32)),
                        *(pa.ListArray.from_arrays(ends, pa.array(x.reshape(-1))) for x in lists),
                        pa.array(rows.log_tail.float().numpy()),
                    ]
                    writer.write_table(pa.table(columns, schema=schema))
                    written += count

    with TeacherTable.open(only_table(Path(path).expanduser()), residency="mmap") as table:
        write_whole(out, write)
    return written
