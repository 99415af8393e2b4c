"""What every place that images come from offers: who the samples are, and their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

import numpy as np
import numpy.typing as npt

from fastscarce.data.index import keep_digests
from fastscarce.errors import DataError

__all__ = [
    "UNLABELLED",
    "Failure",
    "Names",
    "Positions",
    "Reader",
    "Source",
    "Stamped",
    "identify",
    "printable",
]

UNLABELLED = -1

_CHUNK = 256  # samples read at a time where all are read

Positions = npt.NDArray[np.int64]
Content = list[bytes] | npt.NDArray[np.uint8]


def identify(keys: Iterable[str | bytes]) -> npt.NDArray[np.int64]:
    """Ids of keys that name samples: a hash of each, the same on every machine.

    Args:
        keys: Relative paths with forward slashes, say; bytes are what `os.fsencode` gives.

    Returns:
        int64, one a key: the first eight bytes of its BLAKE2b digest.
    """
    digests = b"".join(
        hashlib.blake2b(
            key if isinstance(key, bytes) else key.encode("utf-8", "surrogateescape"),
            digest_size=8,
        ).digest()
        for key in keys
    )
    return np.frombuffer(digests, dtype="<i8").astype(np.int64)


def printable(name: str) -> str:
    """A file's name in which bytes that are no UTF-8 are written out, so that it can be printed."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Names(Sequence[str]):
    """Strings held as one block of bytes: a million take no million objects, nor grow in a fork.

    Args:
        names: Any strings; those that `os.fsdecode` made of odd file names too.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        lengths = np.fromiter((len(name) for name in encoded), np.int64, len(encoded))
        self._ends = np.cumsum(lengths)
        self._block = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def of_block(cls, block: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> Names:
        """From the UTF-8 bytes of all names and the place in them where each one ends."""
        names = cls.__new__(cls)
        names._block, names._ends = block, ends
        return names

    @property
    def block(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """The UTF-8 bytes of all names, and the place in them where each one ends."""
        return self._block, self._ends

    def __len__(self) -> int:
        return int(self._ends.size)

    def __iter__(self) -> Iterator[str]:
        block, start = self._block.tobytes(), 0
        for end in self._ends.tolist():
            yield block[start:end].decode("utf-8", "surrogateescape")
            start = end

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...

    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        number = int(place) % len(self)
        start = int(self._ends[number - 1]) if number else 0
        return (
            self._block[start : int(self._ends[number])]
            .tobytes()
            .decode("utf-8", "surrogateescape")
        )


@dataclass(frozen=True)
class Failure:
    """Why one sample could not be had.

    Attributes:
        id: Of the sample.
        name: Of the sample, for people.
        reason: A few words, without the name.
    """

    id: int
    name: str
    reason: str


class Reader(Protocol):
    """Gets the content of samples by their positions. It can be pickled for a worker process."""

    def read(self, positions: Positions) -> Content:
        """Contents of some samples, in the order asked for.

        Returns:
            Encoded images, or uint8 ``(rows, height, width, channels)``.

        Raises:
            DataError: One of them can't be read; the text says why, and no name.
        """


@runtime_checkable
class Stamped(Protocol):
    """A reader that can tell which samples have changed without reading them."""

    def stamps(self) -> npt.NDArray[np.uint64]:
        """uint64 ``(n,)``: changes when the file of a sample does; 0 where nothing can be said."""


@dataclass(frozen=True)
class Source:
    """Samples that can be read one by one, and what is known of them without reading.

    Attributes:
        name: Of the data set, for people.
        reader: Gets their content.
        ids: int64 ``(n,)``, all different; they don't depend on the order of listing.
        labels: int64 ``(n,)``, -1 where there is none.
        classes: Names of the classes, in the order of their labels.
        is_test: bool ``(n,)``: belongs to the source's own test split; all False where it has none.
        flip: Whether a mirrored image keeps its label.
        names: Of the samples, for people; None where a sample has no name but its id.
        shape: ``(height, width, channels)`` of arrays; None where samples are encoded images.
    """

    name: str
    reader: Reader
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    is_test: npt.NDArray[np.bool_]
    flip: bool
    names: Sequence[str] | None = None
    shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        rows = self.ids.shape[0]
        for name in ("labels", "ids", "is_test", "names"):
            value = getattr(self, name)
            if value is not None and len(value) != rows:
                raise ValueError(f"Source needs {rows} {name}, one a sample, got {len(value)}.")
        self._refuse_equal_ids()
        if rows and not -1 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(
                f"Source needs labels from -1 to {len(self.classes) - 1}, got"
                f" {int(self.labels.min())} to {int(self.labels.max())}."
            )

    def _refuse_equal_ids(self) -> None:
        ordered = np.sort(self.ids)
        equal = np.flatnonzero(ordered[1:] == ordered[:-1])
        if equal.size == 0:
            return
        first, second = np.flatnonzero(self.ids == ordered[equal[0]])[:2]
        raise DataError(
            f"{self.name} has two images with one id, {self.name_of(first)} and"
            f" {self.name_of(second)}; remove the one that is there twice."
        )

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def encoded(self) -> bool:
        """Whether `read` gives encoded images, which are yet to be decoded, or arrays."""
        return self.shape is None

    def name_of(self, position: int | np.integer) -> str:
        """What a report calls a sample: its name, or ``#`` and its id."""
        place = int(position)
        return f"#{self.ids[place]}" if self.names is None else self.names[place]

    def read(self, positions: npt.ArrayLike) -> Content:
        """Contents of some samples, in the order asked for.

        Args:
            positions: Which, integers from 0 to below the length.

        Returns:
            A list of encoded images, or uint8 ``(rows, height, width, channels)``.

        Raises:
            DataError: One of them can't be read, a file that vanished for example.
        """
        return self.reader.read(np.asarray(positions, dtype=np.int64))

    def read_each(self, positions: npt.ArrayLike) -> list[bytes | npt.NDArray[np.uint8] | Failure]:
        """Contents like `read`, with a `Failure` in the place of each sample that can't be read."""
        places = np.asarray(positions, dtype=np.int64)
        try:
            return list(self.reader.read(places))
        except DataError as error:
            if places.size == 1:
                return [self.failure(places[0], str(error))]
        return [item for place in places for item in self.read_each([place])]

    def failure(self, position: int | np.integer, reason: str) -> Failure:
        """A `Failure` of one sample."""
        return Failure(int(self.ids[int(position)]), self.name_of(position), reason)

    def contents(self) -> Iterator[tuple[int, bytes | npt.NDArray[np.uint8] | Failure]]:
        """Every sample's position and content, in the order of positions."""
        for start in range(0, len(self), _CHUNK):
            places = np.arange(start, min(start + _CHUNK, len(self)), dtype=np.int64)
            yield from zip(places.tolist(), self.read_each(places), strict=True)

    def digests(self) -> npt.NDArray[np.uint64]:
        """uint64 ``(n,)``: a hash of each sample's content, 0 where it can't be read.

        Those of files are kept in the cache, and found again only where a file has changed.
        """
        if isinstance(self.reader, Stamped):
            return keep_digests(self.ids, self.reader.stamps(), self._digest)
        return self._digest(np.arange(len(self), dtype=np.int64))

    def _digest(self, positions: Positions) -> npt.NDArray[np.uint64]:
        found = np.zeros(len(positions), dtype=np.uint64)
        for start in range(0, len(positions), _CHUNK):
            for row, item in enumerate(self.read_each(positions[start : start + _CHUNK]), start):
                if not isinstance(item, Failure):
                    content = item if isinstance(item, bytes) else np.ascontiguousarray(item).data
                    digest = hashlib.blake2b(content, digest_size=8).digest()
                    found[row] = int.from_bytes(digest, "little")
        return found

    def fingerprint(self) -> str:
        """Hex digest of ids, labels, contents, test split and classes, whatever their order."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.shape, self.classes)).encode())
        order = np.argsort(self.ids)
        for part in (self.ids, self.labels, self.is_test, self.digests()):
            digest.update(np.ascontiguousarray(part[order]).tobytes())
        return digest.hexdigest()
