"""Sources by name: files of several kinds, and a built-in set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastscarce.data.arrays import ArrayReader, open_arrays
from fastscarce.data.folder import open_folder
from fastscarce.data.idx import open_idx
from fastscarce.data.images import ImageSet
from fastscarce.data.join import add_unlabelled
from fastscarce.data.load import load_images
from fastscarce.data.paths import local
from fastscarce.data.source import Source
from fastscarce.data.table import open_table
from fastscarce.data.webdataset import open_webdataset
from fastscarce.errors import DataError

__all__ = ["KINDS", "load", "open_source"]

KINDS = ("arrays", "folder", "idx", "table", "webdataset")
# Which kinds know of a key; the others have no names for their parts.
_KEYS = {
    "image_key": ("arrays", "table", "webdataset"),
    "label_key": ("arrays", "table", "webdataset"),
    "id_key": ("arrays", "table"),
}


def open_source(
    spec: str,
    *,
    unlabelled: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    id_key: str | None = None,
    flip: bool | None = None,
) -> Source:
    """Open a data set: find its samples and their labels.

    Args:
        spec: ``digits`` (scikit-learn's 1,797 scans, 8x8), or ``KIND:PATH``: ``folder`` (a
            sub-folder a class), ``table`` (CSV or Parquet), ``webdataset`` (tar shards), ``arrays``
            (NumPy's files) or ``idx`` (MNIST's format).
        unlabelled: More images: a folder of them at any depth, or again ``KIND:PATH``.
        image_key: A table's column, an array's name or a WebDataset member's extension.
        label_key: The same for labels.
        id_key: The same for ids; of tables and arrays alone.
        flip: Whether a mirrored image keeps its label. None: yes for files and Fashion-MNIST, no
            for other arrays.

    Raises:
        DataError: The data set is unknown, missing or unreadable.
    """
    kind, colon, path = spec.partition(":")
    if kind == "digits" and not colon:
        source = _digits(flip=flip)
    elif kind not in KINDS or not path:
        raise DataError(f"The data must be digits or {_written()}, got {spec!r}.")
    keys = {"image_key": image_key, "label_key": label_key, "id_key": id_key}
    for name, value in keys.items():
        if value is not None and kind not in _KEYS[name]:
            raise DataError(
                f"{name} is for data of the form {_written(_KEYS[name])}, got {spec!r}; leave it"
                " out."
            )
    if kind == "folder":
        more = _folder(unlabelled)
        source = open_folder(local(path), unlabelled=more, flip=flip)
        if more is not None:
            return source
    elif kind == "idx":
        source = open_idx(local(path), flip=flip)
    elif kind == "table":
        source = open_table(path, **keys, flip=flip)
    elif kind == "webdataset":
        source = open_webdataset(path, image_key=image_key, label_key=label_key, flip=flip)
    elif kind == "arrays":
        source = open_arrays(local(path), **keys, flip=flip)
    if unlabelled is None:
        return source
    return add_unlabelled(source, _open_unlabelled(unlabelled, image_key))


def load(
    spec: str,
    *,
    unlabelled: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    id_key: str | None = None,
    image_size: int | None = None,
    flip: bool | None = None,
    on_error: str = "raise",
) -> ImageSet:
    """Load a data set into memory: `open_source`, and every sample decoded.

    Args:
        spec: As for `open_source`, like ``unlabelled``, the keys and ``flip``.
        unlabelled: More images.
        image_key: Of images.
        label_key: Of labels.
        id_key: Of ids.
        image_size: Height and width in pixels that images are brought to.
        flip: Whether a mirrored image keeps its label.
        on_error: ``raise``, ``skip`` or ``replace``: what to do about an image that can't be
            decoded; see `load_images`.

    Raises:
        DataError: The data set is unknown, missing, unreadable or too large.
    """
    source = open_source(
        spec,
        unlabelled=unlabelled,
        image_key=image_key,
        label_key=label_key,
        id_key=id_key,
        flip=flip,
    )
    return load_images(source, image_size=image_size, on_error=on_error)


def _written(kinds: tuple[str, ...] = KINDS) -> str:
    *first, last = (f"{kind}:PATH" for kind in kinds)
    return f"{', '.join(first)} or {last}"


def _folder(unlabelled: str | None) -> Path | None:
    """The folder that ``unlabelled`` names, or None where it names no folder."""
    if unlabelled is None or unlabelled.partition(":")[0] in {*KINDS, "digits"} - {"folder"}:
        return None
    return local(unlabelled.removeprefix("folder:"))


def _open_unlabelled(spec: str, image_key: str | None) -> Source:
    """The samples of another source; a folder's at any depth, whatever its sub-folders are."""
    folder = _folder(spec)
    if folder is not None:
        return open_folder(folder, flat=True)
    kind = spec.partition(":")[0]
    return open_source(spec, image_key=image_key if kind in _KEYS["image_key"] else None)


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
