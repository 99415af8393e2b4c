"""Images that are arrays already, in NumPy's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastscarce.data.classes import name_numbers, number_names, read_names
from fastscarce.data.source import UNLABELLED, Positions, Source, identify
from fastscarce.errors import DataError

__all__ = ["ArrayFileReader", "ArrayReader", "open_arrays"]

IMAGE_KEYS = ("images", "x", "data")
LABEL_KEYS = ("labels", "y", "targets")
# What stands before or after a key, in MedMNIST's way and in Keras's.
SPLITS = ("", "train", "val", "test")

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class ArrayReader:
    """Gives rows of an array.

    Attributes:
        images: uint8 ``(n, height, width, channels)``.
    """

    images: npt.NDArray[np.uint8]

    def read(self, positions: Positions) -> npt.NDArray[np.uint8]:
        """The rows, copied."""
        return self.images[positions]


@dataclass(frozen=True)
class ArrayFileReader:
    """Gives rows of ``.npy`` files, which are mapped into memory and not read whole.

    Attributes:
        files: Of uint8 images ``(n, ...)``.
        starts: Position of each file's first sample.
        shape: ``(height, width, channels)`` of a sample.
    """

    files: tuple[str, ...]
    starts: tuple[int, ...]
    shape: tuple[int, int, int]
    _mapped: dict[str, npt.NDArray[np.uint8]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_mapped": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)

    def read(self, positions: Positions) -> npt.NDArray[np.uint8]:
        """The rows, copied.

        Raises:
            DataError: A file is gone or can't be read.
        """
        result = np.empty((len(positions), *self.shape), dtype=np.uint8)
        which = np.searchsorted(self.starts, positions, side="right") - 1
        for number in np.unique(which).tolist():
            here = which == number
            images = self._array(self.files[number])
            result[here] = images[positions[here] - self.starts[number]]
        return result

    def _array(self, path: str) -> npt.NDArray[np.uint8]:
        if path not in self._mapped:
            self._mapped[path] = _upright(path, _load(Path(path)))
        return self._mapped[path]


def open_arrays(
    path: Path,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    id_key: str | None = None,
    flip: bool | None = None,
) -> Source:
    """Open an ``.npz`` file, or a folder of ``.npy`` files, or one of them that is of images.

    Arrays are ``images`` (``x``, ``data``) and ``labels`` (``y``, ``targets``), alone or with
    ``train_``, ``val_`` and ``test_`` before them or ``_train``, ``_val`` and ``_test`` after them;
    in a folder each is a file of that name. Images are uint8 ``(n, height, width)``, or with 1 or 3
    channels last or first; labels are whole numbers, negative where there is none, or words. Class
    names may stand in an array ``classes`` or in ``classes.txt`` beside the file. Where there is
    test, val trains; where there is none, val is the test split.

    Args:
        path: The file or the folder.
        image_key: Name of the images' array.
        label_key: Name of the labels' array.
        id_key: Name of an array of ids, whole numbers or words. By default an id is the position,
            val after train and test last.
        flip: Whether a mirrored image keeps its label; by default no.

    Raises:
        DataError: A file is missing or unreadable, or the arrays don't fit together.
    """
    if not path.exists():
        raise DataError(f"The arrays {path} do not exist; check the path after 'arrays:'.")
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.suffix == ".npy":
        image_key, found = image_key or path.stem, _of_folder(folder)
    else:
        found = _of_folder(path) if path.is_dir() else _of_npz(path)
    parts = _parts(path, found, image_key, label_key, id_key)
    images = [_upright(f"{path}, {part.key}", found[part.key]) for part in parts]
    shapes = {array.shape[1:] for array in images}
    if len(shapes) > 1:
        sizes = " and ".join("x".join(map(str, shape)) for shape in sorted(shapes))
        raise DataError(f"{path} needs images of one size, got {sizes}.")
    counts = [len(array) for array in images]
    labels, classes = _labels(path, folder, found, parts, counts)
    starts = np.concatenate([[0], np.cumsum(counts)])
    is_test = np.concatenate(
        [np.full(count, part.test) for part, count in zip(parts, counts, strict=True)]
    )
    shape = (int(images[0].shape[1]), int(images[0].shape[2]), int(images[0].shape[3]))
    reader: ArrayReader | ArrayFileReader
    if all(isinstance(found[part.key], np.memmap) for part in parts):
        files = tuple(str(folder / f"{part.key}.npy") for part in parts)
        reader = ArrayFileReader(files, tuple(int(start) for start in starts[:-1]), shape)
    else:
        reader = ArrayReader(images[0] if len(images) == 1 else np.concatenate(images))
    return Source(
        name=path.resolve().stem if path.is_file() else path.resolve().name,
        reader=reader,
        ids=_ids(path, found, parts, counts),
        labels=labels,
        classes=classes,
        is_test=is_test & (labels != UNLABELLED),
        flip=bool(flip),
        shape=shape,
    )


@dataclass(frozen=True)
class _Part:
    key: str
    labels: str | None
    ids: str | None
    test: bool


def _of_folder(folder: Path) -> dict[str, Array]:
    return {path.stem: _load(path) for path in sorted(folder.glob("*.npy"))}


def _load(path: Path) -> Array:
    try:
        array: Array = np.load(path, allow_pickle=False, mmap_mode="r")
    except Exception as error:  # NumPy raises what it likes on broken bytes
        raise DataError(
            f"{path} is no array that can be read without pickle ({error}); write it by"
            " numpy.save from numbers or strings."
        ) from error
    return array


def _of_npz(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except Exception as error:  # as above
        raise DataError(
            f"{path} is no .npz file that can be read without pickle ({error}); write it by"
            " numpy.savez from arrays of numbers or strings."
        ) from error


def _spelled(key: str, split: str) -> tuple[str, ...]:
    return (f"{split}_{key}", f"{key}_{split}") if split else (key,)


def _parts(
    path: Path,
    found: dict[str, Array],
    image_key: str | None,
    label_key: str | None,
    id_key: str | None,
) -> list[_Part]:
    """Which arrays belong together, in the order of splits."""

    def first(keys: Sequence[str], split: str) -> str | None:
        names = (name for key in keys for name in _spelled(key, split))
        return next((name for name in names if name in found), None)

    image_keys = IMAGE_KEYS if image_key is None else (image_key,)
    label_keys = LABEL_KEYS if label_key is None else (label_key,)
    splits = {split: key for split in SPLITS if (key := first(image_keys, split)) is not None}
    if not splits or not (splits.keys() & {"", "train"}):
        raise DataError(
            f"{path} needs an array of images ({', '.join(image_keys)}), got"
            f" {', '.join(found) or 'none'}; name it by image_key."
        )
    test = "test" if "test" in splits else "val"
    parts = []
    for split, key in splits.items():
        ids = None if id_key is None else first((id_key,), split)
        parts.append(_Part(key, first(label_keys, split), ids, split == test))
        for what, wanted, got in (
            ("label_key", label_key, parts[-1].labels),
            ("id_key", id_key, ids),
        ):
            if wanted is not None and got is None:
                raise DataError(
                    f"{path} has no array {_spelled(wanted, split)[0]!r}, which {what} names; it"
                    f" has {', '.join(found)}."
                )
    return parts


def _upright(name: str, array: Array) -> npt.NDArray[np.uint8]:
    """The array as ``(n, height, width, channels)``."""
    if array.dtype != np.uint8:
        raise DataError(
            f"{name} needs uint8 images, got {array.dtype}; scale them to 0 to 255 and save them as"
            " uint8."
        )
    images: npt.NDArray[np.uint8] = array.view(np.uint8)
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images.transpose(0, 2, 3, 1)
    raise DataError(
        f"{name} needs images (n, height, width) or with 1 or 3 channels, got"
        f" {'x'.join(map(str, array.shape))}."
    )


def _labels(
    path: Path, folder: Path, found: dict[str, Array], parts: list[_Part], counts: list[int]
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    columns: list[Array] = []
    for part, count in zip(parts, counts, strict=True):
        if part.labels is None:
            columns.append(np.full(count, UNLABELLED))
            continue
        column = found[part.labels]
        column = column[:, 0] if column.ndim == 2 and column.shape[1] == 1 else column
        if column.shape != (count,) or column.dtype.kind not in "iuUS":
            raise DataError(
                f"{path} needs a label, a whole number or a word, for each of the {count} images of"
                f" {part.key}, got {column.dtype} {column.shape} in {part.labels}."
            )
        columns.append(column)
    names = _names(path, found["classes"]) if "classes" in found else read_names(folder)
    if any(column.dtype.kind in "US" for column in columns):
        words = [word for column in columns for word in _words(column)]
        return number_names(words, names)
    if any(column.dtype == np.uint64 and column.max(initial=0) >> 63 for column in columns):
        raise DataError(f"{path} needs labels that int64 holds, got larger ones.")
    numbers = np.concatenate([column.astype(np.int64) for column in columns])
    return name_numbers(numbers, names)


def _names(path: Path, names: Array) -> list[str]:
    if names.ndim != 1 or names.dtype.kind not in "iuUS":
        raise DataError(
            f"{path} needs classes, a name each, in the array of that name, got {names.dtype}"
            f" {names.shape}."
        )
    words = _words(names)
    if len(set(words)) < len(words):
        raise DataError(f"{path} has a class name twice; give each class one of its own.")
    return words


def _words(column: Array) -> list[str]:
    if column.dtype.kind == "S":
        return [item.decode("utf-8", "surrogateescape") for item in column.tolist()]
    return [
        item if isinstance(item, str) else "" if item < 0 else str(item) for item in column.tolist()
    ]


def _ids(
    path: Path, found: dict[str, Array], parts: list[_Part], counts: list[int]
) -> npt.NDArray[np.int64]:
    if all(part.ids is None for part in parts):
        return np.arange(sum(counts), dtype=np.int64)
    columns = []
    for part, count in zip(parts, counts, strict=True):
        assert part.ids is not None
        column = found[part.ids]
        if column.shape != (count,) or column.dtype.kind not in "iuUS":
            raise DataError(
                f"{path} needs an id, a whole number or a word, for each of the {count} images of"
                f" {part.key}, got {column.dtype} {column.shape} in {part.ids}."
            )
        columns.append(
            identify(_words(column)) if column.dtype.kind in "US" else column.astype(np.int64)
        )
    return np.concatenate(columns)
