from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from fastscarce.data import load, open_source
from fastscarce.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (9, 5, 4), dtype=np.uint8)
LABELS = np.arange(9) % 3


def test_npz_of_splits(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "scans.npz",
        train_images=IMAGES[:4],
        train_labels=LABELS[:4, None],
        val_images=IMAGES[4:7],
        val_labels=LABELS[4:7, None],
        test_images=IMAGES[7:],
        test_labels=LABELS[7:, None],
    )
    pool = load(f"arrays:{tmp_path / 'scans.npz'}")
    assert np.array_equal(pool.images[..., 0], IMAGES)
    assert pool.labels.tolist() == LABELS.tolist()
    assert pool.is_test.tolist() == [False] * 7 + [True] * 2
    assert pool.ids.tolist() == list(range(9))
    assert (pool.name, pool.flip) == ("scans", False)


def test_keras_names_channels_first_and_words(tmp_path: Path) -> None:
    colour = np.repeat(IMAGES[:, None], 3, axis=1)
    words = np.array(["b", "", "a", "b", "a", "b", "a", "b", "a"])
    np.savez(tmp_path / "s.npz", x_train=colour[:6], y_train=words[:6], x_val=colour[6:],
             y_val=words[6:])  # fmt: skip
    pool = load(f"arrays:{tmp_path / 's.npz'}", flip=True)
    assert pool.images.shape == (9, 5, 4, 3)
    assert np.array_equal(pool.images[..., 1], IMAGES)
    assert pool.labels.tolist() == [1, -1, 0, 1, 0, 1, 0, 1, 0]
    assert pool.is_test.tolist() == [False] * 6 + [True] * 3
    assert pool.flip


def test_folder_is_mapped_and_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", IMAGES[:6])
    np.save(tmp_path / "labels.npy", LABELS[:6] - 1)
    np.save(tmp_path / "test_images.npy", IMAGES[6:])
    np.save(tmp_path / "test_labels.npy", LABELS[6:])
    source = pickle.loads(pickle.dumps(open_source(f"arrays:{tmp_path}")))
    assert np.array_equal(source.read([7, 0, 6])[..., 0], IMAGES[[7, 0, 6]])
    assert source.labels.tolist() == [-1, 0, 1, -1, 0, 1, 0, 1, 2]
    assert len(pickle.dumps(source.reader)) < 1000
    alone = open_source(f"arrays:{tmp_path / 'images.npy'}")
    assert alone.fingerprint() == source.fingerprint()  # the other files lie beside it


def test_chosen_names_and_ids(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "s.npz",
        pixels=IMAGES,
        kind=LABELS,
        number=np.arange(9) + 70,
        classes=["x", "y", "z"],
    )
    path = f"arrays:{tmp_path / 's.npz'}"
    keys = {"image_key": "pixels", "label_key": "kind"}
    source = open_source(path, id_key="number", **keys)
    assert source.ids.tolist() == list(range(70, 79))
    assert source.classes == ("x", "y", "z")
    with pytest.raises(DataError, match=r"needs an array of images .* got pixels, kind"):
        open_source(path)
    with pytest.raises(DataError, match="no array 'key', which id_key names"):
        open_source(path, id_key="key", **keys)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES / 255.0, "labels": LABELS}, "needs uint8 images, got float64"),
        ({"images": IMAGES[0], "labels": LABELS}, r"needs images \(n, height, width\)"),
        ({"images": IMAGES, "labels": LABELS[1:]}, r"a label.* for each of the 9 images"),
        ({"images": IMAGES, "labels": np.eye(9)}, "a whole number or a word"),
        ({"images": IMAGES, "labels": np.array([None] * 9)}, "be read without pickle"),
        ({"images": IMAGES, "test_images": IMAGES[:, 1:]}, "images of one size, got 4x4x1 and 5x4"),
        ({"images": IMAGES, "labels": LABELS, "classes": ["x"]}, "need 3 class names, got 1"),
        ({"labels": LABELS}, "needs an array of images"),
    ],
)
def test_broken(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_source(f"arrays:{tmp_path / 's.npz'}")


def test_missing_and_no_array(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="do not exist; check the path"):
        open_source(f"arrays:{tmp_path / 'none.npz'}")
    (tmp_path / "s.npz").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"is no \.npz file"):
        open_source(f"arrays:{tmp_path / 's.npz'}")
    (tmp_path / "images.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"images\.npy is no array"):
        open_source(f"arrays:{tmp_path / 'images.npy'}")


def test_the_centre_of_what_is_not_square(tmp_path: Path) -> None:
    wide = np.zeros((4, 6, 10), dtype=np.uint8)
    wide[:, :, 2:8] = 200
    np.savez(tmp_path / "s.npz", images=wide, labels=[0, 1, 0, 1])
    assert load(f"arrays:{tmp_path / 's.npz'}").images.shape == (4, 6, 10, 1)
    square = load(f"arrays:{tmp_path / 's.npz'}", image_size=6).images
    assert square.shape == (4, 6, 6, 1)
    assert (square == 200).all()
