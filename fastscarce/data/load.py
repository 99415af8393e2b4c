"""A source's samples, decoded and brought to one size, in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from fastscarce.augment.philox import keyed_order
from fastscarce.data.decode import decode, inspect
from fastscarce.data.images import ImageSet, check_memory
from fastscarce.data.source import Failure, Source
from fastscarce.errors import DataError

__all__ = ["LARGEST_DEFAULT_SIZE", "ON_ERROR", "load_images"]

ON_ERROR = ("raise", "skip", "replace")

T = TypeVar("T")

_CHUNK = 256  # samples held at a time while they are decoded
_DRAW = 0x57A4D1  # the counter's word that sets these draws apart from a view's
LARGEST_DEFAULT_SIZE = 224


def load_images(
    source: Source, *, image_size: int | None = None, on_error: str = "raise"
) -> ImageSet:
    """Decode every sample of a source.

    Args:
        source: Where the samples come from.
        image_size: Height and width in pixels of encoded images, whose shorter side is resized to
            it and whose centre is cropped. By default the images' own where all are square, of one
            size and at most 224; else the largest shorter side, at most 224. Arrays keep theirs.
        on_error: What to do about a sample that can't be read or decoded. ``raise``; ``skip``
            leaves it out; ``replace`` gives it the pixels of another one of its label, chosen by
            its id, of the same split.

    Raises:
        DataError: A sample can't be decoded, a class has none left, or memory is too small.
    """
    if on_error not in ON_ERROR:
        raise DataError(
            f"on_error must be {', '.join(ON_ERROR[:-1])} or {ON_ERROR[-1]}, got {on_error!r}."
        )
    if image_size is not None and image_size < 1:
        raise DataError(f"The image size must be at least 1 pixel, got {image_size}.")
    if not source.encoded and image_size is not None:
        raise DataError(
            f"image_size is for encoded images, but {source.name} holds arrays; leave it out."
        )
    images, failures = _arrays(source) if source.shape else _decoded(source, image_size, on_error)
    kept = np.ones(len(source), dtype=bool)
    kept[list(failures)] = False
    for label, name in enumerate(source.classes):
        if failures and not (kept & ~source.is_test & (source.labels == label)).any():
            raise DataError(f"Class {name} of {source.name} has no readable image; add some.")
    if failures and on_error == "replace":
        images, kept = _replaced(source, images, kept), np.ones(len(source), dtype=bool)
    names = source.names
    return ImageSet(
        name=source.name,
        images=images,
        labels=source.labels[kept],
        ids=source.ids[kept],
        paths=None if names is None else tuple(names[int(place)] for place in np.flatnonzero(kept)),
        classes=source.classes,
        is_test=source.is_test[kept],
        flip=source.flip,
        failures=tuple(failures[place] for place in sorted(failures)),
    )


def _replaced(
    source: Source, images: npt.NDArray[np.uint8], kept: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """The images with others' pixels where one is broken.

    Args:
        source: All samples.
        images: Of those that are kept, in the order of their positions.
        kept: bool, one a sample.
    """
    row = np.cumsum(kept) - 1
    result = np.empty((len(source), *images.shape[1:]), dtype=np.uint8)
    result[kept] = images
    for place in np.flatnonzero(~kept):
        alike = kept & (source.labels == source.labels[place])
        alike &= source.is_test == source.is_test[place]
        others = np.flatnonzero(alike)
        if others.size == 0:
            raise DataError(
                f"{source.name} has no readable image of its label that could stand in for"
                f" {source.name_of(place)}; set on_error to skip."
            )
        order = keyed_order(int(source.ids[place]), source.ids[others], view=0, draw=_DRAW)
        result[place] = images[row[others[order[0]]]]
    return result


def _arrays(source: Source) -> tuple[npt.NDArray[np.uint8], dict[int, Failure]]:
    assert source.shape is not None
    check_memory(source.name, (len(source), *source.shape))
    content = source.read(np.arange(len(source)))
    assert isinstance(content, np.ndarray)
    return content, {}


def _decoded(
    source: Source, image_size: int | None, on_error: str
) -> tuple[npt.NDArray[np.uint8], dict[int, Failure]]:
    failures: dict[int, Failure] = {}
    headers = list(_each(source, inspect, on_error, failures))
    side = image_size or min(
        LARGEST_DEFAULT_SIZE, max((min(item.height, item.width) for item in headers), default=1)
    )
    grey = all(header.grey for header in headers)
    check_memory(source.name, (len(headers), side, side, 1 if grey else 3))
    images = np.empty((len(headers), side, side, 1 if grey else 3), dtype=np.uint8)
    row = 0
    work = partial(decode, height=side, width=side, grey=grey)
    for image in _each(source, work, on_error, failures):
        images[row] = image
        row += 1
    return images[:row], failures


def _each(
    source: Source, work: Callable[[bytes], T], on_error: str, failures: dict[int, Failure]
) -> Iterator[T]:
    """What comes of each sample that has not failed, in order; one that can't be had fails."""

    def attempt(content: bytes | npt.NDArray[np.uint8] | Failure) -> T | str:
        if isinstance(content, Failure):
            return content.reason
        assert isinstance(content, bytes)
        try:
            return work(content)
        except DataError as error:
            return str(error)

    # Pillow decodes and resizes outside of the interpreter's lock.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for start in range(0, len(source), _CHUNK):
            places = range(start, min(start + _CHUNK, len(source)))
            wanted = [place for place in places if place not in failures]
            done = threads.map(attempt, source.read_each(wanted))
            for place, result in zip(wanted, done, strict=True):
                if isinstance(result, str):
                    _fail(source, place, result, on_error, failures)
                else:
                    yield result


def _fail(
    source: Source, place: int, reason: str, on_error: str, failures: dict[int, Failure]
) -> None:
    failure = source.failure(place, reason)
    if on_error == "raise":
        raise DataError(
            f"{source.name}: {failure.name} can't be decoded ({failure.reason}); replace or remove"
            " it, or set on_error to skip or replace."
        )
    failures[place] = failure
