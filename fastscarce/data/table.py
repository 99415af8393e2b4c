"""Tables: a row a sample, with the path of an image file or the encoded image itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fastscarce.data.classes import (
    CLASS_FILE,
    is_number,
    name_numbers,
    number_names,
    read_names,
)
from fastscarce.data.folder import FileReader
from fastscarce.data.index import Arrays, Index, keep, place_of
from fastscarce.data.paths import expand, is_remote, mark_test
from fastscarce.data.ranges import RangeReader
from fastscarce.data.source import UNLABELLED, Names, Source, identify
from fastscarce.data.tabular import (
    PARQUET,
    TEXT,
    first_of,
    line_of,
    need,
    open_parquet,
    read_columns,
    schema_of,
)
from fastscarce.errors import DataError, ResultsError
from fastscarce.files import write_whole

__all__ = ["open_table"]

_WHOLE = re.compile(r"-?[0-9]+(\.0+)?")
IMAGE_COLUMNS = ("image", "img", "path", "file_name", "filename", "file", "image_path", "bytes")
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label", "category")
SPLIT_COLUMN = "split"

_ROWS = 256  # of images, held at a time while they are unpacked


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str | None
    id: str | None
    split: str | None


def open_table(
    pattern: str,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    id_key: str | None = None,
    flip: bool | None = None,
) -> Source:
    """Open a CSV, TSV or Parquet table, several of them, or a folder of them.

    The column of images (``image``, ``path``, ``file_name``, ...) holds paths, absolute or relative
    to the table's folder, or, in Parquet, encoded images: bytes, or a struct of ``bytes`` and
    ``path`` as Hugging Face's data sets store them. The column of labels (``label``, ``class``,
    ``target``, ...) holds words or whole numbers; an empty one and a negative number is no label.
    A column ``split`` that says ``test``, or files named ``test...``, are the test split; where
    there are none, those of ``validation``. Encoded images are unpacked into the cache once,
    because a row of Parquet can't be read alone.

    Args:
        pattern: A file, a folder, or a pattern such as ``data/train-*.parquet``.
        image_key: Name of the column of images.
        label_key: Name of the column of labels.
        id_key: Name of a column of ids, whole numbers or words. By default an id is made of the
            path, or of the content where there is none.
        flip: Whether a mirrored image keeps its label; by default yes.

    Raises:
        DataError: A file or a column is missing or unreadable, or a value makes no sense.
    """
    if is_remote(pattern):
        raise DataError(f"A table must be a local file, got {pattern}; fetch it first.")
    files = expand(pattern, (*PARQUET, *TEXT))
    for path in files:
        if not path.lower().endswith((*PARQUET, *TEXT)):
            raise DataError(f"The table {path} must be {', '.join((*TEXT, *PARQUET))}.")
    key = "\n".join(["table", *map(os.path.abspath, files), repr((image_key, label_key, id_key))])
    index = keep(key, lambda: _index(files, key, image_key, label_key, id_key))
    arrays, facts = index.arrays, index.facts
    names = Names.of_block(arrays["names"], arrays["name_ends"])
    reader: FileReader | RangeReader
    if "start" in arrays:
        blob = (str(place_of(key, ".bin").with_name(str(facts["blob"]))),)
        file = np.zeros(len(names), dtype=np.int64)
        reader = RangeReader(blob, file, arrays["start"], arrays["size"])
    else:
        reader = FileReader(Names.of_block(arrays["paths"], arrays["path_ends"]), "")
    classes = facts["classes"]
    assert isinstance(classes, list)
    return Source(
        name=_name(pattern, files),
        reader=reader,
        ids=arrays["ids"],
        labels=arrays["labels"],
        classes=tuple(classes),
        is_test=arrays["is_test"],
        flip=True if flip is None else flip,
        names=names,
    )


def _name(pattern: str, files: Sequence[str]) -> str:
    if len(files) == 1:
        return Path(files[0]).stem
    path = Path(os.path.expanduser(pattern)).resolve()
    return path.name if path.is_dir() else path.parent.name


def _index(
    files: Sequence[str], key: str, image_key: str | None, label_key: str | None, id_key: str | None
) -> Index:
    first = schema_of(files[0])
    columns = _choose(files[0], first, image_key, label_key, id_key)
    kind = first.field(columns.image).type
    wanted = [name for name in (columns.label, columns.id, columns.split) if name]
    encoded = _is_encoded(kind)
    if not encoded and not _is_text(kind):
        raise DataError(
            f"{files[0]} needs paths or encoded images in the column {columns.image!r}, got {kind};"
            " name the right one by image_key."
        )
    tables = [read_columns(path, wanted if encoded else [columns.image, *wanted]) for path in files]
    counts = [table.num_rows for table in tables]
    labels, classes = _labels(files, tables, columns)
    arrays: Arrays = {}
    if encoded:
        blob, paths, digests, sizes = _unpack(files, columns.image, place_of(key, ".bin"))
        names, keys = _identities(paths, digests, labels)
        arrays["size"] = sizes
        arrays["start"] = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        made = [str(blob)]
    else:
        names, places = _paths(files, tables, columns.image)
        keys, made = names, []
        arrays["paths"], arrays["path_ends"] = Names(places).block
    arrays["names"], arrays["name_ends"] = Names(names).block
    arrays["ids"] = identify(keys) if columns.id is None else _ids(files, tables, columns.id)
    arrays["labels"] = labels
    arrays["is_test"] = _tests(files, tables, counts, columns)
    unlabelled = int((labels[arrays["is_test"].astype(bool)] == UNLABELLED).sum())
    if unlabelled:
        raise DataError(
            f"{unlabelled} images of the test split have no label; give them labels, or rename the"
            " files or the column split so that they are no test split."
        )
    watched = [*files, os.path.join(os.path.dirname(files[0]), CLASS_FILE)]
    facts: dict[str, object] = {
        "classes": list(classes),
        "blob": Path(made[0]).name if made else "",
    }
    return Index(arrays, facts, watched, made)


def _choose(
    path: str,
    schema: pa.Schema,
    image_key: str | None,
    label_key: str | None,
    id_key: str | None,
) -> _Columns:
    need(path, schema, [key for key in (image_key, label_key, id_key) if key is not None])

    image = image_key or first_of(schema, IMAGE_COLUMNS)
    if image is None:
        raise DataError(
            f"{path} needs a column of paths or images ({', '.join(IMAGE_COLUMNS)}), got"
            f" {', '.join(schema.names)}; name it by image_key."
        )
    columns = _Columns(
        image,
        label_key or first_of(schema, LABEL_COLUMNS),
        id_key,
        first_of(schema, [SPLIT_COLUMN]),
    )
    need(path, schema, [name for name in (image, columns.label, columns.split) if name])
    return columns


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_encoded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _column(tables: Sequence[pa.Table], name: str) -> list[Any]:
    return [value for table in tables for value in table.column(name).to_pylist()]


# ---- who the samples are


def _paths(
    files: Sequence[str], tables: Sequence[pa.Table], column: str
) -> tuple[list[str], list[str]]:
    """Each sample's path as it is written, below its table's folder, and where that is."""
    names: list[str] = []
    places: list[str] = []
    folders = [os.path.dirname(os.path.abspath(path)) for path in files]
    base = os.path.commonpath(folders)
    for path, folder, table in zip(files, folders, tables, strict=True):
        inner = "" if folder == base else os.path.relpath(folder, base)
        for row, value in enumerate(table.column(column).to_pylist()):
            if not value:
                raise DataError(f"{path} needs a path in every row, got none in row {row + 1}.")
            name = os.path.normpath(str(value))
            names.append(os.path.join(inner, name))
            places.append(os.path.join(folder, name))
    return names, places


def _identities(
    paths: list[str | None], digests: list[str], labels: npt.NDArray[np.int64]
) -> tuple[list[str], list[str]]:
    """Names and the keys of ids: the paths where they tell samples apart, else the contents.

    Equal contents are told apart by a number, in the order of their labels.
    """
    if all(paths) and len(set(paths)) == len(paths):
        names = [str(path) for path in paths]
        return names, names
    keys = list(digests)
    seen: dict[str, int] = {}
    for place in np.argsort(labels, kind="stable").tolist():
        again = seen.get(digests[place], 0)
        seen[digests[place]] = again + 1
        if again:
            keys[place] = f"{digests[place]}#{again}"
    return [path or key for path, key in zip(paths, keys, strict=True)], keys


def _ids(files: Sequence[str], tables: Sequence[pa.Table], column: str) -> npt.NDArray[np.int64]:
    values = _column(tables, column)
    if any(value is None or value == "" for value in values):
        raise DataError(f"{files[0]} needs an id in every row of the column {column!r}.")
    if all(isinstance(value, str) and _is_written_number(value) for value in values):
        values = [int(value) for value in values]
    if all(isinstance(value, int) for value in values):
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError as error:
            raise DataError(
                f"{files[0]} needs ids of 64 bits in the column {column!r}, got larger ones."
            ) from error
    return identify(str(value) for value in values)


def _is_written_number(word: str) -> bool:
    """Whether a word is what a whole number is written as: not 007."""
    return is_number(word) and str(int(word)) == word


def _tests(
    files: Sequence[str], tables: Sequence[pa.Table], counts: Sequence[int], columns: _Columns
) -> npt.NDArray[np.bool_]:
    if columns.split is not None:
        said = [str(_plain(value) or "").lower() for value in _column(tables, columns.split)]
        words = sorted(set(said))
        marks = dict(zip(words, mark_test(words), strict=True))
        return np.array([marks[word] for word in said], dtype=bool)
    return np.repeat(np.array(mark_test(files), dtype=bool), counts)


def _labels(
    files: Sequence[str], tables: Sequence[pa.Table], columns: _Columns
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    if columns.label is None:
        rows = sum(table.num_rows for table in tables)
        return np.full(rows, UNLABELLED, dtype=np.int64), ()
    names = _class_names(tables[0].schema, columns.label)
    if names is None:
        names = read_names(Path(files[0]).parent)
    values = [_plain(value) for value in _column(tables, columns.label)]
    if all(value is None or isinstance(value, int) for value in values):
        numbers = [UNLABELLED if value is None else value for value in values]
        if numbers and max(numbers) >= 1 << 63:
            raise DataError(
                f"{files[0]} needs labels that int64 holds in the column {columns.label!r}, got"
                f" {max(numbers)}."
            )
        return name_numbers(np.maximum(numbers, UNLABELLED).astype(np.int64), names)
    if any(isinstance(value, (list, dict, float)) for value in values):
        raise DataError(
            f"{files[0]} needs a word or a whole number in each row of the column"
            f" {columns.label!r}; name the column of labels by label_key."
        )
    words = [None if value is None else str(value) for value in values]
    if all(word is None or _WHOLE.fullmatch(word) for word in words):  # as pandas writes a gap
        words = [word and word.partition(".")[0] for word in words]
    return number_names(words, names)


def _plain(value: Any) -> Any:
    """A number that is whole as an integer, and no number at all as None."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        return None if np.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return value.strip() or None
    return value


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """The names that Hugging Face's metadata gives a column of class numbers."""
    try:
        facts = json.loads((schema.metadata or {})[b"huggingface"])
        names = facts["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return tuple(str(name) for name in (names.values() if isinstance(names, dict) else names))


# ---- encoded images


def _unpack(
    files: Sequence[str], column: str, place: Path
) -> tuple[Path, list[str | None], list[str], npt.NDArray[np.int64]]:
    """Write all encoded images one after the other; where, and their paths, digests and sizes.

    The file is named by its content: who has opened the table before it changed never reads other
    images for its own.
    """
    paths: list[str | None] = []
    digests: list[str] = []
    sizes: list[int] = []

    def write(path: Path) -> None:
        with path.open("wb") as blob:
            for content, name in _images(files, column):
                blob.write(content)
                paths.append(name)
                digests.append(hashlib.blake2b(content, digest_size=16).hexdigest())
                sizes.append(len(content))

    needed = sum(os.path.getsize(path) for path in files)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place.parent).free
        if needed > free:
            raise DataError(
                f"Unpacking {files[0]} needs {needed / 2**30:.1f} GiB in {place.parent}, where"
                f" {free / 2**30:.1f} GiB are free; name another folder by FASTSCARCE_CACHE."
            )
        write_whole(place, write)
        content = hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()
        blob = place.with_name(f"{place.stem}-{content}{place.suffix}")
        place.replace(blob)
        for old in set(place.parent.glob(f"{place.stem}-*{place.suffix}")) - {blob}:
            old.unlink()
    except (OSError, ResultsError) as error:
        raise DataError(
            f"The images of {files[0]} can't be unpacked into {place.parent} ({error}); name"
            " another folder by FASTSCARCE_CACHE."
        ) from error
    return blob, paths, digests, np.array(sizes, dtype=np.int64)


def _images(files: Sequence[str], column: str) -> Iterator[tuple[bytes, str | None]]:
    for path in files:
        with open_parquet(path) as file:
            need(path, file.schema_arrow, [column])
            batches = file.iter_batches(_ROWS, columns=[column])
            while True:
                try:
                    batch = next(batches, None)
                except (OSError, pa.ArrowException) as error:
                    raise DataError(f"{path} can't be read: {line_of(error)}.") from error
                if batch is None:
                    break
                for value in batch.column(0).to_pylist():
                    if isinstance(value, dict):
                        content, name = value["bytes"], value.get("path")
                    else:
                        content, name = value, None
                    if content is None and name is not None:
                        raise DataError(
                            f"{path} needs the encoded images in the column {column!r}, got only"
                            f" the path {name}; embed them, or give a column of paths."
                        )
                    if content is not None and not isinstance(content, bytes):
                        raise DataError(
                            f"{path} needs encoded images as bytes in the column {column!r}, got"
                            f" {type(content).__name__}."
                        )
                    yield content or b"", name
