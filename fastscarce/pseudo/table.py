"""Pseudo-labels on the disk: a Parquet table to query, and the soft rows beside it.

``pseudo_labels.parquet`` has a row an image: id, path, label, class_name, confidence, margin,
entropy, agreement, chosen, repeats. ``pseudo_labels/log_probs.safetensors`` has the same ids and
the log-probabilities, in a folder of its own because timm takes any such file beside a
``config.json`` for the model's. The table names the checksum of the soft rows, so that the two
can't be mixed up with those of another run, and both are checked when they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastscarce.errors import DataError
from fastscarce.files import write_whole
from fastscarce.pseudo.label import PseudoLabels

__all__ = ["VERSION", "LabelTable", "read_parquet", "write_parquet"]

VERSION = 1
KEY = b"fastscarce"
CURE = "make it again with `fastscarce label`"
COLUMNS = (
    ("id", pa.int64()),
    ("path", pa.string()),
    ("label", pa.int64()),
    ("class_name", pa.string()),
    ("confidence", pa.float32()),
    ("margin", pa.float32()),
    ("entropy", pa.float32()),
    ("agreement", pa.float32()),
    ("chosen", pa.bool_()),
    ("repeats", pa.int64()),
)


@dataclass(frozen=True)
class LabelTable:
    """What `read_parquet` found.

    Attributes:
        labels: The rows, lowest id first.
        paths: One an image in the same order, relative to its folder; ``None`` where the images
            have none.
        class_names: One a class.
    """

    labels: PseudoLabels
    paths: tuple[str, ...] | None
    class_names: tuple[str, ...]


def soft_path(path: str | Path) -> Path:
    """Where the soft rows of a table lie: in the folder of its name."""
    return Path(path).with_suffix("") / "log_probs.safetensors"


def write_parquet(
    path: str | Path,
    labels: PseudoLabels,
    *,
    class_names: Sequence[str],
    paths: Sequence[str] | None = None,
    half: bool = False,
) -> Path:
    """Write the table and its soft rows, each whole or not at all, lowest id first.

    Args:
        path: The table, ending in ``.parquet``. Its folder is made where it is missing.
        labels: What to write.
        class_names: One a class.
        paths: One a row of ``labels``, or ``None``.
        half: Store log-probabilities as float16: half the size, within 0.1 % of each value.

    Returns:
        ``path``.

    Raises:
        ValueError: There are not as many names as classes, or not as many paths as rows.
        ResultsError: A file can't be written.
    """
    place = Path(path)
    if place.suffix != ".parquet":
        raise ValueError(f"write_parquet needs a path that ends in .parquet, got {place}.")
    if len(class_names) != labels.classes:
        raise ValueError(
            f"write_parquet needs {labels.classes} class names, got {len(class_names)}."
        )
    if paths is not None and len(paths) != len(labels):
        raise ValueError(f"write_parquet needs {len(labels)} paths, got {len(paths)}.")
    order = np.argsort(labels.ids, kind="stable")
    rows = labels.take(order)
    soft: NDArray[Any] = rows.log_probs.astype(np.float32)
    if half:
        # Beyond float16's range a log-probability would become an infinity.
        soft = np.maximum(soft, np.finfo(np.float16).min).astype(np.float16)
    head: dict[str, Any] = {
        "version": VERSION,
        "class_names": list(class_names),
        "soft": _digest(rows.ids, soft),
    }
    head["check"] = _check(head)
    values = {
        "id": rows.ids,
        "path": [None] * len(rows) if paths is None else [paths[place] for place in order],
        "label": rows.labels,
        "class_name": [class_names[label] for label in rows.labels],
        "confidence": rows.confidence,
        "margin": rows.margin,
        "entropy": rows.entropy,
        "agreement": rows.agreement,
        "chosen": rows.chosen,
        "repeats": rows.repeats,
    }
    table = pa.table(
        [pa.array(values[name], type=kind) for name, kind in COLUMNS],
        schema=pa.schema(
            [pa.field(name, kind) for name, kind in COLUMNS], metadata={KEY: json.dumps(head)}
        ),
    )
    write_whole(soft_path(place), lambda temporary: _save_soft(temporary, rows.ids, soft, head))
    # The table goes last: where it is, its soft rows are.
    return write_whole(
        place,
        lambda temporary: pq.write_table(
            table, temporary, compression="zstd", write_page_checksum=True
        ),
    )


def read_parquet(path: str | Path) -> LabelTable:
    """Read a table and its soft rows, and check that they are whole and belong together.

    Args:
        path: The table, ending in ``.parquet``.

    Returns:
        The labels as they were written (log-probabilities as float32), lowest id first.

    Raises:
        DataError: A file is missing, damaged, of another run or of a newer version.
    """
    place = Path(path)
    beside = soft_path(place)
    for file in (place, beside):
        if not file.is_file():
            raise DataError(f"{file} is needed for the pseudo-labels and is missing; {CURE}.")
    try:
        table = pq.read_table(place, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{place} is damaged or no Parquet file ({_line(error)}); {CURE}."
        ) from error
    head = _head(place, table)
    try:
        with safe_open(beside, framework="numpy") as file:
            ids, soft = file.get_tensor("id"), file.get_tensor("log_probs")
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{beside} is damaged or no safetensors file ({_line(error)}); {CURE}."
        ) from error
    if _digest(ids, soft) != head["soft"]:
        raise DataError(f"{beside} is damaged or of another run than {place.name}; {CURE}.")
    column = {
        name: table[name].to_numpy() for name, _ in COLUMNS if name not in ("path", "class_name")
    }
    try:
        labels = PseudoLabels(
            ids=column["id"],
            log_probs=soft.astype(np.float32),
            labels=column["label"],
            confidence=column["confidence"],
            margin=column["margin"],
            entropy=column["entropy"],
            agreement=column["agreement"],
            chosen=column["chosen"],
            repeats=column["repeats"],
        )
    except ValueError as error:
        raise DataError(f"{place} is damaged ({_line(error)}); {CURE}.") from error
    paths = None if table["path"].null_count else tuple(table["path"].to_pylist())
    return LabelTable(labels, paths, tuple(head["class_names"]))


def _head(place: Path, table: pa.Table) -> dict[str, Any]:
    """The table's own header, once it is known to be one that this version can read."""
    try:
        head: dict[str, Any] = json.loads((table.schema.metadata or {})[KEY])
        version = int(head["version"])
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{place} is no table of fastscarce's pseudo-labels; {CURE}.") from error
    if version > VERSION:
        raise DataError(
            f"{place} is of version {version} and this fastscarce reads up to {VERSION}; "
            f"install a newer fastscarce or {CURE}."
        )
    if head.get("check") != _check(head):
        raise DataError(f"{place} is damaged (its header's checksum differs); {CURE}.")
    if [(field.name, field.type) for field in table.schema] != list(COLUMNS):
        raise DataError(f"{place} has other columns than fastscarce writes; {CURE}.")
    return head


def _save_soft(
    place: Path, ids: NDArray[np.int64], soft: NDArray[Any], head: dict[str, Any]
) -> None:
    """Write the soft rows; one entry of metadata, since several come in no fixed order."""
    metadata = {KEY.decode(): json.dumps({key: head[key] for key in ("version", "class_names")})}
    content = {"id": ids, "log_probs": np.ascontiguousarray(soft)}
    place.write_bytes(save(content, metadata=metadata))


def _check(head: dict[str, Any]) -> str:
    """A checksum of the header's other entries."""
    rest = {key: value for key, value in head.items() if key != "check"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()


def _digest(ids: NDArray[Any], soft: NDArray[Any]) -> str:
    """A checksum of ids and soft rows, of their dtype and shape too."""
    state = hashlib.blake2b(digest_size=16)
    for array in (ids, soft):
        state.update(f"{array.dtype.str} {array.shape} ".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


def _line(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
