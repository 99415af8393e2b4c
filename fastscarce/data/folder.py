"""A folder of images: a sub-folder a class, ``unlabelled/`` and ``test/`` where they are."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastscarce.data.decode import SUFFIXES
from fastscarce.data.index import Arrays, Index, keep, stamp_numbers
from fastscarce.data.source import UNLABELLED, Names, Positions, Source, identify, printable
from fastscarce.errors import DataError

__all__ = ["FileReader", "open_folder"]

UNLABELLED_NAMES = ("unlabelled", "unlabeled")
TEST_NAME = "test"


@dataclass(frozen=True)
class FileReader:
    """Reads image files whole.

    Attributes:
        names: Paths relative to ``root`` with forward slashes, or absolute ones.
        root: Folder of the relative ones.
    """

    names: Names
    root: str

    def read(self, positions: Positions) -> list[bytes]:
        """The files' contents.

        Raises:
            DataError: A file is gone or can't be read.
        """
        return [
            _read_file(os.path.join(self.root, self.names[place])) for place in positions.tolist()
        ]

    def stamps(self) -> npt.NDArray[np.uint64]:
        """uint64 ``(n,)``: changes when a file does."""
        return stamp_numbers(os.path.join(self.root, name) for name in self.names)


def _read_file(path: str) -> bytes:
    try:
        # Without waiting for the other end of a pipe that is called like an image.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise DataError("it is no file")
            with open(handle, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a table's path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"it can't be read: {reason}") from error


@dataclass
class _Listing:
    """Files found so far, and the folders they were found in."""

    paths: list[str] = field(default_factory=list)  # to open; relative to the root or absolute
    keys: list[str] = field(default_factory=list)  # what ids are made of
    labels: list[int] = field(default_factory=list)
    tests: list[bool] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    real: set[str] = field(default_factory=set)  # of the folders
    linked: set[str] = field(default_factory=set)  # files that links to images lead to

    def add(self, path: str, key: str, label: int, *, test: bool = False) -> None:
        self.paths.append(path)
        self.keys.append(key)
        self.labels.append(label)
        self.tests.append(test)


def open_folder(
    root: Path,
    *,
    unlabelled: Path | None = None,
    flat: bool = False,
    flip: bool | None = None,
) -> Source:
    """Open class sub-folders, and the reserved ``unlabelled`` (or ``unlabeled``) and ``test``.

    The list of files is kept in the cache, and made again when a folder's list of names changes.

    Args:
        root: The folder. ``test/`` holds class sub-folders, ``unlabelled/`` images at any depth;
            images in no sub-folder are unlabelled too. Links are followed.
        unlabelled: Another folder of unlabelled images, at any depth.
        flat: No sub-folder's name means anything: all images are unlabelled.
        flip: Whether a mirrored image keeps its label; by default yes.

    Raises:
        DataError: A folder is missing or empty.
    """
    folders = [str(root.absolute()), str(unlabelled and unlabelled.absolute())]
    index = keep("\n".join(["folder", *folders, str(flat)]), lambda: _index(root, unlabelled, flat))
    arrays = index.arrays
    classes = tuple(str(name) for name in Names.of_block(arrays["classes"], arrays["class_ends"]))
    return Source(
        name=root.resolve().name,
        reader=FileReader(Names.of_block(arrays["paths"], arrays["path_ends"]), str(root)),
        ids=arrays["ids"],
        labels=arrays["labels"],
        classes=classes,
        is_test=arrays["is_test"],
        flip=True if flip is None else flip,
        names=Names.of_block(arrays["keys"], arrays["key_ends"]),
    )


def _index(root: Path, unlabelled: Path | None, flat: bool) -> Index:
    classes, files = _list_flat(root) if flat else _list(root, unlabelled)
    paths, keys = Names(files.paths), Names(map(printable, files.keys))
    names = Names(map(printable, classes))
    arrays: Arrays = {
        "paths": paths.block[0],
        "path_ends": paths.block[1],
        "keys": keys.block[0],
        "key_ends": keys.block[1],
        "ids": identify(files.keys),
        "labels": np.array(files.labels, dtype=np.int64),
        "is_test": np.array(files.tests, dtype=bool),
        "classes": names.block[0],
        "class_ends": names.block[1],
    }
    return Index(arrays, {}, files.folders)


def _list(root: Path, unlabelled: Path | None) -> tuple[list[str], _Listing]:
    if not root.is_dir():
        raise DataError(f"The image folder {root} does not exist; check the path after 'folder:'.")
    files = _Listing()
    classes = _class_folders(root)
    empty = [name for label, name in enumerate(classes) if not _add(files, root, name, label)]
    _list_test(files, root, classes)
    for name in UNLABELLED_NAMES:
        if (root / name).is_dir():
            _add(files, root, name, UNLABELLED)
    # Walked as far as its own names, for the list of which the index watches it.
    for name in next(_walk(str(root), "", files))[1]:
        files.add(name, name, UNLABELLED)
    if not files.keys:
        raise DataError(
            f"{root} has no images; put each class's images in a sub-folder named after it"
            f" ({', '.join(sorted(SUFFIXES))})."
        )
    if empty:
        raise DataError(_without_images(root / empty[0]))
    if unlabelled is not None:
        if not unlabelled.is_dir():
            raise DataError(f"The folder of unlabelled images {unlabelled} does not exist.")
        _add_others(files, unlabelled)
    return classes, files


def _list_flat(root: Path) -> tuple[list[str], _Listing]:
    if not root.is_dir():
        raise DataError(f"The folder of unlabelled images {root} does not exist.")
    files = _Listing()
    if not _add(files, root, "", UNLABELLED):
        raise DataError(_without_images(root))
    return [], files


def _list_test(files: _Listing, root: Path, classes: list[str]) -> None:
    folder = root / TEST_NAME
    if not folder.is_dir():
        return
    before = len(files.keys)
    for name in _class_folders(folder):
        if name not in classes:
            raise DataError(
                f"{folder / name} is no class of {root}, which has {', '.join(classes) or 'none'};"
                " rename or remove the folder."
            )
        inner = f"{TEST_NAME}/{name}"
        if not _add(files, root, inner, classes.index(name), test=True):
            raise DataError(_without_images(root / inner))
    files.folders.append(str(folder))
    if len(files.keys) == before:
        raise DataError(f"{folder} has no images; put them in class sub-folders or remove it.")


def _class_folders(root: Path) -> list[str]:
    reserved = (*UNLABELLED_NAMES, TEST_NAME)
    return sorted(
        path.name
        for path in root.iterdir()
        if path.name not in reserved and not path.name.startswith(".") and path.is_dir()
    )


def _add(files: _Listing, root: Path, name: str, label: int, *, test: bool = False) -> bool:
    """List the images at any depth below a sub-folder of the root; whether there are any."""
    before = len(files.keys)
    above = tuple(os.path.realpath(root / parent) for parent in Path(name).parents)
    # What is listed by a link from a class, and would be unlabelled too, is listed once.
    known = frozenset(files.linked) if label == UNLABELLED else frozenset()
    for inner, names in _walk(str(root / name), name, files, above):
        place = os.path.realpath(root / inner) if known else ""
        for image in names:
            path = f"{inner}/{image}" if inner else image
            if os.path.join(place, image) not in known:
                files.add(path, path, label, test=test)
    return len(files.keys) > before


def _add_others(files: _Listing, folder: Path) -> None:
    """List the images of another folder that were not listed already."""
    known, linked = frozenset(files.real), frozenset(files.linked)
    found = False
    for inner, names in _walk(str(folder), "", files):
        place = os.path.join(str(folder.absolute()), inner)
        real = os.path.realpath(place)
        found = found or bool(names)
        if real in known:
            continue
        for name in names:
            path = os.path.join(place, name)
            target = os.path.realpath(path) if os.path.islink(path) else os.path.join(real, name)
            if target not in linked and os.path.dirname(target) not in known:
                key = f"{inner}/{name}" if inner else name
                files.add(path, f"unlabelled:{key}", UNLABELLED)
    if not found:
        raise DataError(_without_images(folder))


def _without_images(folder: Path) -> str:
    return f"The folder {folder} has no images; add some or remove the folder."


def _walk(
    folder: str, name: str, files: _Listing, above: tuple[str, ...] = ()
) -> Iterator[tuple[str, list[str]]]:
    """Each folder's relative name and its images, sorted; a link back up is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    images, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    folders.append(entry.name)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    images.append(entry.name)
                    if entry.is_symlink():
                        files.linked.add(os.path.realpath(entry.path))
    except OSError as error:
        raise DataError(f"The folder {folder} can't be listed: {error.strerror}.") from error
    files.folders.append(folder)
    files.real.add(real)
    yield name, sorted(images)
    for inner in sorted(folders):
        path = f"{name}/{inner}" if name else inner
        yield from _walk(os.path.join(folder, inner), path, files, (*above, real))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a file that can't be read
        return False
