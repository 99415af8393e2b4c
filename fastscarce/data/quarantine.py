"""The list of samples that could not be read or decoded."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from fastscarce.data.source import Failure

__all__ = ["write_quarantine"]


def write_quarantine(path: Path, failures: Iterable[Failure]) -> None:
    """Write ids, names and reasons as CSV, a line a sample, by id; each sample once.

    Args:
        path: Of the file.
        failures: In any order; of one sample the last counts.
    """
    found = {failure.id: failure for failure in failures}
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", "name", "reason"])
        for number in sorted(found):
            table.writerow([number, found[number].name, found[number].reason])
