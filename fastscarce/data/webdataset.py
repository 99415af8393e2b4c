"""WebDataset shards: tar files in which neighbours of one name are a sample."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from fastscarce.data.classes import CLASS_FILE, number_names, read_names
from fastscarce.data.decode import SUFFIXES
from fastscarce.data.index import Arrays, Index, keep, stamp
from fastscarce.data.paths import expand, is_remote, mark_test, open_file
from fastscarce.data.ranges import RangeReader
from fastscarce.data.source import UNLABELLED, Names, Source, identify, printable
from fastscarce.errors import DataError

__all__ = ["open_webdataset"]

LABEL_KEY = "cls"

_LARGEST_LABEL = 1 << 20  # bytes
_PIECE = 1 << 16  # bytes of what follows the end of a shard


@dataclass
class _Shards:
    """Samples found so far."""

    keys: list[str] = field(default_factory=list)
    words: list[str | None] = field(default_factory=list)
    file: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)


def open_webdataset(
    pattern: str,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    flip: bool | None = None,
) -> Source:
    """Open tar shards; where each sample lies in them is found out once and kept in the cache.

    A sample is the members with one path up to the first dot of their file name; an id is made of
    that path, so samples may move to other shards. Shards named ``test...`` or in a folder ``test``
    are the test split; where there are none, those of ``validation``. Class names may stand in
    ``classes.txt`` beside the first shard.

    Args:
        pattern: A file, a folder, a pattern such as ``shards/{000..012}.tar``, or a URL of one that
            fsspec opens.
        image_key: Extension of the image, ``jpg`` for example; by default that of any image.
        label_key: Extension of the label's text; ``json.NAME`` is a field of a JSON member. By
            default ``cls``, if there is one.
        flip: Whether a mirrored image keeps its label; by default yes.

    Raises:
        DataError: A shard is missing or no plain tar file, or has no images.

    Source: "The WebDataset format", webdataset's documentation.
    """
    files = expand(pattern, (".tar",))
    places = [path if is_remote(path) else os.path.abspath(path) for path in files]
    key = "\n".join(["webdataset", *places, repr((image_key, label_key))])
    index = keep(key, lambda: _index(places, image_key, label_key))
    arrays = index.arrays
    classes = index.facts["classes"]
    assert isinstance(classes, list)
    return Source(
        name=_name(pattern, places),
        reader=RangeReader(
            tuple(places),
            arrays["file"],
            arrays["start"],
            arrays["size"],
            stamps_seen=tuple("" if is_remote(place) else stamp(place) for place in places),
        ),
        ids=arrays["ids"],
        labels=arrays["labels"],
        classes=tuple(classes),
        is_test=arrays["is_test"],
        flip=True if flip is None else flip,
        names=Names.of_block(arrays["names"], arrays["name_ends"]),
    )


def _name(pattern: str, places: Sequence[str]) -> str:
    first = Path(places[0])
    if len(places) == 1:
        return first.stem
    folder = Path(os.path.expanduser(pattern))
    return folder.resolve().name if folder.is_dir() else first.parent.name


def _index(places: Sequence[str], image_key: str | None, label_key: str | None) -> Index:
    found = _Shards()
    for number, path in enumerate(places):
        _scan(path, number, found, image_key, label_key)
    if not found.keys:
        raise DataError(
            f"{places[0]} has no images ({image_key or ', '.join(sorted(SUFFIXES))}); name their"
            " extension by image_key."
        )
    if label_key is not None and not any(found.words):
        raise DataError(f"{places[0]} has no labels in members {label_key!r}; mend label_key.")
    names = None if is_remote(places[0]) else read_names(Path(places[0]).parent)
    labels, classes = number_names(found.words, names)
    file = np.array(found.file, dtype=np.int64)
    is_test = np.array(mark_test(places), dtype=bool)[file]
    unlabelled = int((labels[is_test] == UNLABELLED).sum())
    if unlabelled:
        raise DataError(
            f"{unlabelled} images of the test split have no label; give them labels, or rename the"
            " shards so that they are no test split."
        )
    keys = Names(map(printable, found.keys))
    arrays: Arrays = {
        "ids": identify(found.keys),
        "names": keys.block[0],
        "name_ends": keys.block[1],
        "labels": labels,
        "is_test": is_test,
        "file": file,
        "start": np.array(found.start, dtype=np.int64),
        "size": np.array(found.size, dtype=np.int64),
    }
    watched = [*places]
    if not is_remote(places[0]):
        watched.append(os.path.join(os.path.dirname(places[0]), CLASS_FILE))
    return Index(arrays, {"classes": list(classes)}, watched)


def _scan(
    path: str, number: int, found: _Shards, image_key: str | None, label_key: str | None
) -> None:
    extension, _, inner = (label_key or LABEL_KEY).partition(".")
    extension = extension.lower()
    wanted = (image_key.lower(),) if image_key else tuple(suffix[1:] for suffix in sorted(SUFFIXES))
    before: str | None = None
    image: tuple[int, int] | None = None
    word: str | None = None

    def finish() -> None:
        if before is not None and image is not None:
            found.keys.append(before)
            found.words.append(word)
            found.file.append(number)
            found.start.append(image[0])
            found.size.append(image[1])

    with open_file(path) as file:
        for member, key, kind in _members(path, file):
            if key != before:
                finish()
                before, image, word = key, None, None
            if kind in wanted and image is None:
                image = (member.offset_data, member.size)
            elif kind == (label_key or LABEL_KEY).lower():
                word = _word(path, file, member, "")
            elif inner and kind == extension:
                word = _word(path, file, member, inner)
        finish()


def _members(path: str, file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Each file of a shard, its sample's key and its extension."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                shard.members = []  # type: ignore[attr-defined]  # a list of a million stays short
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                if not stem or not kind or member.isdir():
                    continue
                _require_plain(path, member)
                yield member, f"{folder}/{stem}" if folder else stem, kind.lower()
            _require_end(path, file, shard.offset)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"{path} is no plain tar file that can be read ({error}); unpack what is compressed,"
            " since its samples can't be read one by one."
        ) from error


def _require_plain(path: str, member: tarfile.TarInfo) -> None:
    if not member.isreg() or member.issparse():
        kind = "sparse" if member.issparse() else "a link or a device"
        raise DataError(
            f"{path}, {member.name} is {kind}, not a range of the shard's bytes; pack the files"
            " themselves (tar --dereference --hard-dereference)."
        )


def _require_end(path: str, file: IO[bytes], offset: int) -> None:
    """Refuse a shard whose list of members does not end as a tar file does: samples are missing.

    Source: POSIX.1-2017, pax, "ustar Interchange Format": two blocks of zeros are the end.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise DataError(
            f"{path} is cut short or damaged at byte {offset}: it has no end of a tar file there;"
            " fetch or make the shard again."
        )
    while block:
        block = file.read(_PIECE)
        if block.strip(b"\0"):
            raise DataError(
                f"{path} goes on after its end, as tar files do that were joined; give each as a"
                " shard of its own."
            )


def _word(path: str, file: IO[bytes], member: tarfile.TarInfo, inner: str) -> str | None:
    """The label in a member, read in the midst of the walk over the shard."""
    if member.size > _LARGEST_LABEL:
        raise DataError(f"{path}, {member.name} is no label: it has {member.size} bytes.")
    file.seek(member.offset_data)
    content = file.read(member.size)
    try:
        text = content.decode("utf-8-sig").strip()
        if not inner:
            return text or None
        value = json.loads(text)
        for part in inner.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, {member.name} is no label: {error}.") from error
    if isinstance(value, (list, dict)):
        raise DataError(f"{path}, {member.name} is no label: {inner} has several values.")
    return None if value is None else str(value)
