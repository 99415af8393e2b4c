"""A source's samples, decoded and brought to one size, in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fastscarce.data.decode import Header, decode, inspect
from fastscarce.data.images import ImageSet, check_memory
from fastscarce.data.source import Failure, Source
from fastscarce.errors import DataError

__all__ = ["LARGEST_DEFAULT_SIZE", "ON_ERROR", "load_images"]

ON_ERROR = ("raise", "skip")
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
        on_error: ``raise`` or ``skip``: what to do about a sample that can't be read or decoded.

    Raises:
        DataError: A sample can't be decoded, a class has none left, or memory is too small.
    """
    if on_error not in ON_ERROR:
        raise DataError(f"on_error must be {' or '.join(ON_ERROR)}, got {on_error!r}.")
    if image_size is not None and image_size < 1:
        raise DataError(f"The image size must be at least 1 pixel, got {image_size}.")
    if not source.encoded and image_size is not None:
        raise DataError(
            f"image_size is for encoded images, but {source.name} holds arrays; leave it out."
        )
    images, failures = _arrays(source) if source.shape else _decoded(source, image_size, on_error)
    broken = {failure.id for failure in failures}
    kept = np.array([number not in broken for number in source.ids.tolist()], dtype=bool)
    labels, is_test = source.labels[kept], source.is_test[kept]
    for label, name in enumerate(source.classes):
        if broken and not (labels[~is_test] == label).any():
            raise DataError(f"Class {name} of {source.name} has no readable image; add some.")
    names = source.names
    return ImageSet(
        name=source.name,
        images=images,
        labels=labels,
        ids=source.ids[kept],
        paths=None if names is None else tuple(names[int(place)] for place in np.flatnonzero(kept)),
        classes=source.classes,
        is_test=is_test,
        flip=source.flip,
        failures=tuple(failures),
    )


def _arrays(source: Source) -> tuple[npt.NDArray[np.uint8], list[Failure]]:
    assert source.shape is not None
    check_memory(source.name, (len(source), *source.shape))
    content = source.read(np.arange(len(source)))
    assert isinstance(content, np.ndarray)
    return content, []


def _decoded(
    source: Source, image_size: int | None, on_error: str
) -> tuple[npt.NDArray[np.uint8], list[Failure]]:
    failures: dict[int, Failure] = {}
    headers: list[Header] = []
    for place, content in _contents(source, on_error, failures):
        try:
            headers.append(inspect(content))
        except DataError as error:
            _fail(source, place, str(error), on_error, failures)
    side = image_size or min(
        LARGEST_DEFAULT_SIZE, max((min(item.height, item.width) for item in headers), default=1)
    )
    grey = all(header.grey for header in headers)
    check_memory(source.name, (len(headers), side, side, 1 if grey else 3))
    images = np.empty((len(headers), side, side, 1 if grey else 3), dtype=np.uint8)
    row = 0
    for place, content in _contents(source, on_error, failures):
        try:
            images[row] = decode(content, height=side, width=side, grey=grey)
            row += 1
        except DataError as error:
            _fail(source, place, str(error), on_error, failures)
    return images[:row], [failures[place] for place in sorted(failures)]


def _contents(
    source: Source, on_error: str, failures: dict[int, Failure]
) -> Iterator[tuple[int, bytes]]:
    """Position and bytes of each sample that has not failed; one that can't be read fails."""
    for place, content in source.contents():
        if isinstance(content, Failure):
            _fail(source, place, content.reason, on_error, failures)
        elif place not in failures:
            assert isinstance(content, bytes)
            yield place, content


def _fail(
    source: Source, place: int, reason: str, on_error: str, failures: dict[int, Failure]
) -> None:
    failure = source.failure(place, reason)
    if on_error == "raise":
        raise DataError(
            f"{source.name}: {failure.name} can't be decoded ({failure.reason}); replace or remove"
            " it, or set on_error to skip."
        )
    failures[place] = failure
