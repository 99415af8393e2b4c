from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastscarce.data import ImageSet, load, split
from fastscarce.errors import DataError


def small(counts: tuple[int, ...], *, unlabelled: int = 0, test: int = 0) -> ImageSet:
    labels = np.concatenate(
        [np.full(count, label) for label, count in enumerate(counts)] + [np.full(unlabelled, -1)]
    ).astype(np.int64)
    is_test = np.arange(labels.size) % 3 == 0 if test else np.zeros(labels.size, dtype=bool)
    return ImageSet(
        name="small",
        images=np.zeros((labels.size, 2, 2, 1), dtype=np.uint8),
        labels=labels,
        ids=np.arange(labels.size, dtype=np.int64) * 5 + 1,
        paths=None,
        classes=tuple("abcdef"[: len(counts)]),
        is_test=is_test & (labels >= 0),
        flip=False,
    )


def parts_of(images: ImageSet, **options: object) -> dict[str, np.ndarray]:
    settings = {
        "labels_per_class": 4,
        "holdout_per_class": 2,
        "test_fraction": 1 / 3,
        "seed": 0,
        **options,
    }
    return dataclasses.asdict(split(images, **settings))


def test_parts_are_disjoint_and_whole() -> None:
    images = load("digits")
    parts = parts_of(images)
    everything = np.concatenate(list(parts.values()))
    assert np.array_equal(np.sort(everything), np.arange(len(images)))
    assert np.bincount(images.labels[parts["labelled"]]).tolist() == [4] * 10
    assert np.bincount(images.labels[parts["holdout"]]).tolist() == [2] * 10
    share = np.bincount(images.labels[parts["test"]]) / np.bincount(images.labels)
    assert np.abs(share - 1 / 3).max() < 0.005


def test_the_seed_alone_decides_not_the_listing() -> None:
    images = load("digits")
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = dataclasses.replace(
        images, images=images.images[order], labels=images.labels[order], ids=images.ids[order]
    )
    assert shuffled.fingerprint() == images.fingerprint()
    one, other, reseeded = parts_of(images), parts_of(shuffled), parts_of(images, seed=1)
    for name, places in one.items():
        assert np.array_equal(np.sort(images.ids[places]), np.sort(shuffled.ids[other[name]]))
        assert not np.array_equal(places, reseeded[name])


def test_all_labels_and_own_test_split() -> None:
    images = small((9, 12), unlabelled=5, test=1)
    parts = parts_of(images, labels_per_class=None)
    assert np.array_equal(parts["test"], np.flatnonzero(images.is_test))
    assert np.array_equal(parts["unlabelled"], np.flatnonzero(images.labels == -1))
    assert len(parts["labelled"]) == (~images.is_test).sum() - 5 - 4


def test_too_few_names_the_class_and_its_count() -> None:
    with pytest.raises(DataError, match=r"Class b needs 4 labels and 2 .* has 3 labelled.*after 2"):
        parts_of(small((30, 5)))


@pytest.mark.parametrize(
    "options", [{"labels_per_class": 0}, {"holdout_per_class": -1}, {"test_fraction": 1.0}]
)
def test_refusals(options: dict[str, float]) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        parts_of(small((30, 30)), **options)
