"""What was found out about a data set once, kept on the disk and checked for change."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastscarce.errors import FastscarceError
from fastscarce.files import write_whole

__all__ = ["Arrays", "Index", "cache_folder", "keep", "place_of", "stamp"]

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
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastscarce"


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
