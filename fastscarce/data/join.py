"""A source with the samples of another one beside, as unlabelled ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fastscarce.data.source import UNLABELLED, Content, Names, Positions, Reader, Source, identify
from fastscarce.errors import DataError

__all__ = ["add_unlabelled"]


@dataclass(frozen=True)
class _JoinedReader:
    """Reads the first source's samples and, after them, the second's."""

    first: Reader
    second: Reader
    rows: int

    def read(self, positions: Positions) -> Content:
        later = positions >= self.rows
        if not later.any():
            return self.first.read(positions)
        if later.all():
            return self.second.read(positions - self.rows)
        parts = [self.first.read(positions[~later]), self.second.read(positions[later] - self.rows)]
        # Where each row of the two parts, one after the other, belongs.
        order = np.argsort(np.argsort(later, kind="stable"), kind="stable")
        if isinstance(parts[0], np.ndarray):
            joined: Content = np.concatenate(parts)[order]
            return joined
        rows = [*parts[0], *parts[1]]
        return [rows[place] for place in order.tolist()]


def add_unlabelled(source: Source, other: Source) -> Source:
    """A source and, after it, the samples of another one without their labels.

    Ids of the added samples are made of their names, or of their ids where they have none.

    Raises:
        DataError: One holds encoded images and the other arrays, or arrays of another size.
    """
    if source.shape != other.shape:
        raise DataError(
            f"The unlabelled images of {other.name} need to be {_kind(source)} like {source.name},"
            f" got {_kind(other)}."
        )
    keys = [
        f"unlabelled:{other.ids[place] if other.names is None else other.names[place]}"
        for place in range(len(other))
    ]
    names = None
    if source.names is not None or other.names is not None:
        names = Names([*(source.name_of(place) for place in range(len(source))), *keys])
    return replace(
        source,
        reader=_JoinedReader(source.reader, other.reader, len(source)),
        ids=np.concatenate([source.ids, identify(keys)]),
        labels=np.concatenate([source.labels, np.full(len(other), UNLABELLED, dtype=np.int64)]),
        is_test=np.concatenate([source.is_test, np.zeros(len(other), dtype=bool)]),
        names=names,
    )


def _kind(source: Source) -> str:
    if source.shape is None:
        return "encoded images"
    return f"arrays of {'x'.join(map(str, source.shape))}"
