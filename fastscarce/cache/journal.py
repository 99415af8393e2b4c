"""What has been written for good: a file a writer, a line a shard, each with its own checksum.

A line is appended after its shard has its final name, so a line's shard is there; where a process
died in between, the next one appends it. What follows the last newline was being written when its
process died, and counts for nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastscarce.cache.checksum import seal, unseal
from fastscarce.errors import CacheError
from fastscarce.files import flush, write_whole

__all__ = ["Journal", "Line", "journals", "read_journal"]

_NAME = re.compile(r"^(rank\d{3,}|compact)\.journal$")


@dataclass(frozen=True)
class Line:
    """A shard that is there.

    Attributes:
        shard: Its file, relative to the table's folder.
        view: Of all its rows.
        rows: How many it has.
        size: Of its file, in bytes.
        first_id: The lowest of its sample ids.
        last_id: The highest.
        checksum: Of its whole file.
        sums: What the table's quality is made of, summed over rows, by name.
        sentinels: ``[sample id, hash of the view's pixels, the teacher's first class]`` of a few.
    """

    shard: str
    view: int
    rows: int
    size: int
    first_id: int
    last_id: int
    checksum: str
    sums: dict[str, float] = field(default_factory=dict)
    sentinels: list[list[Any]] = field(default_factory=list)


class Journal:
    """The journal of one writer; several processes each have their own."""

    def __init__(self, folder: Path, writer: str) -> None:
        self._path = folder / f"{writer}.journal"
        # A half line of a process that died must not run into the next one.
        if self._path.exists():
            content = self._path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                write_whole(self._path, lambda place: place.write_bytes(whole))

    def append(self, line: Line) -> None:
        """Add a line for good.

        Raises:
            OSError: It can't be written; a part of a line may be there, which counts for nothing.
        """
        new = not self._path.exists()
        with self._path.open("ab") as file:
            file.write(seal(asdict(line)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            flush(self._path.parent)


def journals(folder: Path) -> list[Path]:
    """All journals of a table, in the order of their names."""
    return sorted(path for path in folder.iterdir() if _NAME.match(path.name))


def read_journal(path: Path, damage: list[str] | None = None) -> list[Line]:
    """The lines of a journal.

    Args:
        path: Of the file.
        damage: Gets a sentence for each line that can't be read, and for a half one at the end.
            None: the first such line but the half one is an error.

    Raises:
        CacheError: A line is not as it was written.
    """
    names = {entry.name for entry in fields(Line)}
    lines = []
    *whole, rest = path.read_bytes().split(b"\n")
    for number, text in enumerate(whole, start=1):
        try:
            content = unseal(text.decode())
            lines.append(Line(**{name: content[name] for name in names}))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            complaint = f"{path}, line {number} is damaged ({error})"
            if damage is None:
                raise CacheError(
                    f"{complaint}; `fastscarce cache gc` drops it, and `cache build` makes its "
                    "rows again."
                ) from error
            damage.append(complaint)
    if rest and damage is not None:
        damage.append(f"{path} ends in half a line")
    return lines


def rewrite_journal(path: Path, lines: Iterable[Line]) -> None:
    """Replace a journal by these lines, or remove it where there are none."""
    content = "".join(seal(asdict(line)) + "\n" for line in lines)
    if content:
        write_whole(path, lambda place: place.write_text(content, encoding="utf-8"))
    else:
        path.unlink(missing_ok=True)
