from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastscarce.data import (
    Given,
    ImageSet,
    Split,
    load,
    load_images,
    open_source,
    relabel,
    split,
    write_split,
)
from fastscarce.errors import DataError

DRAWN = {"labels_per_class": 3, "holdout_per_class": 1, "test_fraction": 0.25, "seed": 0}


@pytest.fixture
def flat(tmp_path: Path, scans: list[Any]) -> Path:
    """A folder of images without a class."""
    (tmp_path / "flat").mkdir()
    for name, content, _ in scans:
        (tmp_path / "flat" / name).write_bytes(content)
    return tmp_path / "flat"


def same(left: Split, right: Split) -> bool:
    pairs = zip(dataclasses.astuple(left), dataclasses.astuple(right), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def relabelled(spec: str, path: Path) -> tuple[ImageSet, Given]:
    source, given = relabel(open_source(spec), path)
    return load_images(source), given


def test_what_was_written_splits_alike(tmp_path: Path) -> None:
    digits = load("digits")
    parts = split(digits, **DRAWN)
    write_split(tmp_path / "split.csv", digits, parts)
    lines = (tmp_path / "split.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "id,name,label,part"
    assert len(lines) == 1798
    hidden = [line for line in lines if line.endswith(",unlabelled")]
    assert len(hidden) == len(parts.unlabelled)
    assert all(line.endswith(",,,unlabelled") for line in hidden)
    images, given = relabelled("digits", tmp_path / "split.csv")
    assert same(split(images, **{**DRAWN, "seed": 9, "labels_per_class": 1}, given=given), parts)


def test_names_with_spaces_and_numbers_that_are_names(tmp_path: Path, scans: list[Any]) -> None:
    for name in (" sp ", "sp"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number, content, _ in scans[:4]:
            (tmp_path / "set" / name / number).write_bytes(content)
    images = load(f"folder:{tmp_path / 'set'}")
    parts = split(images, labels_per_class=2, holdout_per_class=0, test_fraction=0.25, seed=0)
    write_split(tmp_path / "split.csv", images, parts)
    again, given = relabelled(f"folder:{tmp_path / 'set'}", tmp_path / "split.csv")
    assert again.labels.tolist() == images.labels.tolist()
    assert same(split(again, **DRAWN, given=given), parts)

    for name, content, label in scans:
        (tmp_path / "numbers" / str(label + 1)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "numbers" / str(label + 1) / name).write_bytes(content)
    few = tmp_path / "few.csv"
    few.write_text("name,label\n1/0.png,0\n2/1.png,1\n", encoding="utf-8")
    with pytest.raises(DataError, match="label '0' is none of the classes 1, 2, 3"):
        relabelled(f"folder:{tmp_path / 'numbers'}", few)
    few.write_text("name,label\n1/0.png,0\n2/1.png,0\n", encoding="utf-8")  # places, all of them
    found, _ = relabelled(f"folder:{tmp_path / 'numbers'}", few)
    assert found.paths is not None
    assert found.labels[found.paths.index("2/1.png")] == 0


def test_labels_of_a_folder_without_classes(flat: Path, tmp_path: Path) -> None:
    rows = [f"{number}.png,{'ba'[number % 2]}" for number in range(8)] + ["9.png,"]
    (tmp_path / "labels.csv").write_text("name,label\n" + "\n".join(rows), encoding="utf-8")
    images, given = relabelled(f"folder:{flat}", tmp_path / "labels.csv")
    assert images.classes == ("a", "b")
    assert images.paths is not None
    labels = dict(zip(images.paths, images.labels.tolist(), strict=True))
    assert [labels[f"{number}.png"] for number in (0, 1, 9, 11)] == [1, 0, -1, -1]
    parts = split(images, **DRAWN, given=given)
    # Of four labels a class: one to the test, one to the hold-out, two to train.
    assert [len(part) for part in dataclasses.astuple(parts)] == [4, 2, 4, 2]
    write_split(tmp_path / "split.csv", images, parts)
    again, given = relabelled(f"folder:{flat}", tmp_path / "split.csv")
    assert same(split(again, **DRAWN, given=given), parts)


def test_test_is_taken_from_labels_that_may_not_be_used(tmp_path: Path) -> None:
    digits = load("digits")
    few = np.concatenate([np.flatnonzero(digits.labels == label)[:5] for label in range(10)])
    table = pa.table({"id": digits.ids[few], "label": digits.labels[few]})
    pq.write_table(table, tmp_path / "labels.parquet")
    images, given = relabelled("digits", tmp_path / "labels.parquet")
    parts = split(images, **DRAWN, given=given)
    assert np.array_equal(np.sort(np.concatenate([parts.labelled, parts.holdout])), np.sort(few))
    assert len(parts.holdout) == 10
    assert abs(len(parts.test) - 0.25 * 1747) < 10
    assert len(parts.labelled) + len(parts.holdout) + len(parts.test) + len(
        parts.unlabelled
    ) == len(images)


def test_the_file_corrects_the_source(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,label\n0,7\n1,7\n", encoding="utf-8")
    source, given = relabel(open_source("digits"), tmp_path / "labels.csv")
    assert source.labels[:4].tolist() == [7, 7, 2, 3]
    assert given.ids.tolist() == [0, 1]
    with pytest.raises(DataError, match="Class 0 needs at least 1 label"):
        split(load_images(source), **DRAWN, given=given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,kind\n0,1\n", "needs a column id or name and a column label, got id, kind"),
        ("id,label\nx,1\n", "needs whole numbers as ids"),
        ("name,label\nx,1\n", "needs a column id, since digits has no names"),
        ("id,label\n0,0\n9999,1\n5555,2\n", "2 of the 3 images .* 9999 for example; .* like 0"),
        ("id,label\n3,0\n3,1\n", "names an image twice, 3"),
        ("id,label\n0,cat\n", "'cat' is none of the classes 0, 1, 2"),
        ("id,label,part\n0,1,train\n", "one of labelled, holdout, unlabelled, test .* got 'train'"),
    ],
)
def test_broken(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        relabel(open_source("digits"), tmp_path / "labels.csv")


def test_parts_that_make_no_sense(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("id,label,part\n0,0,labelled\n", encoding="utf-8")
    images, given = relabelled("digits", path)
    with pytest.raises(DataError, match="has no labelled image of class 1; add one"):
        split(images, **DRAWN, given=given)
    (tmp_path / "set").mkdir()
    np.savez(
        tmp_path / "s.npz",
        images=np.zeros((3, 2, 2), dtype=np.uint8),
        labels=np.array([0, 1, -1]),
    )
    path.write_text("id,label,part\n2,,test\n", encoding="utf-8")
    images, given = relabelled(f"arrays:{tmp_path / 's.npz'}", path)
    with pytest.raises(DataError, match="an image without a label into the part test"):
        split(images, **DRAWN, given=given)
    with pytest.raises(DataError, match=r"must be \.csv, \.tsv or \.parquet"):
        relabel(open_source("digits"), tmp_path / "labels.txt")
