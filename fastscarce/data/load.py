"""A source's samples at one size: decoded into memory or a file, or each time they are needed."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from fastscarce.data.decode import inspect
from fastscarce.data.images import ImageSet, check_memory, free_memory
from fastscarce.data.index import cache_folder
from fastscarce.data.pixels import Decoder, MappedRows, OnDemand, Pixels, map_file
from fastscarce.data.request import Request
from fastscarce.data.source import Failure, Positions, Source
from fastscarce.data.standin import stand_ins
from fastscarce.errors import DataError

__all__ = ["LARGEST_DEFAULT_SIZE", "ON_ERROR", "Storage", "load_images"]

ON_ERROR = ("raise", "skip", "replace")
LARGEST_DEFAULT_SIZE = 224

Storage = Literal["auto", "memory", "disk", "off"]

_ROWS = 64  # of a request where everything is decoded
_MANY = 512  # images that are worth starting workers for


def load_images(
    source: Source,
    *,
    image_size: int | None = None,
    on_error: str = "raise",
    storage: Storage = "memory",
    decoder: Decoder | None = None,
    processes: int = 1,
) -> ImageSet:
    """Bring every sample of a source to one size.

    Args:
        source: Where the samples come from.
        image_size: Height and width in pixels: the shorter side is resized to it, the centre
            cropped. By default that of arrays, which need not be square, and of encoded images
            their own where all are square, of one size and at most 224; else the largest shorter
            side, at most 224.
        on_error: What to do about a sample that can't be read or decoded. ``raise``; ``skip``
            leaves it out; ``replace`` gives it the pixels of another one of its label, chosen by
            its id, of the same split.
        storage: Where the pixels lie. ``memory``; ``disk``: in a file of the cache that is mapped
            into memory and checked; ``off``: nowhere, they are decoded each time; ``auto``: the
            first of these that they fit in. The images are the same.
        decoder: How they are decoded. None: in this process.
        processes: How many on this machine hold the images.

    Raises:
        DataError: A sample can't be decoded, a class has none left, or memory is too small.
    """
    if on_error not in ON_ERROR:
        raise DataError(
            f"on_error must be {', '.join(ON_ERROR[:-1])} or {ON_ERROR[-1]}, got {on_error!r}."
        )
    if image_size is not None and image_size < 1:
        raise DataError(f"The image size must be at least 1 pixel, got {image_size}.")
    work = _Work(source, on_error, decoder or Decoder(), {})
    if source.shape is None:
        shape = work.look(image_size)
    elif image_size is None:
        shape = source.shape
    else:
        shape = (image_size, image_size, source.shape[2])
    images: Pixels
    chosen = _storage(source, storage, (len(source), *shape), processes)
    if chosen == "memory":
        images = work.in_memory(shape)
    elif chosen == "disk":
        images = work.in_file(shape)
    else:
        images = work.on_demand(shape)
    kept = work.kept()
    names = source.names
    return ImageSet(
        name=source.name,
        images=images,
        labels=source.labels[kept],
        ids=source.ids[kept],
        paths=None if names is None else tuple(names[int(place)] for place in kept),
        classes=source.classes,
        is_test=source.is_test[kept],
        flip=source.flip,
        failures=tuple(work.failures[place] for place in sorted(work.failures)),
    )


def _storage(
    source: Source, storage: Storage, shape: tuple[int, int, int, int], processes: int
) -> Storage:
    if storage == "memory":
        check_memory(source.name, shape)
    if storage != "auto":
        return storage
    needed, free = int(np.prod(shape, dtype=np.int64)), free_memory()
    if free is None or needed * processes <= free // 2:
        return "memory"
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    return "disk" if needed <= shutil.disk_usage(folder).free // 2 else "off"


@dataclass
class _Work:
    """What is known while a source is decoded: above all, what failed."""

    source: Source
    on_error: str
    decoder: Decoder
    failures: dict[int, Failure]

    def look(self, image_size: int | None) -> tuple[int, int, int]:
        """Height, width and channels, from the headers alone."""
        headers = []
        for place, content in self.source.contents():
            if isinstance(content, Failure):
                self._fail(place, content.reason)
                continue
            try:
                assert isinstance(content, bytes)
                headers.append(inspect(content))
            except DataError as error:
                self._fail(place, str(error))
        shorter = (min(item.height, item.width) for item in headers)
        side = image_size or min(LARGEST_DEFAULT_SIZE, max(shorter, default=1))
        return side, side, 1 if all(header.grey for header in headers) else 3

    def in_memory(self, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
        """All images in one array."""
        if shape == self.source.shape:
            content = self.source.read(np.arange(len(self.source)))
            assert isinstance(content, np.ndarray)
            return content
        images = np.empty((len(self.source), *shape), dtype=np.uint8)
        self._decode(images, shape)
        rows = self._rows()
        return images if np.array_equal(rows, np.arange(len(images))) else images[rows]

    def in_file(self, shape: tuple[int, int, int]) -> Pixels:
        """All images in a file."""
        content = hashlib.blake2b(self.source.ids.tobytes(), digest_size=16).hexdigest()
        key = f"{self.source.fingerprint()}/{content}/{shape}/{self.decoder.loader}"

        def fill(images: npt.NDArray[np.uint8]) -> dict[str, Any]:
            self._decode(images, shape)
            return {"failures": {str(place): item.reason for place, item in self.failures.items()}}

        images, facts = map_file(key, (len(self.source), *shape), fill)
        for place, reason in facts["failures"].items():
            self._fail(int(place), reason)
        rows = self._rows()
        whole = np.array_equal(rows, np.arange(len(images)))
        return images if whole else MappedRows(images, rows)

    def on_demand(self, shape: tuple[int, int, int]) -> OnDemand:
        """Nothing but what it takes to decode; broken images are still found, once."""
        if self.source.encoded and self.on_error != "raise":
            self._decode(None, shape)
        return OnDemand(self.source, self._rows(), shape, self.decoder)

    def kept(self) -> Positions:
        """Positions of the samples that are in the data set."""
        places = np.arange(len(self.source), dtype=np.int64)
        return places if self.on_error == "replace" else np.delete(places, list(self.failures))

    def _rows(self) -> Positions:
        """Whose pixels each kept sample shows; refuses a class of which nothing is left."""
        source, broken = self.source, list(self.failures)
        good = np.ones(len(source), dtype=bool)
        good[broken] = False
        for label, name in enumerate(source.classes):
            if broken and not (good & ~source.is_test & (source.labels == label)).any():
                raise DataError(f"Class {name} of {source.name} has no readable image; add some.")
        rows = np.arange(len(source), dtype=np.int64)
        if self.on_error != "replace":
            return rows[good]
        for place in broken:
            others = stand_ins(source, place)
            others = others[good[others]]
            if others.size == 0:
                raise DataError(
                    f"{source.name} has no readable image of its label that could stand in for"
                    f" {source.name_of(place)}; set on_error to skip."
                )
            rows[place] = others[0]
        return rows

    def _decode(self, images: npt.NDArray[np.uint8] | None, shape: tuple[int, int, int]) -> None:
        """Decode what has not failed; into an array, or to see what fails."""
        positions = np.delete(np.arange(len(self.source), dtype=np.int64), list(self.failures))
        parts = [positions[start : start + _ROWS] for start in range(0, len(positions), _ROWS)]
        workers = self.decoder.workers if len(positions) >= _MANY else 0
        decoder = Decoder(self.decoder.loader, workers, self.decoder.prefetch)
        backend = decoder.open(self.source, shape, _ROWS, torch.device("cpu"))
        try:
            done = backend.start(Request(part) for part in parts)
            for part, decoded in zip(parts, done, strict=True):
                for row, failure in decoded.failures.items():
                    self._fail(int(part[row]), failure.reason)
                if images is not None:
                    images[part] = decoded.images.numpy()
        finally:
            backend.close()

    def _fail(self, place: int, reason: str) -> None:
        failure = self.source.failure(place, reason)
        if self.on_error == "raise":
            raise DataError(
                f"{self.source.name}: {failure.name} can't be decoded ({failure.reason}); replace"
                " or remove it, or set on_error to skip or replace."
            )
        self.failures[place] = failure
