"""Which labels may be used, from a file; and the file that says how a run split its data."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastscarce.data.classes import number_names
from fastscarce.data.images import ImageSet
from fastscarce.data.paths import local
from fastscarce.data.source import UNLABELLED, Source
from fastscarce.data.splitting import PARTS, Given, Split
from fastscarce.data.tabular import PARQUET, TEXT, first_of, read_columns, schema_of
from fastscarce.errors import DataError

__all__ = ["relabel", "write_split"]

ID_COLUMN = "id"
NAME_COLUMNS = ("name", "path", "file_name", "filename", "image")
LABEL_COLUMNS = ("label", "class", "target")
PART_COLUMN = "part"


def relabel(source: Source, path: str | Path) -> tuple[Source, Given]:
    """A source with the labels of a file, and which of its samples the file names.

    Args:
        source: The samples. Its classes stay; where it has none, the file's labels are the classes.
        path: CSV, TSV or Parquet with a column ``id`` or ``name`` (``path``, ``file_name``), a
            column ``label`` of class names (``class``, ``target``), empty where there is none, and
            perhaps ``part``: ``labelled``, ``holdout``, ``unlabelled`` or ``test``. What
            `write_split` wrote is such a file.

    Raises:
        DataError: The file can't be read, or names samples, classes or parts that there are not.
    """
    text = str(local(path))
    if not text.lower().endswith((*PARQUET, *TEXT)):
        raise DataError(f"The labels file {text} must be .csv, .tsv or .parquet.")
    schema = schema_of(text)
    who = ID_COLUMN if ID_COLUMN in schema.names else first_of(schema, NAME_COLUMNS)
    what = first_of(schema, LABEL_COLUMNS)
    if who is None or what is None:
        raise DataError(
            f"The labels file {text} needs a column id or name and a column label, got"
            f" {', '.join(schema.names)}."
        )
    part = first_of(schema, [PART_COLUMN])
    table = read_columns(text, [name for name in (who, what, part) if name is not None])
    places = _places(source, text, table.column(who).to_pylist(), by_id=who == ID_COLUMN)
    said = [None if word is None else str(word) for word in table.column(what).to_pylist()]
    words = [word if word in source.classes else word and word.strip() for word in said]
    try:
        given, classes = number_names(words, source.classes or None)
    except DataError as error:
        raise DataError(f"The labels file {text}: {error}") from error
    labels = source.labels.copy()
    labels[places] = np.where(given == UNLABELLED, labels[places], given)
    parts = None if part is None else _parts(text, table.column(part).to_pylist())
    used = np.flatnonzero(given != UNLABELLED) if parts is None else slice(None)
    chosen = Given(text, source.ids[places][used], parts)
    return replace(source, labels=labels, classes=classes), chosen


def _places(
    source: Source, path: str, values: Sequence[Any], *, by_id: bool
) -> npt.NDArray[np.int64]:
    """The position of each sample that the file names."""
    if by_id:
        try:
            keys: list[Any] = [int(value) for value in values]
            known: dict[Any, int] = {int(key): place for place, key in enumerate(source.ids)}
        except (TypeError, ValueError) as error:
            raise DataError(
                f"The labels file {path} needs whole numbers as ids: {error}."
            ) from error
    elif source.names is None:
        raise DataError(
            f"The labels file {path} needs a column id, since {source.name} has no names."
        )
    else:
        known = {name: place for place, name in enumerate(source.names)}
        keys = list(map(str, values))
    strangers = [key for key in keys if key not in known]
    if strangers:
        example = next(iter(known), "none")
        hint = " Of data that was opened otherwise, name them by name and leave id out." * by_id
        raise DataError(
            f"{len(strangers)} of the {len(keys)} images in the labels file {path} are not among"
            f" those of {source.name}, {strangers[0]!r} for example; there, they are called like"
            f" {example!r}.{hint}"
        )
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"The labels file {path} names an image twice, {twice!r}; keep one line.")
    return np.array([known[key] for key in keys], dtype=np.int64)


def _parts(path: str, values: Sequence[Any]) -> npt.NDArray[np.int64]:
    numbers = {name: number for number, name in enumerate(PARTS)}
    wrong = [value for value in values if value not in numbers]
    if wrong:
        raise DataError(
            f"The labels file {path} needs one of {', '.join(PARTS)} as each part, got"
            f" {wrong[0]!r}."
        )
    return np.array([numbers[value] for value in values], dtype=np.int64)


def write_split(path: Path, images: ImageSet, parts: Split) -> None:
    """Write which image is in which part, a line each, by id; `relabel` reads it again.

    Labels of the unlabelled part are left out: no run is to learn from them.
    """
    part = np.full(len(images), PARTS.index("unlabelled"))
    for number, name in enumerate(PARTS):
        part[getattr(parts, name)] = number
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([ID_COLUMN, "name", "label", PART_COLUMN])
        for place in np.argsort(images.ids):
            label = int(images.labels[place])
            name = "" if images.paths is None else images.paths[place]
            hidden = PARTS[part[place]] == "unlabelled" or label == UNLABELLED
            table.writerow(
                [
                    images.ids[place],
                    name,
                    "" if hidden else images.classes[label],
                    PARTS[part[place]],
                ]
            )
