"""Selection against brute force, on inputs made to tie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscarce.pseudo import PseudoLabels, select

CLASSES = 4


def make(
    labels: list[int], confidence: list[float], agreement: list[float], ids: list[int]
) -> PseudoLabels:
    rows = len(labels)
    top = np.asarray(confidence, dtype=np.float32)
    return PseudoLabels(
        ids=np.asarray(ids, dtype=np.int64),
        log_probs=np.zeros((rows, CLASSES), dtype=np.float32),
        labels=np.asarray(labels, dtype=np.int64),
        confidence=top,
        margin=top,
        entropy=top,
        agreement=np.asarray(agreement, dtype=np.float32),
        chosen=np.ones(rows, dtype=np.bool_),
        repeats=np.full(rows, 9, dtype=np.int64),
    )


@st.composite
def tables(draw: st.DrawFn) -> PseudoLabels:
    rows = draw(st.integers(0, 40))
    numbers = st.integers(0, 8)  # few values, so that ties are common

    def column(of: st.SearchStrategy[int]) -> list[int]:
        return draw(st.lists(of, min_size=rows, max_size=rows))

    ids = draw(st.lists(st.integers(-50, 200), min_size=rows, max_size=rows, unique=True))
    return make(
        column(st.integers(0, CLASSES - 1)),
        [number / 8 for number in column(numbers)],
        [number / 8 for number in column(numbers)],
        ids,
    )


settings_of = st.fixed_dictionaries(
    {
        "threshold": st.sampled_from([0.0, 0.25, 0.6, 1.0, float("inf")]),
        "keep_per_class": st.one_of(st.none(), st.integers(1, 12)),
        "minimum_per_class": st.integers(0, 3),
        "minimum_agreement": st.sampled_from([0.0, 0.5, 1.0]),
        "max_repeats": st.one_of(st.none(), st.integers(1, 4)),
    }
)


def brute_force(
    labels: PseudoLabels,
    threshold: float,
    keep_per_class: int | None,
    minimum_per_class: int,
    minimum_agreement: float,
    max_repeats: int | None,
) -> dict[int, int]:
    """Repeats by id of the chosen rows, by taking one row at a time."""
    counts: dict[int, int] = {}
    for label in range(CLASSES):
        rows = sorted(
            (-float(c), int(i), float(a))
            for c, i, a, own in zip(
                labels.confidence, labels.ids, labels.agreement, labels.labels, strict=True
            )
            if own == label
        )
        good = [r for r in rows if -r[0] >= threshold and r[2] >= minimum_agreement]
        rest = [r for r in rows if r not in good]
        while len(good) < minimum_per_class and rest:
            good.append(rest.pop(0))
        if keep_per_class is None:
            counts |= {row[1]: 1 for row in good}
            continue
        good = good[:keep_per_class]
        for turn in range(keep_per_class if good else 0):
            row = good[turn % len(good)]
            counts[row[1]] = counts.get(row[1], 0) + 1
    if max_repeats is not None:
        counts = {key: min(value, max_repeats) for key, value in counts.items()}
    return counts


@settings(max_examples=200, deadline=None)
@given(tables(), settings_of)
def test_is_brute_force(labels: PseudoLabels, options: dict[str, object]) -> None:
    found = select(labels, **options)  # type: ignore[arg-type]
    wanted = brute_force(labels, **options)  # type: ignore[arg-type]
    rows = zip(found.ids, found.repeats, strict=True)
    assert {int(i): int(r) for i, r in rows if r} == wanted
    np.testing.assert_array_equal(found.chosen, found.repeats > 0)


@settings(max_examples=100, deadline=None)
@given(tables(), settings_of, st.randoms(use_true_random=False))
def test_does_not_depend_on_order(
    labels: PseudoLabels, options: dict[str, object], random: object
) -> None:
    order = list(range(len(labels)))
    random.shuffle(order)  # type: ignore[attr-defined]
    places = np.asarray(order, dtype=np.int64)
    plain = select(labels, **options)  # type: ignore[arg-type]
    shuffled = select(labels.take(places), **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(shuffled.ids, plain.ids[places])
    np.testing.assert_array_equal(shuffled.repeats, plain.repeats[places])


@settings(max_examples=100, deadline=None)
@given(tables(), st.integers(1, 12), st.sampled_from([0.0, 0.5, 1.0]))
def test_balances_every_class_it_keeps(labels: PseudoLabels, keep: int, threshold: float) -> None:
    found = select(labels, keep_per_class=keep, threshold=threshold)
    counts = np.bincount(found.labels, weights=found.repeats, minlength=CLASSES)
    predicted = np.bincount(found.labels, minlength=CLASSES) > 0
    np.testing.assert_array_equal(counts, np.where(predicted, keep, 0))


def test_choosing_again_gives_the_same() -> None:
    random = np.random.default_rng(0)
    rows = 500
    labels = make(
        list(random.integers(0, CLASSES, rows)),
        list(random.random(rows)),
        list(random.integers(0, 5, rows) / 4),
        list(random.permutation(rows)),
    )
    once = select(labels, threshold=0.5, keep_per_class=30)
    again = select(once, threshold=0.5, keep_per_class=30)
    np.testing.assert_array_equal(once.repeats, again.repeats)
    np.testing.assert_array_equal(labels.repeats, 9)  # the input is left alone


def test_a_threshold_read_off_a_confidence_keeps_that_row() -> None:
    """0.1 is another number in float32 than in float64; the row itself must still pass."""
    labels = make([0, 1], [0.1, 0.7], [1, 1], [3, 4])
    for value in labels.confidence:
        for threshold in (float(value), value.item()):
            kept = select(labels, threshold=threshold, minimum_per_class=0).chosen
            assert kept[labels.confidence == value].all()
    assert select(labels, threshold=0.1, minimum_per_class=0).chosen.all()


def test_many_rows_in_linear_memory() -> None:
    random = np.random.default_rng(1)
    rows, classes = 300_000, 1000
    top = random.integers(0, 1000, rows).astype(np.float32) / 1000
    labels = PseudoLabels(
        ids=random.permutation(rows),
        log_probs=np.zeros((rows, 2), dtype=np.float32),
        labels=random.integers(0, 2, rows),
        confidence=top,
        margin=top,
        entropy=top,
        agreement=np.ones(rows, dtype=np.float32),
        chosen=np.zeros(rows, dtype=np.bool_),
        repeats=np.zeros(rows, dtype=np.int64),
    )
    found = select(labels, keep_per_class=classes)
    for label in (0, 1):
        mine = found.labels == label
        best = sorted(zip(-top[mine], labels.ids[mine], strict=True))[:classes]
        assert {int(i) for _, i in best} == set(found.ids[mine & found.chosen].tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold of 0 or more"),
        ({"threshold": float("nan")}, "threshold of 0 or more"),
        ({"keep_per_class": 0}, "keep_per_class of 1 or more"),
        ({"max_repeats": 0}, "max_repeats of 1 or more"),
        ({"minimum_per_class": -1}, "minimum_per_class of 0 or more"),
        ({"minimum_agreement": 1.5}, r"minimum_agreement in \[0, 1\]"),
    ],
)
def test_refusals(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(make([0], [0.5], [1.0], [0]), **options)  # type: ignore[arg-type]


def test_rows_must_be_of_one_length() -> None:
    labels = make([0, 1], [0.5, 0.5], [1.0, 1.0], [0, 1])
    with pytest.raises(ValueError, match="2 rows of margin"):
        replace(labels, margin=labels.margin[:1])
