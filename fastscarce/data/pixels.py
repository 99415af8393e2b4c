"""Decoded images, wherever they lie: in memory, in a mapped file, or nowhere, decoded each time."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.data.backend import open_backend
from fastscarce.data.index import alone, place_of
from fastscarce.data.request import Backend, Request, decode_request
from fastscarce.data.source import Positions, Source
from fastscarce.errors import DataError
from fastscarce.files import write_whole

__all__ = ["Decoder", "MappedRows", "OnDemand", "Pixels", "map_file"]

_VERSION = 1  # of how images are decoded; part of a file's name
_CHUNK = 1 << 24  # bytes that are digested at a time


class Pixels(Protocol):
    """What training reads of an array of images, uint8 ``(n, height, width, channels)``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, height, width, channels)``."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8."""

    @property
    def ndim(self) -> int:
        """4."""

    def __getitem__(self, places: Any, /) -> npt.NDArray[np.uint8]:
        """One image by its place, or several by an array of places."""


@dataclass(frozen=True)
class Decoder:
    """How images are decoded.

    Attributes:
        loader: ``torch`` or ``dali``.
        workers: Processes of PyTorch's loader, or threads of DALI; 0 decodes in this process.
        prefetch: Requests that each worker is ahead.
    """

    loader: Literal["torch", "dali"] = "torch"
    workers: int = 0
    prefetch: int = 2

    def open(
        self, source: Source, shape: tuple[int, int, int], rows: int, device: torch.device
    ) -> Backend:
        """A backend for images of ``(height, width, channels)``, in requests of ``rows``."""
        return open_backend(
            self.loader,
            source,
            image_size=shape[:2],
            channels=shape[2],
            rows=rows,
            workers=self.workers,
            prefetch=self.prefetch,
            device=device,
        )


@dataclass(frozen=True)
class MappedRows:
    """Some rows of an array that is mapped from a file.

    Attributes:
        base: The array.
        rows: Which of its rows, int64 ``(n,)``.
    """

    base: npt.NDArray[np.uint8]
    rows: Positions

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, height, width, channels)``."""
        return (len(self.rows), *self.base.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8."""
        return self.base.dtype

    @property
    def ndim(self) -> int:
        """4."""
        return 4

    def __getitem__(self, places: Any, /) -> npt.NDArray[np.uint8]:
        return np.asarray(self.base[self.rows[places]])


@dataclass(frozen=True)
class OnDemand:
    """Images that are decoded each time.

    Attributes:
        source: Where they come from.
        rows: Positions in the source, int64 ``(n,)``.
        image_shape: ``(height, width, channels)``.
        decoder: How they are decoded ahead.
    """

    source: Source
    rows: Positions
    image_shape: tuple[int, int, int]
    decoder: Decoder

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, height, width, channels)``."""
        return (len(self.rows), *self.image_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8."""
        return np.dtype(np.uint8)

    @property
    def ndim(self) -> int:
        """4."""
        return 4

    def __getitem__(self, places: Any, /) -> npt.NDArray[np.uint8]:
        """One image by its place, or several; decoded in this process.

        Raises:
            DataError: One of them can't be decoded.
        """
        positions = self.rows[places]
        done = decode_request(
            self.source,
            Request(np.atleast_1d(positions)),
            image_size=self.image_shape[:2],
            channels=self.image_shape[2],
        )
        for failure in done.failures.values():
            raise DataError(_broken(self.source, failure.name, failure.reason))
        images = done.images.numpy()
        return images if np.ndim(positions) else images[0]

    def ahead(
        self, batches: Iterable[Positions], *, rows: int, device: torch.device
    ) -> Iterator[Tensor]:
        """The images of batches of places, in their order, decoded before they are asked for.

        Args:
            batches: Places of each batch, int64, at most ``rows``; may be endless.
            rows: Most places of a batch.
            device: Where the images are going; they may come from pinned memory.

        Raises:
            DataError: An image can't be decoded, or a worker died.
        """
        backend = self.decoder.open(self.source, self.image_shape, rows, device)
        try:
            for done in backend.start(Request(self.rows[places]) for places in batches):
                for failure in done.failures.values():
                    raise DataError(_broken(self.source, failure.name, failure.reason))
                yield done.images
        finally:
            backend.close()


def _broken(source: Source, name: str, reason: str) -> str:
    return f"{source.name}: {name} can't be decoded any more ({reason}); put it back, or remove it."


def map_file(
    key: str, shape: tuple[int, ...], fill: Callable[[npt.NDArray[np.uint8]], dict[str, Any]]
) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
    """An array in the cache, mapped into memory: as it was kept, or filled anew.

    A file whose content is not what was written is not used.

    Args:
        key: All that the content depends on.
        shape: Of the array, uint8.
        fill: Fills the array, and returns facts that JSON can say.

    Returns:
        The array, read only, and the facts.

    Raises:
        DataError: There is too little room on the disk.
        ResultsError: The file can't be written.
    """
    place, beside = place_of(f"pixels/{_VERSION}/{key}", ".npy"), place_of(key, ".pixels.json")
    found = _kept(place, beside, shape)
    if found is not None:
        return found
    with alone(place):  # another process of this run may fill it
        return _kept(place, beside, shape) or _filled(place, beside, shape, fill)


def _filled(
    place: Path,
    beside: Path,
    shape: tuple[int, ...],
    fill: Callable[[npt.NDArray[np.uint8]], dict[str, Any]],
) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
    needed = int(np.prod(shape, dtype=np.int64))
    place.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.parent).free
    if needed > free:
        raise DataError(
            f"The pool needs {needed / 2**30:.1f} GiB in {place.parent}, but {free / 2**30:.1f} GiB"
            " are free; name another folder by FASTSCARCE_CACHE, or set pool to off."
        )
    facts: dict[str, Any] = {}

    def write(path: Path) -> None:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        facts.update(fill(array))
        array.flush()
        facts["digest"] = _digest(array)

    write_whole(place, write)
    write_whole(beside, lambda path: path.write_text(json.dumps(facts), encoding="utf-8"))
    return np.load(place, mmap_mode="r", allow_pickle=False), facts


def _kept(
    place: Path, beside: Path, shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.uint8], dict[str, Any]] | None:
    try:
        facts = json.loads(beside.read_text(encoding="utf-8"))
        array = np.load(place, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    sound = array.shape == shape and array.dtype == np.uint8 and isinstance(facts, dict)
    return (array, facts) if sound and facts.get("digest") == _digest(array) else None


def _digest(array: npt.NDArray[np.uint8]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        digest.update(np.ascontiguousarray(flat[start : start + _CHUNK]).data)
    return digest.hexdigest()
