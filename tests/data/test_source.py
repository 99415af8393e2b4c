from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastscarce.data import Failure, Source, open_source
from fastscarce.data.source import Names, identify
from fastscarce.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in "ab":
        for number in range(3):
            path = tmp_path / "set" / label / f"{number} ü.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 40 * number + ord(label) - ord("a")).save(path)
    return tmp_path / "set"


def test_names_are_a_sequence_of_strings() -> None:
    words = ["", "a", "b/c d.png", "ü€", b"\xff\xfe.png".decode("utf-8", "surrogateescape")]
    names = Names(words)
    assert list(names) == words
    assert names[-1] == words[-1]
    assert names[1:3] == words[1:3]
    assert list(pickle.loads(pickle.dumps(names))) == words
    assert len(Names([])) == 0
    with pytest.raises(IndexError):
        names[5]


def test_ids_are_known_numbers() -> None:
    # From `printf cat/0.png | b2sum -l 64`, little endian: written out so that it never changes.
    assert identify(["cat/0.png"]).tolist() == [-2479782193165239757]
    assert identify([b"cat/0.png"]).tolist() == identify(["cat/0.png"]).tolist()


def test_reads_by_position(folder: Path) -> None:
    source = pickle.loads(pickle.dumps(open_source(f"folder:{folder}")))
    assert len(source) == 6
    assert source.encoded
    for position in (4, 0):
        (content,) = source.read([position])
        assert content == (folder / source.name_of(position)).read_bytes()
    digits = open_source("digits")
    assert not digits.encoded
    assert digits.shape == (8, 8, 1)
    assert digits.read([5, 3]).shape == (2, 8, 8, 1)
    assert digits.name_of(7) == "#7"


def test_what_vanishes_fails_alone(folder: Path) -> None:
    source = open_source(f"folder:{folder}")
    Path(folder, source.name_of(1)).unlink()
    with pytest.raises(DataError, match="can't be read: No such file"):
        source.read([0, 1, 2])
    first, second, third = source.read_each([0, 1, 2])
    assert second == Failure(
        int(source.ids[1]), "a/1 ü.png", "it can't be read: No such file or directory"
    )
    assert isinstance(first, bytes)
    assert isinstance(third, bytes)


def test_fingerprint_is_of_content_and_not_of_order(folder: Path) -> None:
    source = open_source(f"folder:{folder}")
    first = source.fingerprint()
    order = np.random.default_rng(0).permutation(len(source))
    shuffled = dataclasses.replace(
        source,
        reader=Reordered(source, order),
        ids=source.ids[order],
        labels=source.labels[order],
        is_test=source.is_test[order],
        names=None,
    )
    assert shuffled.fingerprint() == first
    path = folder / source.name_of(2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    changed = source.fingerprint()
    path.unlink()
    assert len({first, changed, source.fingerprint()}) == 3


@dataclasses.dataclass(frozen=True)
class Reordered:
    source: Source
    order: np.ndarray

    def read(self, positions: np.ndarray) -> list[bytes] | np.ndarray:
        return self.source.read(self.order[positions])


def test_refuses_what_does_not_fit_together() -> None:
    digits = open_source("digits")
    with pytest.raises(DataError, match=r"digits has two images with one id, #\d+ and #\d+"):
        dataclasses.replace(digits, ids=digits.ids // 2)
    with pytest.raises(ValueError, match="1797 labels, one a sample, got 1796"):
        dataclasses.replace(digits, labels=digits.labels[1:])
    with pytest.raises(ValueError, match="labels from -1 to 8, got 0 to 9"):
        dataclasses.replace(digits, classes=digits.classes[:9])


def test_unlabelled_images_of_another_kind(folder: Path, tmp_path: Path) -> None:
    names = [f"{label}/{number} ü.png" for label in "ab" for number in range(3)]
    table = "path,label\n" + "".join(f"{name},x\n" for name in names)
    (folder / "t.csv").write_text(table, encoding="utf-8")
    joined = open_source(f"folder:{folder}", unlabelled=f"table:{folder / 't.csv'}")
    assert joined.labels.tolist() == [0, 0, 0, 1, 1, 1] + [-1] * 6
    assert joined.name_of(7) == "unlabelled:a/1 ü.png"
    contents = [(folder / name).read_bytes() for name in names]
    assert joined.read([10, 0, 6, 5]) == [contents[4], contents[0], contents[0], contents[5]]
    other = open_source(f"table:{folder / 't.csv'}", unlabelled=str(folder))
    assert len(other) == 12
    assert set(joined.ids[6:].tolist()) == set(other.ids[6:].tolist())
    with pytest.raises(DataError, match=r"need to be encoded images .* got arrays of 8x8x1"):
        open_source(f"folder:{folder}", unlabelled="digits")
    twice = open_source("digits", unlabelled="digits")
    assert (twice.read([5, 1800]) == open_source("digits").read([5, 3])).all()


def test_keys_are_for_kinds_that_have_them(folder: Path) -> None:
    with pytest.raises(DataError, match="id_key is for data of the form arrays:PATH or table:PATH"):
        open_source(f"folder:{folder}", id_key="id")
