"""Sources by name: a built-in set, a folder of images, idx files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastscarce.data.arrays import ArrayReader
from fastscarce.data.folder import open_folder
from fastscarce.data.idx import open_idx
from fastscarce.data.images import ImageSet
from fastscarce.data.load import load_images
from fastscarce.data.source import Source
from fastscarce.errors import DataError

__all__ = ["load", "open_source"]


def open_source(spec: str, *, unlabelled: str | None = None, flip: bool | None = None) -> Source:
    """Open a data set: find its samples, read none of them.

    Args:
        spec: ``digits`` (scikit-learn's 1,797 scans, 8x8), ``folder:PATH`` or ``idx:PATH``.
        unlabelled: A folder of unlabelled images; for ``folder:`` alone.
        flip: Whether a mirrored image keeps its label. None: yes for folders and Fashion-MNIST.

    Raises:
        DataError: The data set is unknown, missing or unreadable.
    """
    kind, colon, path = spec.partition(":")
    if kind == "folder" and path:
        return open_folder(
            Path(path).expanduser(),
            unlabelled=None if unlabelled is None else Path(unlabelled).expanduser(),
            flip=flip,
        )
    if unlabelled is not None:
        raise DataError(
            f"unlabelled is for data of the form folder:PATH, got {spec!r}; leave it out."
        )
    if kind == "idx" and path:
        return open_idx(Path(path).expanduser(), flip=flip)
    if kind == "digits" and not colon:
        return _digits(flip=flip)
    raise DataError(f"The data must be digits, folder:PATH or idx:PATH, got {spec!r}.")


def load(
    spec: str,
    *,
    unlabelled: str | None = None,
    image_size: int | None = None,
    flip: bool | None = None,
    on_error: str = "raise",
) -> ImageSet:
    """Load a data set into memory: `open_source`, and every sample decoded.

    Args:
        spec: As for `open_source`.
        unlabelled: As for `open_source`.
        image_size: Height and width in pixels that encoded images are brought to.
        flip: As for `open_source`.
        on_error: ``raise`` or ``skip``: what to do about an image that can't be decoded.

    Raises:
        DataError: The data set is unknown, missing, unreadable or too large.
    """
    source = open_source(spec, unlabelled=unlabelled, flip=flip)
    return load_images(source, image_size=image_size, on_error=on_error)


def _digits(*, flip: bool | None) -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    rows = levels.shape[0]
    return Source(
        name="digits",
        reader=ArrayReader(levels[..., None]),
        ids=np.arange(rows, dtype=np.int64),
        labels=bunch.target.astype(np.int64),
        classes=tuple(str(digit) for digit in range(10)),
        is_test=np.zeros(rows, dtype=bool),
        flip=bool(flip),
        shape=(8, 8, 1),
    )
