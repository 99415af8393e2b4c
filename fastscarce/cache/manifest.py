"""What a table is of: ``manifest.json`` and the list of its samples."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from fastscarce.cache.checksum import checksum, seal, unseal
from fastscarce.cache.record import Layout
from fastscarce.cache.shard import VERSION
from fastscarce.errors import CacheError
from fastscarce.files import write_whole

__all__ = ["Manifest", "find_tables", "locked", "read_manifest", "read_samples", "write_manifest"]

FILE = "manifest.json"
SAMPLES = "samples.safetensors"
_KIND = "fastscarce teacher's table"

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Manifest:
    """What is said of a table once.

    Attributes:
        fingerprint: Its digest, 32 hexadecimal digits; shards carry it.
        content: What the digest is of: nested, by key, see fingerprint.py.
        layout: Of its rows.
        views: How many views it is to have.
        rows: Samples of each view.
        samples: Checksum of the file of their ids.
        class_names: In the order of the classes.
        versions: Of what made it, by package.
        quality: How well the rows stand for the teacher, once all are there; None before.
    """

    fingerprint: str
    content: dict[str, Any]
    layout: Layout
    views: int
    rows: int
    samples: str
    class_names: tuple[str, ...]
    versions: dict[str, str]
    quality: dict[str, float] | None = None

    def with_quality(self, quality: dict[str, float]) -> Manifest:
        """The same with the quality filled in."""
        return replace(self, quality=quality)


def write_samples(folder: Path, ids: Ids) -> str:
    """Write the sorted ids of a table's samples; returns the file's checksum."""
    content = safetensors.numpy.save({"sample_id": ids})
    write_whole(folder / SAMPLES, lambda place: place.write_bytes(content))
    return checksum(content)


def read_samples(folder: Path, manifest: Manifest) -> Ids:
    """The sorted ids of a table's samples, int64 ``(rows,)``.

    Raises:
        CacheError: The file is missing or damaged.
    """
    path = folder / SAMPLES
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CacheError(
            f"{path} can't be read ({error.strerror}); the same `fastscarce cache build` writes it "
            "again."
        ) from error
    if checksum(content) != manifest.samples:
        raise CacheError(
            f"{path} is damaged: its checksum does not match; the same `fastscarce cache build` "
            "writes it again."
        )
    ids: Ids = safetensors.numpy.load(content)["sample_id"]
    return ids


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it whole."""
    layout = manifest.layout
    content = {
        "kind": _KIND,
        "version": VERSION,
        "fingerprint": manifest.fingerprint,
        "classes": layout.classes,
        "k": layout.k,
        "codec": layout.codec,
        "tagged": layout.tagged,
        "bytes_per_row": layout.stride,
        "views": manifest.views,
        "rows": manifest.rows,
        "samples": manifest.samples,
        "class_names": list(manifest.class_names),
        "versions": manifest.versions,
        "quality": manifest.quality,
        "content": manifest.content,
    }
    text = seal(content, indent=1) + "\n"
    write_whole(folder / FILE, lambda place: place.write_text(text, encoding="utf-8"))


def read_manifest(folder: Path) -> Manifest:
    """Read and check it.

    Raises:
        CacheError: It is missing, damaged or of a newer version.
    """
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
        loose = json.loads(text)
        version = loose["version"] if loose["kind"] == _KIND else None
        if isinstance(version, int) and version > VERSION:
            raise CacheError(
                f"{folder} was written by a newer fastscarce (layout {version}, this one reads up "
                f"to {VERSION}); update fastscarce."
            )
        content = unseal(text)
        return Manifest(
            fingerprint=content["fingerprint"],
            content=content["content"],
            layout=Layout(
                content["classes"], content["k"], content["codec"], tagged=content["tagged"]
            ),
            views=content["views"],
            rows=content["rows"],
            samples=content["samples"],
            class_names=tuple(content["class_names"]),
            versions=content["versions"],
            quality=content["quality"],
        )
    except OSError as error:
        raise CacheError(
            f"{folder} holds no teacher's table ({path.name}: {error.strerror or error}); make one "
            "with `fastscarce cache build`."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{path} is damaged ({error}); take it from a copy, or delete the folder {path.parent} "
            "and build the table anew."
        ) from error


def find_tables(path: Path) -> list[Path]:
    """Folders of tables: ``path`` itself, or those in it."""
    if (path / FILE).is_file():
        return [path]
    return sorted(found.parent for found in path.glob(f"*/{FILE}"))


def only_table(path: Path, found: Sequence[Path] | None = None) -> Path:
    """The folder of the one table at ``path``.

    Raises:
        CacheError: There is none, or there are several.
    """
    tables = find_tables(path) if found is None else list(found)
    if not tables:
        raise CacheError(
            f"{path} holds no teacher's table; make one with `fastscarce cache build --out {path}`."
        )
    if len(tables) > 1:
        names = ", ".join(str(table) for table in tables)
        raise CacheError(f"{path} holds {len(tables)} tables; name one of {names}.")
    return tables[0]


@contextmanager
def locked(folder: Path, name: str, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock of a table, which the system gives back when the process ends, however it does.

    Args:
        folder: Of the table.
        name: Of the lock: ``table``, shared by writers, or a writer's own.
        shared: Whether others may share it. Then it is waited for; who holds it alone ends soon.

    Raises:
        CacheError: Another process holds it.
        OSError: The folder can't be written to.
    """
    path = folder / f"{name}.lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = "another process" if name == "table" else f"another process as {name}"
            raise CacheError(
                f"{folder} is being written by {who}; wait for it to end, or name another folder."
            ) from error
        yield
