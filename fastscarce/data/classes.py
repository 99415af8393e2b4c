"""Class names and numbers from what a label says: a word, a number or nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastscarce.data.source import UNLABELLED
from fastscarce.errors import DataError

__all__ = ["CLASS_FILE", "is_number", "name_numbers", "number_names", "read_names"]

CLASS_FILE = "classes.txt"


def number_names(
    words: Sequence[str | None], classes: Sequence[str] | None = None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels of words.

    Args:
        words: A class's name each; None or "" is no label. Where all are whole numbers, a negative
            one is none either, and where none of them is a name they are places in ``classes``.
        classes: All names in the order of their labels. None: those that occur, by their number
            where all are whole numbers and by the alphabet where not.

    Returns:
        int64 labels, -1 where there is none, and the classes.

    Raises:
        DataError: A word is none of ``classes``.
    """
    found = {word for word in words if word}
    place = {"": UNLABELLED}
    numbers = all(map(is_number, found))
    if numbers:
        place.update({word: UNLABELLED for word in found if int(word) < 0})
        found -= place.keys()
    if classes is None:
        classes = sorted(found, key=lambda word: (int(word) if numbers else 0, word))
    elif numbers and not found.intersection(classes):
        place.update({str(label): label for label in range(len(classes))})
    place.update({name: label for label, name in enumerate(classes)})
    try:
        labels = [place[word or ""] for word in words]
    except KeyError as error:
        raise DataError(
            f"The label {error.args[0]!r} is none of the classes {', '.join(classes)}."
        ) from error
    return np.array(labels, dtype=np.int64), tuple(classes)


def name_numbers(
    numbers: npt.NDArray[np.int64], names: Sequence[str] | None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels of numbers.

    Args:
        numbers: int64 ``(n,)``; a negative one is no label.
        names: Of the classes 0, 1, ...; None: the numbers that occur are the names.

    Raises:
        DataError: A number is beyond the names.
    """
    numbers = np.where(numbers < 0, UNLABELLED, numbers)
    if names is None:
        found, inverse = np.unique(numbers, return_inverse=True)
        without = int(found.size > 0 and found[0] == UNLABELLED)
        labels = inverse.reshape(numbers.shape).astype(np.int64) - without
        return labels, tuple(str(number) for number in found[without:])
    if numbers.size and int(numbers.max()) >= len(names):
        raise DataError(
            f"Labels up to {int(numbers.max())} need {int(numbers.max()) + 1} class names, got"
            f" {len(names)}."
        )
    return numbers, tuple(names)


def read_names(folder: Path) -> tuple[str, ...] | None:
    """Class names from ``classes.txt`` in a folder, a line each; None where there is no such file.

    Raises:
        DataError: The file can't be read, or has a name twice.
    """
    path = folder / CLASS_FILE
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read ({error}); write it as UTF-8.") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if len(set(names)) < len(names):
        raise DataError(f"{path} has a class name twice; give each class one of its own.")
    return names


def is_number(word: str) -> bool:
    """Whether a word is a whole number that int64 holds."""
    return re.fullmatch(r"-?[0-9]{1,18}", word) is not None
