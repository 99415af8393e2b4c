"""Images and labels in idx files, MNIST's format, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastscarce.data.arrays import ArrayReader
from fastscarce.data.classes import read_names
from fastscarce.data.images import check_memory
from fastscarce.data.source import Source
from fastscarce.errors import DataError

__all__ = ["open_idx", "read_idx"]

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_UNSIGNED_BYTE = 8


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read one idx file of unsigned bytes.

    Args:
        path: Of the file; gzipped if its name ends in ``.gz``.
        dimensions: How many the array must have: 1 for labels, 3 for images.

    Raises:
        DataError: The file can't be read, is no such idx file, or is not as long as it says.

    Source: LeCun, Cortes and Burges, "The MNIST database", file formats.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read ({error}); fetch the file again.") from error
    header = 4 + 4 * dimensions
    magic = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if content[:4] != magic:
        raise DataError(
            f"{path} needs the idx magic number {magic.hex()}, got"
            f" {content[:4].hex() or 'nothing'}; check that images and labels are not"
            " exchanged, or fetch the file again."
        )
    if len(content) < header:
        raise DataError(f"{path} ends within its header; fetch the file again.")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise DataError(
            f"{path} needs {expected} bytes for {'x'.join(map(str, shape))}, got {len(content)};"
            " fetch the file again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def open_idx(folder: Path, *, flip: bool | None = None) -> Source:
    """Open ``train-`` and, where they are, ``t10k-`` images and labels from a folder.

    Class names come from ``classes.txt`` (a line each) beside the files, or are Fashion-MNIST's
    where the folder's name says so, or else the digits. A sample's id is its position, test images
    last.

    Raises:
        DataError: A file is missing, unreadable or doesn't match its sibling.
    """
    if not folder.is_dir():
        raise DataError(f"The idx folder {folder} does not exist; check the path after 'idx:'.")
    parts = [_split(folder, "train")]
    if _find(folder, "t10k-images-idx3-ubyte") is not None:
        parts.append(_split(folder, "t10k"))
    if len({images.shape[1:] for images, _ in parts}) > 1:
        sizes = " and ".join("x".join(map(str, images.shape[1:])) for images, _ in parts)
        raise DataError(f"{folder} needs training and test images of one size, got {sizes}.")
    rows = sum(len(images) for images, _ in parts)
    height, width = parts[0][0].shape[1:]
    check_memory(str(folder), (rows, height, width, 1))
    labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
    count = int(labels.max()) + 1 if rows else 0
    fashion = "fashion" in folder.resolve().name.lower() and count <= len(FASHION_CLASSES)
    return Source(
        name="fashion-mnist" if fashion else folder.resolve().name,
        reader=ArrayReader(np.concatenate([images for images, _ in parts])[..., None]),
        labels=labels,
        ids=np.arange(rows, dtype=np.int64),
        classes=_classes(folder, count, fashion=fashion),
        is_test=np.arange(rows) >= len(parts[0][0]),
        flip=fashion if flip is None else flip,
        shape=(height, width, 1),
    )


def _find(folder: Path, stem: str) -> Path | None:
    for name in (
        stem,
        stem + ".gz",
        stem.replace("-idx", ".idx"),
        stem.replace("-idx", ".idx") + ".gz",
    ):
        if (folder / name).is_file():
            return folder / name
    return None


def _split(folder: Path, name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    arrays = []
    for stem, dimensions in ((f"{name}-images-idx3-ubyte", 3), (f"{name}-labels-idx1-ubyte", 1)):
        path = _find(folder, stem)
        if path is None:
            raise DataError(f"{folder} needs a file {stem} or {stem}.gz; add it.")
        arrays.append(read_idx(path, dimensions))
    images, labels = arrays
    if len(images) != len(labels):
        raise DataError(
            f"{folder} needs a label for each {name} image, got {len(images)} images and"
            f" {len(labels)} labels; fetch the files again."
        )
    return images, labels


def _classes(folder: Path, count: int, *, fashion: bool) -> tuple[str, ...]:
    names = read_names(folder)
    if names is not None:
        if len(names) < count:
            raise DataError(
                f"{folder / 'classes.txt'} needs {count} class names, a line each, got"
                f" {len(names)}."
            )
        return names
    return FASHION_CLASSES if fashion else tuple(str(label) for label in range(count))
