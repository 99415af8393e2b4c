"""Calibration against what is known of the data that was drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscarce.pseudo import (
    expected_calibration_error,
    from_logits,
    temperature,
    threshold_for_precision,
)


def drawn(rows: int, sharpness: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are `sharpness` times those the labels were drawn from."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(rows, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return logits * sharpness, labels


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 2.5])
def test_finds_the_temperature_of_the_draw(sharpness: float) -> None:
    logits, labels = drawn(20_000, sharpness)
    assert temperature(logits, labels) == pytest.approx(sharpness, rel=0.03)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("imagined", [0.0, 1.0, 5.0])
def test_is_the_minimum_of_the_loss(views: int, imagined: float) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, labels = drawn(60, 3.0)
    many = logits + torch.randn(views, 60, 10, generator=generator)
    found = temperature(many, labels, imagined=imagined)

    def loss(t: float) -> float:
        probabilities = (many.double() / t).softmax(-1).mean(0)
        target = torch.full((60, 10), imagined / (60 + imagined) / 10, dtype=torch.float64)
        target[torch.arange(60), labels] += 60 / (60 + imagined)
        return float(-(target * probabilities.log()).sum(-1).mean())

    near = [loss(found * factor) for factor in (0.5, 0.8, 0.97, 0.999, 1.001, 1.03, 1.25, 2.0)]
    assert loss(found) <= min(near)


def test_one_view_may_leave_out_its_axis() -> None:
    logits, labels = drawn(50, 2.0)
    assert temperature(logits, labels) == temperature(logits[None], labels)


def test_a_wholly_right_hold_out_does_not_make_everything_certain() -> None:
    labels = torch.arange(20) % 10
    logits = 3.0 * torch.eye(10)[labels]
    careful = temperature(logits, labels)
    assert temperature(logits, labels, imagined=0.0) == pytest.approx(0.05, rel=1e-3)
    confidence = from_logits(range(20), logits[None], temperature=careful).confidence
    # 20 right ones of 20 and one imagined that is right one time in ten.
    assert confidence.mean() == pytest.approx(20.1 / 21, abs=1e-3)


def test_calibration_lowers_the_error_on_other_images() -> None:
    logits, labels = drawn(4000, 3.0)
    hold_out, others = slice(0, 500), slice(500, 4000)
    found = temperature(logits[hold_out], labels[hold_out])
    errors = []
    for used in (1.0, found):
        labelled = from_logits(range(3500), logits[None, others], temperature=used)
        correct = labelled.labels == labels[others].numpy()
        errors.append(expected_calibration_error(labelled.confidence, correct))
    assert errors[0] > 0.15
    assert errors[1] < 0.04


def test_calibration_error_by_hand() -> None:
    confidence = [0.95, 0.85, 0.55, 0.45, 0.0, 1.0]
    correct = [True, False, True, False, False, True]
    # bins of 0.5: (0, 0.5] has 0.45 and 0 wrong; the upper one 0.95, 0.85, 0.55, 1 with 3 of 4.
    by_hand = (2 / 6) * (0.225 - 0.0) + (4 / 6) * (0.8375 - 0.75)
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(by_hand)
    assert expected_calibration_error([1.0, 1.0], [True, True]) == 0.0
    assert expected_calibration_error([1.0, 1.0], [False, False]) == 1.0


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40),
    st.sampled_from([0.3, 0.5, 0.9, 1.0]),
)
def test_threshold_is_brute_force(rows: list[tuple[int, bool]], precision: float) -> None:
    confidence = np.asarray([row[0] / 6 for row in rows])
    correct = np.asarray([row[1] for row in rows])
    good = [
        float(value) for value in confidence if correct[confidence >= value].mean() >= precision
    ]
    found = threshold_for_precision(confidence, correct, precision=precision)
    assert found == min(good, default=math.inf)


def test_refusals() -> None:
    logits, labels = drawn(5, 1.0)
    for bad, message in [
        (lambda: temperature(logits, labels[:4]), "needs logits"),
        (lambda: temperature(logits[:0], labels[:0]), "one row or more"),
        (lambda: temperature(logits, labels + 10), "labels from 0 to 9"),
        (lambda: temperature(logits * math.inf, labels), "finite"),
        (lambda: temperature(logits, labels, imagined=-1.0), "imagined"),
        (lambda: expected_calibration_error([], []), "one row or more"),
        (lambda: expected_calibration_error([1.5], [True]), r"in \[0, 1\]"),
        (lambda: expected_calibration_error([0.5], [True], bins=0), "one bin"),
        (lambda: threshold_for_precision([0.5], [True, False], precision=0.9), "one shape"),
        (lambda: threshold_for_precision([float("nan")], [True], precision=0.9), r"in \[0, 1\]"),
        (lambda: threshold_for_precision([0.5], [True], precision=0.0), "precision in"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()
