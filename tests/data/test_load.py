from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastscarce.data import Failure, Reader, load, load_images, open_source, write_quarantine
from fastscarce.errors import DataError


@pytest.fixture
def root(tmp_path: Path, scans: list[Any]) -> Path:
    """Four images a class, one of each broken in its own way, and a broken one in the test."""
    for name, content, label in scans:
        for folder in ("", "test/"):
            path = tmp_path / "set" / f"{folder}{'abc'[label]}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (tmp_path / "set" / "a" / "3.png").write_bytes(scans[3][1][:50])
    (tmp_path / "set" / "b" / "4.png").unlink()
    (tmp_path / "set" / "b" / "4.png").symlink_to("4.png")  # to itself
    (tmp_path / "set" / "c" / "5.png").write_bytes(b"")
    (tmp_path / "set" / "test" / "a" / "0.png").write_bytes(b"no image")
    (tmp_path / "set" / "test" / "c" / "up").symlink_to(tmp_path / "set")  # a loop of folders
    return tmp_path / "set"


BROKEN = ["a/3.png", "b/4.png", "c/5.png", "test/a/0.png"]


def test_skip(root: Path) -> None:
    pool = load(f"folder:{root}", on_error="skip")
    assert sorted(failure.name for failure in pool.failures) == BROKEN
    reasons = {failure.name: failure.reason for failure in pool.failures}
    assert reasons["b/4.png"] == "it can't be read: Too many levels of symbolic links"
    assert reasons["c/5.png"] == "it is empty"
    assert reasons["test/a/0.png"] == "it is no image of a known format"
    assert "Error" in reasons["a/3.png"]
    assert len(pool) == 20
    assert pool.paths is not None
    assert not set(pool.paths) & set(BROKEN)
    for path, image, label in zip(pool.paths, pool.images, pool.labels, strict=True):
        number = int(Path(path).stem)
        assert (image == 20 * number).all()
        assert label == number % 3


def test_replace_keeps_ids_labels_and_splits(root: Path) -> None:
    whole = open_source(f"folder:{root}")
    pool = load_images(whole, on_error="replace")
    assert np.array_equal(pool.ids, whole.ids)
    assert np.array_equal(pool.labels, whole.labels)
    assert sorted(failure.name for failure in pool.failures) == BROKEN
    assert pool.paths is not None
    good = {path for path in pool.paths if path not in BROKEN}
    for path in BROKEN:
        image = pool.images[pool.paths.index(path)]
        folder = path.rpartition("/")[0]
        assert any((image == 20 * int(Path(p).stem)).all() for p in good if p.startswith(folder))
    again = load_images(open_source(f"folder:{root}"), on_error="replace")
    assert again.fingerprint() == pool.fingerprint()


def test_raise_names_the_first(root: Path) -> None:
    with pytest.raises(DataError, match=r"set: b/4\.png can't be decoded .* skip or replace"):
        load(f"folder:{root}")


@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_a_class_without_a_readable_image(root: Path, on_error: str) -> None:
    for path in (root / "b").iterdir():
        path.unlink()
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="Class b of set has no readable image"):
        load(f"folder:{root}", on_error=on_error)


def test_nothing_stands_in_for_the_only_unlabelled_image(root: Path) -> None:
    (root / "loose.png").write_bytes(b"broken")
    assert len(load(f"folder:{root}", on_error="skip")) == 20
    with pytest.raises(DataError, match=r"could stand in for loose\.png; set on_error to skip"):
        load(f"folder:{root}", on_error="replace")


@dataclasses.dataclass
class Vanishing:
    """Reads files, and removes one after all were read once."""

    inner: Reader
    path: Path
    left: int

    def read(self, positions: np.ndarray) -> Any:
        content = self.inner.read(positions)
        self.left -= len(positions)
        if self.left == 0:
            self.path.unlink()
        return content


def test_a_file_that_vanishes_between_two_looks(root: Path) -> None:
    for name in BROKEN:
        (root / name).unlink()
    source = open_source(f"folder:{root}")
    reader = Vanishing(source.reader, root / "a" / "6.png", len(source))
    pool = load_images(dataclasses.replace(source, reader=reader), on_error="skip")
    (failure,) = pool.failures
    assert (failure.name, failure.reason) == (
        "a/6.png",
        "it can't be read: No such file or directory",
    )
    assert len(pool) == len(source) - 1


@contextlib.contextmanager
def nobody(*folders: Path) -> Iterator[None]:
    """Without root's right to read everything, where the tests have it."""
    if os.geteuid() != 0:
        yield
        return
    for folder in folders:
        folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_that_may_not_be_read(root: Path) -> None:
    (root / "a" / "0.png").chmod(0)
    with nobody(*(folder for folder in root.parents if folder.owner() == root.owner())):
        pool = load(f"folder:{root}", on_error="skip")
    reasons = {failure.name: failure.reason for failure in pool.failures}
    assert reasons["a/0.png"] == "it can't be read: Permission denied"


def test_quarantine_is_a_table(tmp_path: Path) -> None:
    odd = b"\xff.png".decode("utf-8", "surrogateescape")
    failures = [
        Failure(7, 'a "b", c.png', "first"),
        Failure(-5, odd, "it is empty"),
        Failure(7, 'a "b", c.png', "last"),
    ]
    write_quarantine(tmp_path / "quarantine.csv", failures)
    with (tmp_path / "quarantine.csv").open(
        encoding="utf-8", errors="surrogateescape", newline=""
    ) as file:
        assert list(csv.reader(file)) == [
            ["id", "name", "reason"],
            ["-5", odd, "it is empty"],
            ["7", 'a "b", c.png', "last"],
        ]
