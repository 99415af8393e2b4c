from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from fastscarce.data import load
from fastscarce.errors import DataError

FASHION = Path("/usr/share/datasets/fashion-mnist")


def encode(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write(folder: Path, *, packed: bool = False, test: bool = True) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (9, 5, 4))
    labels = np.arange(9) % 3
    folder.mkdir(exist_ok=True)
    parts = [("train", slice(0, 6 if test else 9))] + ([("t10k", slice(6, 9))] if test else [])
    for name, rows in parts:
        for stem, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = encode(array[rows])
            path = folder / f"{name}-{stem}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return images


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("test", [False, True])
def test_reads_what_was_written(tmp_path: Path, packed: bool, test: bool) -> None:
    images = write(tmp_path / "set", packed=packed, test=test)
    pool = load(f"idx:{tmp_path / 'set'}")
    assert np.array_equal(pool.images[..., 0], images)
    assert pool.labels.tolist() == (np.arange(9) % 3).tolist()
    assert pool.is_test.tolist() == [False] * 6 + [test] * 3
    assert pool.classes == ("0", "1", "2")
    assert not pool.flip


def test_names_and_flip(tmp_path: Path) -> None:
    write(tmp_path / "Fashion")
    fashion = load(f"idx:{tmp_path / 'Fashion'}")
    assert fashion.flip
    assert fashion.classes[9] == "Ankle boot"
    assert not load(f"idx:{tmp_path / 'Fashion'}", flip=False).flip
    (tmp_path / "Fashion" / "classes.txt").write_text("a\nb\nc\n", encoding="utf-8")
    assert load(f"idx:{tmp_path / 'Fashion'}").classes == ("a", "b", "c")
    (tmp_path / "Fashion" / "classes.txt").write_text("a\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"classes\.txt needs 3 class names.*got 1"):
        load(f"idx:{tmp_path / 'Fashion'}")


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist() -> None:
    pool = load(f"idx:{FASHION}")
    assert pool.images.shape == (70000, 28, 28, 1)
    assert np.bincount(pool.labels[pool.is_test]).tolist() == [1000] * 10
    assert pool.flip


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load(f"idx:{tmp_path / 'none'}")
    with pytest.raises(DataError, match="needs a file train-images-idx3-ubyte"):
        load(f"idx:{tmp_path}")
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="needs a file t10k-labels-idx1-ubyte"):
        load(f"idx:{tmp_path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "magic number 00000803, got nothing"),
        (encode(np.zeros(6)), "magic number 00000803, got 00000801"),
        (encode(np.zeros((6, 5, 4)))[:9], "ends within its header"),
        (encode(np.zeros((6, 5, 4)))[:-1], "needs 136 bytes for 6x5x4, got 135"),
        (encode(np.zeros((5, 5, 4))), "got 5 images and 6 labels"),
        (encode(np.zeros((6, 5, 5))), "images of one size, got 5x5 and 5x4"),
    ],
)
def test_broken(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(f"idx:{tmp_path}")


def test_truncated_gzip(tmp_path: Path) -> None:
    write(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"images-idx3-ubyte\.gz can't be read"):
        load(f"idx:{tmp_path}")
