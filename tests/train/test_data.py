"""Commands on every kind of data, and what they write down of it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest


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


SMALL: dict[str, Any] = {"labels_per_class": 4, "test_fraction": 0.3}


@pytest.mark.parametrize("kind", ["folder", "csv", "parquet", "webdataset", "arrays", "idx"])
def test_every_source_trains(
    command: Any, sources: dict[str, str], kind: str, tmp_path: Path
) -> None:
    done = command("finetune", tmp_path / "run", data=sources[kind], training__steps=40, **SMALL)
    assert done.code == 0, done.err
    assert "3 classes, 12 labelled, 0 held out, 51 unlabelled, 27 test images of 8x8" in done.out
    assert done.result["accuracy"] > 0.6  # of three digits; by chance a third
    assert not (done.folder / "quarantine.csv").exists()


def test_label_and_distill_from_parquet_and_a_table(
    command: Any, sources: dict[str, str], tmp_path: Path
) -> None:
    settings = {"data": sources["parquet"], **SMALL}
    teacher = command("finetune", tmp_path / "teacher", training__steps=40, **settings)
    table = command("label", tmp_path / "labels", teacher=teacher.folder, **settings)
    assert table.code == 0, table.err
    student = command("distill", tmp_path / "student", labels=table.folder, **settings)
    assert student.code == 0, student.err
    # Names are the ids' origin: labels of one kind of data are of no use for another's paths.
    other = {**settings, "data": sources["csv"]}
    refused = command("distill", tmp_path / "other", labels=table.folder, **other)
    assert refused.code == 2
    assert "images labelled in" in refused.err


def test_two_processes_train_from_shards(
    command: Any, in_two_processes: Any, sources: dict[str, str], tmp_path: Path
) -> None:
    settings = {"data": sources["webdataset"], "model__name": "small_cnn_gn", **SMALL}
    alone = command("finetune", tmp_path / "one", **settings)
    assert alone.code == 0, alone.err
    both = in_two_processes("finetune", tmp_path / "two", **settings)
    assert both.code == 0, both.err
    two = both.folder
    assert (two / "split.csv").read_bytes() == (alone.folder / "split.csv").read_bytes()
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (two, alone.folder)]
    assert manifests[0]["data"] == manifests[1]["data"]
    assert [manifest["processes"] for manifest in manifests] == [2, 1]


@pytest.mark.parametrize("on_error", ["raise", "skip", "replace"])
def test_broken_images_are_listed(
    command: Any, sources: dict[str, str], tmp_path: Path, on_error: str
) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(sources["folder"].removeprefix("folder:"), root)
    names = []
    for label, content in zip("012", (b"", b"no image", None), strict=True):
        path = min((root / label).iterdir())
        path.write_bytes(path.read_bytes()[:80] if content is None else content)
        names.append(f"{label}/{path.name}")
    done = command("finetune", tmp_path / "run", data=f"folder:{root}", on_error=on_error, **SMALL)
    if on_error == "raise":
        assert done.code == 2
        assert "set on_error to skip or replace" in done.err
        return
    assert done.code == 0, done.err
    with (done.folder / "quarantine.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["name"] for row in rows) == names
    assert {row["reason"] for row in rows} >= {"it is empty", "it is no image of a known format"}
    kept = len((done.folder / "split.csv").read_text(encoding="utf-8").splitlines()) - 1
    assert kept == (87 if on_error == "skip" else 90)
    assert done.out.count("skipped" if on_error == "skip" else "replaced") == 3
