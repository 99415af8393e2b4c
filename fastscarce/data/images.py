"""Images of one size, their labels and who they are."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastscarce.data.pixels import Pixels
from fastscarce.data.source import Failure
from fastscarce.errors import DataError

__all__ = ["ImageSet", "check_memory", "free_memory"]

_ROWS = 64  # that are looked at at a time


@dataclass(frozen=True)
class ImageSet:
    """Images, their labels and who they are.

    Attributes:
        name: Of the data set, for people.
        images: uint8 ``(n, height, width, channels)``, 1 or 3 channels: an array, or what gives
            its rows.
        labels: int64 ``(n,)``, -1 where there is none.
        ids: int64 ``(n,)``, all different; they don't depend on the order of listing.
        paths: Of the image files, relative to the folder; None where there are no files.
        classes: Names of the classes, in the order of their labels.
        is_test: bool ``(n,)``: belongs to the source's own test split; all False where it has none.
        flip: Whether a mirrored image keeps its label.
        failures: Samples that could not be read or decoded.
    """

    name: str
    images: Pixels
    labels: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    paths: tuple[str, ...] | None
    classes: tuple[str, ...]
    is_test: npt.NDArray[np.bool_]
    flip: bool
    failures: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        rows = self.images.shape[0]
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(
                "ImageSet needs uint8 images, (n, height, width, channels),"
                f" got {self.images.dtype} {self.images.shape}."
            )
        for name in ("labels", "ids", "is_test"):
            if getattr(self, name).shape != (rows,):
                raise ValueError(
                    f"ImageSet needs {name} of shape ({rows},), got {getattr(self, name).shape}."
                )
        if np.unique(self.ids).size != rows:
            raise DataError(
                f"{self.name} has two images with one id; remove the file that is there twice."
            )
        if len(self.classes) < 2:
            found = ", ".join(self.classes) or "none"
            raise DataError(
                f"{self.name} needs at least 2 classes, got {len(self.classes)} ({found});"
                " give labelled images of each, or name their labels by --labels-file."
            )

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return int(self.images.shape[3])

    def fingerprint(self) -> str:
        """Hex digest of ids, labels, pixels, test split and classes, whatever their order."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.images.shape, self.classes)).encode())
        order = np.argsort(self.ids)
        for part in (self.ids, self.labels, self.is_test):
            digest.update(np.ascontiguousarray(part[order]).tobytes())
        for start in range(0, len(order), _ROWS):
            digest.update(np.ascontiguousarray(self.images[order[start : start + _ROWS]]).data)
        return digest.hexdigest()


def check_memory(name: str, shape: tuple[int, int, int, int]) -> None:
    """Refuse a pool that would not fit in free memory.

    Args:
        name: Of the data set.
        shape: Of its images, ``(n, height, width, channels)``, a byte each.

    Raises:
        DataError: The pool is larger than nine tenths of the free memory.
    """
    needed = int(np.prod(shape, dtype=np.int64))
    free = free_memory()
    if free is not None and needed > 0.9 * free:
        raise DataError(
            f"{name} needs {needed / 2**30:.1f} GiB for {shape[0]} images of {shape[1]}x{shape[2]},"
            f" but {free / 2**30:.1f} GiB of memory are free; ask for a smaller image size."
        )


def free_memory() -> int | None:
    """Bytes that can be had without swapping, or None where the system doesn't say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
