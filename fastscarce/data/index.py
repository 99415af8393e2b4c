"""What was found out about a data set once, kept on the disk and checked for change."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastscarce.data.paths import is_remote, system_of
from fastscarce.errors import FastscarceError
from fastscarce.files import write_whole

__all__ = [
    "Arrays",
    "Index",
    "alone",
    "cache_folder",
    "keep",
    "keep_digests",
    "place_of",
    "stamp",
    "stamp_numbers",
    "stamp_of",
]

Arrays = dict[str, npt.NDArray[Any]]

_VERSION = 2
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
    """What changes when a file, a remote file or a folder's list of names does.

    It is "" of a local file that isn't there, and where nothing can be said of a remote one.
    """
    if is_remote(path):
        with suppress(Exception):  # each file system raises its own
            system, inner = system_of(path)
            return str(system.ukey(inner))
        return ""
    try:
        facts = os.stat(path)
    except OSError:
        return ""
    return stamp_of(facts)


def stamp_of(facts: os.stat_result) -> str:
    """`stamp` of a local file that these facts are of."""
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
    with alone(place):
        # Another process of this run may have built it in the meantime.
        found = _read(place)
        if found is not None:
            return found
        started = time.time_ns()
        index = build()
        stamps = {path: stamp(path) for path in (*index.watched, *index.made)}
        if all(_is_settled(path, stamps[path], started) for path in index.watched):
            with suppress(FastscarceError):
                write_whole(place, lambda path: _write(path, index, stamps))
        return index


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Wait until no other process is at work on a file of the cache, where it can be written."""
    with ExitStack() as stack:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(place.with_suffix(".lock").open("wb"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_settled(path: str, text: str, started: int) -> bool:
    """Whether a stamp would show the next change: not of a file that is just being written."""
    if is_remote(path):
        return bool(text)
    return not text or int(text.split()[0]) < started - _YOUNG


def stamp_numbers(paths: Iterable[str]) -> npt.NDArray[np.uint64]:
    """uint64, one a local path or URL: changes when the file does; 0 where it can't be trusted."""
    now = time.time_ns()
    found = []
    for path in paths:
        text = stamp(path)
        good = bool(text) and _is_settled(path, text, now)
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest() if good else b""
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
