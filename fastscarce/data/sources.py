"""Where images come from: a built-in set, a folder of images, idx files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastscarce.data.folder import load_folder
from fastscarce.data.idx import load_idx
from fastscarce.data.images import ImageSet
from fastscarce.errors import DataError

__all__ = ["load"]


def load(
    spec: str,
    *,
    unlabelled: str | None = None,
    image_size: int | None = None,
    flip: bool | None = None,
    on_error: str = "raise",
) -> ImageSet:
    """Load a data set into memory.

    Args:
        spec: ``digits`` (scikit-learn's 1,797 scans, 8x8), ``folder:PATH`` or ``idx:PATH``.
        unlabelled: A folder of unlabelled images; for ``folder:`` alone.
        image_size: Height and width in pixels; for ``folder:`` alone.
        flip: Whether a mirrored image keeps its label. None: yes for folders and Fashion-MNIST.
        on_error: ``raise`` or ``skip``: what to do about an image file that can't be decoded.

    Raises:
        DataError: The data set is unknown, missing, unreadable or too large.
    """
    kind, colon, path = spec.partition(":")
    if kind == "folder" and path:
        return load_folder(
            Path(path).expanduser(),
            unlabelled=None if unlabelled is None else Path(unlabelled).expanduser(),
            image_size=image_size,
            flip=flip,
            on_error=on_error,
        )
    for name, value in (("unlabelled", unlabelled), ("image_size", image_size)):
        if value is not None:
            raise DataError(
                f"{name} is for data of the form folder:PATH, got {spec!r}; leave it out."
            )
    if kind == "idx" and path:
        return load_idx(Path(path).expanduser(), flip=flip)
    if kind == "digits" and not colon:
        return _digits(flip=flip)
    raise DataError(f"The data must be digits, folder:PATH or idx:PATH, got {spec!r}.")


def _digits(*, flip: bool | None) -> ImageSet:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    rows = levels.shape[0]
    return ImageSet(
        name="digits",
        images=levels[..., None],
        labels=bunch.target.astype(np.int64),
        ids=np.arange(rows, dtype=np.int64),
        paths=None,
        classes=tuple(str(digit) for digit in range(10)),
        is_test=np.zeros(rows, dtype=bool),
        flip=bool(flip),
    )
