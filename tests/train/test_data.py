"""Commands on every kind of data, and what they write down of it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def test_a_written_split_gives_the_same_run(
    command: Any, same_weights: Any, tmp_path: Path
) -> None:
    first = command("finetune", tmp_path / "first", seed=3)
    assert first.code == 0, first.err
    table = first.folder / "split.csv"
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1797
    assert sum(row["part"] == "labelled" for row in rows) == 40
    assert all((row["label"] == "") == (row["part"] == "unlabelled") for row in rows)
    again = command(
        "finetune", tmp_path / "again", seed=3, labels_file=table, labels_per_class=None
    )
    assert again.code == 0, again.err
    assert same_weights(first, again)
    assert again.result["accuracy"] == first.result["accuracy"]
    assert (again.folder / "split.csv").read_bytes() == table.read_bytes()
