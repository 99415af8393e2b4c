"""What was found out about a data set once, kept on the disk and checked for change."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastscarce.errors import FastscarceError
from fastscarce.files import write_whole

__all__ = [
    "Arrays",
    "Index",
    "cache_folder",
    "keep",
    "keep_digests",
    "place_of",
    "stamp",
    "stamp_numbers",
]

Arrays = dict[str, npt.NDArray[Any]]

_VERSION = 1
# A file changed twice within a tick of the clock keeps its time: what is this young isn't trusted.
_YOUNG = 2_000_000_000  # nanoseconds; FAT's tick, the coarsest in use


@dataclass(frozen=True)
class Index:
    """Arrays, and the files and folders that they hold for.

    Attributes:
        arrays: By name; numbers or bytes.
        facts: By name; what JSON can say.
        watched: Local paths or URLs; a change of any makes the index invalid.
        made: Files that were written with the index, watched as well.
    """

    arrays: Arrays
    facts: dict[str, object]
    watched: Sequence[str]
    made: Sequence[str] = ()


def cache_folder() -> Path:
    """Where indices are kept: ``$FASTSCARCE_CACHE``, or ``fastscarce`` in the user's cache."""
    own = os.environ.get("FASTSCARCE_CACHE")
    if own:
        return Path(os.path.expanduser(own))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "fastscarce"


def place_of(key: str, suffix: str) -> Path:
    """The file in the cache that belongs to a key."""
    name = hashlib.blake2b(f"{_VERSION}/{key}".encode("utf-8", "surrogateescape"), digest_size=12)
    return cache_folder() / "index" / f"{name.hexdigest()}{suffix}"


def stamp(path: str) -> str:
    """What changes when a file, a folder's list of names or a remote file changes; "" if absent."""
    if "://" in path:
        import fsspec

        system, inner = fsspec.core.url_to_fs(path)
        with suppress(FileNotFoundError):
            return str(system.ukey(inner))
        return ""
    try:
        facts = os.stat(path)
    except OSError:
        return ""
    return f"{facts.st_mtime_ns} {facts.st_size} {facts.st_ino}"


def keep(key: str, build: Callable[[], Index]) -> Index:
    """The index of a key: as it was kept, if nothing watched has changed since, or built anew.

    An index that can't be written is built again the next time.

    Args:
        key: All that the index depends on beside the content of what it watches.
        build: Makes it.
    """
    place = place_of(key, ".npz")
    found = _read(place)
    if found is not None:
        return found
    started = time.time_ns()
    index = build()
    stamps = {path: stamp(path) for path in (*index.watched, *index.made)}
    local = [int(stamps[path].split()[0]) for path in index.watched if _is_dated(path, stamps)]
    if max(local, default=0) < started - _YOUNG:
        with suppress(FastscarceError):
            write_whole(place, lambda path: _write(path, index, stamps))
    return index


def stamp_numbers(paths: Iterable[str]) -> npt.NDArray[np.uint64]:
    """uint64, one a local path or URL: changes when the file does; 0 where it can't be trusted."""
    newest = time.time_ns() - _YOUNG
    found = []
    for path in paths:
        text = stamp(path)
        old = bool(text) and ("://" in path or int(text.split()[0]) < newest)
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest() if old else b""
        found.append(int.from_bytes(digest, "little"))
    return np.array(found, dtype=np.uint64)


def keep_digests(
    ids: npt.NDArray[np.int64],
    stamps: npt.NDArray[np.uint64],
    digest: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.uint64]],
) -> npt.NDArray[np.uint64]:
    """A hash of each sample's content: as it was kept where its stamp is the same, or made anew.

    Args:
        ids: int64 ``(n,)``, of the samples.
        stamps: uint64 ``(n,)``: what changes when a sample does; 0 is never trusted.
        digest: Makes the hashes of some positions, uint64; 0 is not kept.
    """
    place = place_of(f"digests/{hashlib.blake2b(np.sort(ids).tobytes()).hexdigest()}", ".npz")
    order = np.argsort(ids)
    found = np.zeros(len(ids), dtype=np.uint64)
    kept = _read(place)
    if kept is not None:
        same = (kept.arrays["stamps"] == stamps[order]) & (stamps[order] != 0)
        found[order[same]] = kept.arrays["digests"][same]
    missing = np.flatnonzero(found == 0)
    if missing.size:
        found[missing] = digest(missing)
        index = Index({"stamps": stamps[order], "digests": found[order]}, {}, [])
        with suppress(FastscarceError):
            write_whole(place, lambda path: _write(path, index, {}))
    return found


def _is_dated(path: str, stamps: dict[str, str]) -> bool:
    return bool(stamps[path]) and "://" not in path


def _write(path: Path, index: Index, stamps: dict[str, str]) -> None:
    head = json.dumps({"facts": index.facts, "stamps": stamps}).encode()
    # A sign before each name, because savez has arguments of its own.
    arrays: dict[str, Any] = {f"={name}": array for name, array in index.arrays.items()}
    with path.open("wb") as file:
        np.savez(file, head=np.frombuffer(head, dtype=np.uint8), **arrays)


def _read(place: Path) -> Index | None:
    try:
        with place.open("rb") as file, np.load(file, allow_pickle=False) as content:
            head = json.loads(content["head"].tobytes())
            if any(stamp(path) != text for path, text in head["stamps"].items()):
                return None
            arrays = {name[1:]: content[name] for name in content.files if name != "head"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Index(arrays, head["facts"], list(head["stamps"]))
