"""A folder of images: a sub-folder a class, ``unlabelled/`` and ``test/`` where they are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastscarce.data.decode import SUFFIXES, decode, look
from fastscarce.data.images import UNLABELLED, ImageSet, check_memory
from fastscarce.errors import DataError

__all__ = ["load_folder"]

UNLABELLED_NAMES = ("unlabelled", "unlabeled")
TEST_NAME = "test"
LARGEST_DEFAULT_SIZE = 224


@dataclass(frozen=True)
class _File:
    path: Path
    key: str  # relative path with forward slashes: the same on every machine
    label: int
    test: bool


def load_folder(
    root: Path,
    *,
    unlabelled: Path | None = None,
    image_size: int | None = None,
    flip: bool | None = None,
    on_error: str = "raise",
) -> ImageSet:
    """Load class sub-folders, and the reserved ``unlabelled`` (or ``unlabeled``) and ``test``.

    Args:
        root: The folder. ``test/`` holds class sub-folders, ``unlabelled/`` images at any depth.
        unlabelled: Another folder of unlabelled images, at any depth.
        image_size: Height and width in pixels. By default the images' own where all are square,
            of one size and at most 224; else the largest shorter side, at most 224.
        flip: Whether a mirrored image keeps its label; by default yes.
        on_error: ``raise`` or ``skip``: what to do about an image that can't be decoded.

    Raises:
        DataError: A folder is missing or empty, an image can't be decoded, or memory is too small.
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error must be raise or skip, got {on_error!r}.")
    if image_size is not None and image_size < 1:
        raise DataError(f"The image size must be at least 1 pixel, got {image_size}.")
    classes, files = _list(root, unlabelled)
    skipped: list[str] = []
    good, looks = [], []
    for file in files:
        try:
            looks.append(look(file.path))
            good.append(file)
        except DataError:
            if on_error == "raise":
                raise
            skipped.append(file.key)
    side = _side(looks) if image_size is None else image_size
    grey = all(item[2] for item in looks)
    check_memory(str(root), (len(good), side, side, 1 if grey else 3))
    images = np.empty((len(good), side, side, 1 if grey else 3), dtype=np.uint8)
    kept: list[_File] = []
    for file in good:
        try:
            images[len(kept)] = decode(file.path, height=side, width=side, grey=grey)
            kept.append(file)
        except DataError:
            if on_error == "raise":
                raise
            skipped.append(file.key)
    labels = np.array([file.label for file in kept], dtype=np.int64)
    is_test = np.array([file.test for file in kept], dtype=bool)
    _need_every_class(root, classes, labels[~is_test])
    return ImageSet(
        name=root.resolve().name,
        images=images[: len(kept)],
        labels=labels,
        ids=np.array([_identify(file.key) for file in kept], dtype=np.int64),
        paths=tuple(file.key for file in kept),
        classes=classes,
        is_test=is_test,
        flip=True if flip is None else flip,
        skipped=tuple(skipped),
    )


def _identify(key: str) -> int:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _list(root: Path, unlabelled: Path | None) -> tuple[tuple[str, ...], list[_File]]:
    if not root.is_dir():
        raise DataError(f"The image folder {root} does not exist; check the path after 'folder:'.")
    folders = _class_folders(root)
    classes = tuple(folder.name for folder in folders)
    if not any(True for _ in _images_below(root)):
        raise DataError(
            f"{root} has no images; put each class's images in a sub-folder named after it"
            f" ({', '.join(sorted(SUFFIXES))})."
        )
    files = [
        _File(path, _key(path, root), label, test=False)
        for label, folder in enumerate(folders)
        for path in _some_images(folder)
    ]
    files += _list_test(root, classes)
    for name in UNLABELLED_NAMES:
        for path in _images_below(root / name):
            files.append(_File(path, _key(path, root), UNLABELLED, test=False))
    if unlabelled is not None:
        if not unlabelled.is_dir():
            raise DataError(f"The folder of unlabelled images {unlabelled} does not exist.")
        known = {file.path.resolve() for file in files}
        for path in _some_images(unlabelled):
            if path.resolve() not in known:
                key = "unlabelled:" + _key(path, unlabelled)
                files.append(_File(path, key, UNLABELLED, test=False))
    return classes, files


def _list_test(root: Path, classes: tuple[str, ...]) -> list[_File]:
    folder = root / TEST_NAME
    if not folder.is_dir():
        return []
    files = []
    for part in _class_folders(folder):
        if part.name not in classes:
            raise DataError(
                f"{part} is no class of {root}, which has {', '.join(classes) or 'none'};"
                " rename or remove the folder."
            )
        label = classes.index(part.name)
        files += [_File(path, _key(path, root), label, test=True) for path in _some_images(part)]
    if not files:
        raise DataError(f"{folder} has no images; put them in class sub-folders or remove it.")
    return files


def _class_folders(root: Path) -> list[Path]:
    reserved = (*UNLABELLED_NAMES, TEST_NAME)
    return sorted(
        (
            path
            for path in root.iterdir()
            if path.is_dir() and path.name not in reserved and not path.name.startswith(".")
        ),
        key=lambda path: path.name,
    )


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(parent, name)


def _some_images(folder: Path) -> list[Path]:
    paths = list(_images_below(folder))
    if not paths:
        raise DataError(f"The folder {folder} has no images; add some or remove the folder.")
    return paths


def _key(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _side(looks: list[tuple[int, int, bool]]) -> int:
    return min(LARGEST_DEFAULT_SIZE, max((min(look[:2]) for look in looks), default=1))


def _need_every_class(root: Path, classes: tuple[str, ...], labels: npt.NDArray[np.int64]) -> None:
    for label, name in enumerate(classes):
        if not (labels == label).any():
            raise DataError(f"Class {name} of {root} has no readable image; add some.")
