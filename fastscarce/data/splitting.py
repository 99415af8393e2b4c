"""Which images train, which are held out, which lose their label and which test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastscarce.augment.philox import keyed_order
from fastscarce.data.images import ImageSet
from fastscarce.data.source import UNLABELLED
from fastscarce.errors import DataError

__all__ = ["PARTS", "Given", "Split", "split"]

PARTS = ("labelled", "holdout", "unlabelled", "test")

_DRAW = 0x5911700  # the counter's word that sets these draws apart from a view's

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Positions into an `ImageSet`, int64, sorted; no position is in two of them.

    Attributes:
        labelled: Images whose labels train.
        holdout: Images whose labels only judge: models are chosen on them.
        unlabelled: Images used without a label, hidden or not there.
        test: Images that only the final report sees.
    """

    labelled: Positions
    holdout: Positions
    unlabelled: Positions
    test: Positions


@dataclass(frozen=True)
class Given:
    """What a file says of which labels may be used.

    Attributes:
        path: Of the file, for people.
        ids: int64 ``(rows,)``: the samples whose labels may be used, or whose part is given.
        parts: int64 ``(rows,)``: places in `PARTS`; None where the file leaves the parts open.
    """

    path: str
    ids: npt.NDArray[np.int64]
    parts: npt.NDArray[np.int64] | None


def split(
    images: ImageSet,
    *,
    labels_per_class: int | None,
    holdout_per_class: int,
    test_fraction: float,
    seed: int,
    given: Given | None = None,
) -> Split:
    """Split a data set class by class, by a keyed hash of ids: the listing's order doesn't matter.

    Args:
        images: The data set. Its own test split is used where it has one.
        labels_per_class: Labels kept for training; the others are hidden. None keeps all.
        holdout_per_class: Labels kept to choose models on, beside those.
        test_fraction: Of each class, where the set has no test split of its own; 0 to below 1.
        seed: Any integer.
        given: The labels that may be used; all of them are then. Labels of other images serve the
            test alone, where the set has no test split of its own. Where it gives the parts too,
            nothing is drawn, and images that it does not name are unlabelled.

    Raises:
        DataError: A number is out of its range, or a class has fewer labelled images than asked.
    """
    if labels_per_class is not None and labels_per_class < 1:
        raise DataError(f"labels_per_class must be at least 1, got {labels_per_class}.")
    if holdout_per_class < 0:
        raise DataError(f"holdout_per_class must be 0 or more, got {holdout_per_class}.")
    if not 0.0 <= test_fraction < 1.0:
        raise DataError(f"test_fraction must be from 0 to below 1, got {test_fraction}.")
    if given is not None and given.parts is not None:
        return _as_given(images, given, given.parts)
    usable = images.labels != UNLABELLED
    if given is not None:
        labels_per_class = None
        usable &= np.isin(images.ids, given.ids)
    own_test = bool(images.is_test.any())
    # The few labels are too dear for the test, where others are there.
    spare = bool((~usable & ~images.is_test & (images.labels != UNLABELLED)).any())
    order = keyed_order(seed, images.ids, view=0, draw=_DRAW)
    order = order[~images.is_test[order]]
    labelled, holdout, unlabelled = [], [], [order[images.labels[order] == UNLABELLED]]
    test = [np.flatnonzero(images.is_test)]
    for label, name in enumerate(images.classes):
        places = order[images.labels[order] == label]
        others, places = places[~usable[places]], places[usable[places]]
        tested = others if spare else places
        count = 0 if own_test or test_fraction == 0 else max(1, round(test_fraction * len(tested)))
        test.append(tested[:count])
        others, places = (others[count:], places) if spare else (others, places[count:])
        unlabelled.append(others)
        count = 0 if spare else count
        wanted = (1 if labels_per_class is None else labels_per_class) + holdout_per_class
        if len(places) < wanted:
            raise DataError(_too_few(name, len(places), count, labels_per_class, holdout_per_class))
        holdout.append(places[:holdout_per_class])
        places = places[holdout_per_class:]
        kept = len(places) if labels_per_class is None else labels_per_class
        labelled.append(places[:kept])
        unlabelled.append(places[kept:])
    parts = (np.sort(np.concatenate(p)) for p in (labelled, holdout, unlabelled, test))
    return Split(*(part.astype(np.int64) for part in parts))


def _as_given(images: ImageSet, given: Given, numbers: npt.NDArray[np.int64]) -> Split:
    part = np.full(len(images), PARTS.index("unlabelled"))
    found = dict(zip(given.ids.tolist(), numbers.tolist(), strict=True))
    for place, number in enumerate(images.ids.tolist()):
        part[place] = found.get(number, part[place])
    for name in ("labelled", "holdout", "test"):
        here = part == PARTS.index(name)
        if (images.labels[here] == UNLABELLED).any():
            raise DataError(f"{given.path} puts an image without a label into the part {name}.")
    labelled = images.labels[part == PARTS.index("labelled")]
    for label, name in enumerate(images.classes):
        if not (labelled == label).any():
            raise DataError(f"{given.path} has no labelled image of class {name}; add one.")
    return Split(*(np.flatnonzero(part == number) for number in range(len(PARTS))))


def _too_few(name: str, left: int, test: int, labels: int | None, holdout: int) -> str:
    asked = "at least 1 label" if labels is None else f"{labels} labels"
    taken = f" after {test} for the test" if test else ""
    return (
        f"Class {name} needs {asked} and {holdout} for the hold-out, but has {left} labelled"
        f" images{taken}; lower --labels-per-class, or add labelled images."
    )
