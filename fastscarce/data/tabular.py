"""Reading CSV, TSV and Parquet by columns."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fastscarce.errors import DataError

__all__ = [
    "PARQUET",
    "TEXT",
    "first_of",
    "line_of",
    "need",
    "open_parquet",
    "read_columns",
    "schema_of",
]

PARQUET = (".parquet", ".pq")
TEXT = (".csv", ".tsv")


def schema_of(path: str) -> pa.Schema:
    """Names and types of a table's columns; those of text are all strings.

    Raises:
        DataError: The file can't be read as what its name says.
    """
    if path.lower().endswith(PARQUET):
        with open_parquet(path) as file:
            return file.schema_arrow
    return _text_schema(path)


def open_parquet(path: str) -> pa.parquet.ParquetFile:
    """Open a Parquet table.

    Raises:
        DataError: It is none, or can't be read.
    """
    try:
        return pa.parquet.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is no Parquet table that can be read: {line_of(error)}."
        ) from error


def read_columns(path: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of a table, all rows.

    Raises:
        DataError: The file can't be read, or has no such column.
    """
    columns = list(dict.fromkeys(columns))
    if not path.lower().endswith(PARQUET):
        need(path, schema_of(path), columns)
        return _text(path, columns)
    with open_parquet(path) as file:
        need(path, file.schema_arrow, columns)
        if not columns:
            return pa.table({"": pa.nulls(file.metadata.num_rows)})
        try:
            return file.read(columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} can't be read: {line_of(error)}.") from error


def need(path: str, schema: pa.Schema, columns: Sequence[str]) -> None:
    """Refuse a table that lacks a column, or has it twice.

    Raises:
        DataError: Names the column, and those that there are.
    """
    for name in columns:
        if name not in schema.names:
            raise DataError(f"{path} has no column {name!r}; it has {', '.join(schema.names)}.")
        if schema.names.count(name) > 1:
            raise DataError(f"{path} has two columns {name!r}; rename one.")


def first_of(schema: pa.Schema, names: Sequence[str]) -> str | None:
    """The first of some names that a table has a column of, or None."""
    return next((name for name in names if name in schema.names), None)


def line_of(error: Exception) -> str:
    """An error's text on one line, without the full stop."""
    return " ".join(str(error).split()).rstrip(".")


def _text_options(path: str) -> pa.csv.ParseOptions:
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    return pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)


def _text_schema(path: str) -> pa.Schema:
    """The names of the first line. All are strings: a label 007 is a word."""
    try:
        with pa.csv.open_csv(path, parse_options=_text_options(path)) as file:
            return pa.schema([(name, pa.string()) for name in file.schema.names])
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path} is no table that can be read: {line_of(error)}.") from error


def _text(path: str, columns: list[str]) -> pa.Table:
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()),
        include_columns=columns,
        strings_can_be_null=False,
    )
    try:
        return pa.csv.read_csv(path, parse_options=_text_options(path), convert_options=convert)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path} is no table that can be read: {line_of(error)}.") from error
