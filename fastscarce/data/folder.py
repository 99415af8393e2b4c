"""A folder of images: a sub-folder a class, ``unlabelled/`` and ``test/`` where they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastscarce.data.decode import SUFFIXES
from fastscarce.data.source import UNLABELLED, Names, Positions, Source, identify
from fastscarce.errors import DataError

__all__ = ["FileReader", "open_folder"]

UNLABELLED_NAMES = ("unlabelled", "unlabeled")
TEST_NAME = "test"


@dataclass(frozen=True)
class FileReader:
    """Reads image files whole.

    Attributes:
        paths: Of the files.
    """

    paths: Names

    def read(self, positions: Positions) -> list[bytes]:
        """The files' contents.

        Raises:
            DataError: A file is gone or can't be read.
        """
        return [_read_file(self.paths[place]) for place in positions.tolist()]


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"it can't be read: {error.strerror}") from error


@dataclass(frozen=True)
class _File:
    path: Path
    key: str  # relative path with forward slashes: the same on every machine
    label: int
    test: bool


def open_folder(root: Path, *, unlabelled: Path | None = None, flip: bool | None = None) -> Source:
    """Open class sub-folders, and the reserved ``unlabelled`` (or ``unlabeled``) and ``test``.

    Args:
        root: The folder. ``test/`` holds class sub-folders, ``unlabelled/`` images at any depth.
        unlabelled: Another folder of unlabelled images, at any depth.
        flip: Whether a mirrored image keeps its label; by default yes.

    Raises:
        DataError: A folder is missing or empty.
    """
    classes, files = _list(root, unlabelled)
    return Source(
        name=root.resolve().name,
        reader=FileReader(Names(str(file.path) for file in files)),
        ids=identify(file.key for file in files),
        labels=np.array([file.label for file in files], dtype=np.int64),
        classes=classes,
        is_test=np.array([file.test for file in files], dtype=bool),
        flip=True if flip is None else flip,
        names=Names(file.key for file in files),
    )


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
