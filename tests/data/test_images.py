from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastscarce.data import images as module
from fastscarce.data import load
from fastscarce.errors import DataError


def test_digits() -> None:
    digits = load("digits")
    assert digits.images.shape == (1797, 8, 8, 1)
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    assert digits.classes == tuple("0123456789")
    assert digits.channels == 1
    assert not digits.flip
    assert load("digits", flip=True).flip


def test_fingerprint_sees_every_part_but_paths() -> None:
    digits = load("digits")
    first = digits.fingerprint()
    assert first == load("digits").fingerprint()
    assert first == dataclasses.replace(digits, name="other", paths=("x",) * 1797).fingerprint()
    pixels = digits.images.copy()
    pixels[77, 3, 3] ^= 1
    labels = digits.labels.copy()
    labels[5] = -1
    changes = (
        {"images": pixels},
        {"labels": labels},
        {"ids": digits.ids + 1},
        {"classes": tuple("abcdefghij")},
        {"is_test": ~digits.is_test},
    )
    for change in changes:
        assert dataclasses.replace(digits, **change).fingerprint() != first


def test_refuses_what_does_not_fit_together() -> None:
    digits = load("digits")
    with pytest.raises(DataError, match="two images with one id"):
        dataclasses.replace(digits, ids=digits.ids // 2)
    with pytest.raises(DataError, match="at least 2 classes, got 1"):
        dataclasses.replace(digits, classes=("0",))
    with pytest.raises(ValueError, match="labels of shape"):
        dataclasses.replace(digits, labels=digits.labels[1:])
    with pytest.raises(ValueError, match="uint8 images"):
        dataclasses.replace(digits, images=digits.images.astype(np.float32))


def test_refuses_a_pool_larger_than_memory() -> None:
    free = module.free_memory()
    assert free is not None
    assert free > 2**20
    with pytest.raises(DataError, match=r"needs .* GiB .* are free; ask for a smaller"):
        module.check_memory("huge", (2 * free // (224 * 224 * 3), 224, 224, 3))
    module.check_memory("small", (10, 8, 8, 1))


@pytest.mark.parametrize("spec", ["digit", "digits:x", "folder:", "csv:a.csv", ""])
def test_unknown_source(spec: str) -> None:
    with pytest.raises(
        DataError, match=r"must be digits or arrays:PATH, folder:PATH, .* or webdataset:PATH"
    ):
        load(spec)


def test_arrays_are_brought_to_a_size_too() -> None:
    digits, larger = load("digits"), load("digits", image_size=16)
    assert larger.images.shape == (1797, 16, 16, 1)
    assert np.array_equal(larger.ids, digits.ids)
    # Means of 2 by 2 pixels are near the pixel that they were made of.
    small = larger.images[:200, ..., 0].reshape(200, 8, 2, 8, 2).mean((2, 4))
    difference = np.abs(small - digits.images[:200, ..., 0])
    assert difference.mean() < 16
    assert load("digits", image_size=8).fingerprint() == digits.fingerprint()
