"""The judge of the rounds: what it measures, and that a ruined student is not adopted."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from fastscarce.train.guard import Guard, Verdict, count_votes, vote_information


def brute_force(votes: np.ndarray) -> float:
    """Mutual information from the joint distribution of image and class, in units of log C."""
    rows, classes = votes.shape
    joint = votes / votes.sum(1, keepdims=True) / rows
    total = 0.0
    for image, label in itertools.product(range(rows), range(classes)):
        p = joint[image, label]
        if p > 0:
            total += p * math.log(p / (joint[image].sum() * joint[:, label].sum()))
    return total / math.log(classes)


@pytest.mark.parametrize("shape", [(1, 2), (7, 3), (50, 10), (200, 4)])
def test_vote_information_is_mutual_information(shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(shape[0])
    votes = draw.integers(0, 7, shape) + np.eye(*shape, dtype=np.int64)
    votes[:, 0] += votes.sum(1) == 0
    assert vote_information(votes) == pytest.approx(brute_force(votes), abs=1e-12)


def test_extremes() -> None:
    labels = np.repeat(np.arange(5), 8)
    assert vote_information(6 * np.eye(5, dtype=np.int64)[labels]) == pytest.approx(1.0)
    collapsed = np.zeros((40, 5), dtype=np.int64)
    collapsed[:, 2] = 6
    assert vote_information(collapsed) == 0.0
    # answers that change from view to view, the same way for each image
    assert vote_information(np.ones((40, 5), dtype=np.int64)) == pytest.approx(0.0)
    # views that agree on half of the classes only
    half = vote_information(6 * np.eye(4, dtype=np.int64)[np.repeat([0, 1], 20)])
    assert half == pytest.approx(0.5)


def test_votes_are_counted_and_confidence_is_not() -> None:
    logits = torch.randn(6, 20, 5)
    votes = count_votes(logits)
    assert votes.shape == (20, 5)
    assert (votes.sum(1) == 6).all()
    for row, label in itertools.product(range(20), range(5)):
        assert votes[row, label] == sum(int(logits[v, row].argmax()) == label for v in range(6))
    assert np.array_equal(count_votes(100 * logits), votes)


def test_a_view_that_is_not_finite_has_no_vote() -> None:
    logits = torch.zeros(3, 2, 4)
    logits[0, 0, 1] = math.nan
    logits[1, 1, 2] = math.inf
    assert count_votes(logits).sum(1).tolist() == [2, 2]
    assert vote_information(count_votes(torch.full((6, 9, 4), math.nan))) == 0.0


def guard(judge: str) -> Guard:
    nothing: Any = None
    return Guard(nothing, nothing, judge, np.arange(400))  # type: ignore[arg-type]


def test_one_right_answer_fewer_is_worse_on_a_hold_out() -> None:
    evidence = np.zeros((4, 1), dtype=np.int64)
    judge = guard("holdout")
    assert judge.is_worse(Verdict(0.49, evidence), Verdict(0.5, evidence))
    assert not judge.is_worse(Verdict(0.5, evidence), Verdict(0.5, evidence))
    assert not judge.is_worse(Verdict(0.6, evidence), Verdict(0.5, evidence))


def test_agreement_must_fall_by_more_than_its_error() -> None:
    def verdict(ruined: int) -> Verdict:
        labels = np.arange(400) % 10
        votes = 6 * np.eye(10, dtype=np.int64)[labels]
        votes[:ruined] = 0
        votes[:ruined, 0] = 6
        return Verdict(vote_information(votes), votes)

    judge = guard("agreement")
    teacher = verdict(0)
    assert judge.is_worse(verdict(200), teacher)
    assert judge.is_worse(verdict(40), teacher)
    assert not judge.is_worse(teacher, verdict(200))
    assert not judge.is_worse(teacher, teacher)


@pytest.mark.parametrize("labels_per_class", [4, 20])
def test_a_ruined_student_is_reported_and_not_adopted(
    command: Any, tmp_path: Any, labels_per_class: int
) -> None:
    outcome = command(
        "selftrain", tmp_path / "run", labels_per_class=labels_per_class, rounds=2,
        test_fraction=0.7, teacher__steps=40, student__steps=6, student__learning_rate=20.0,
        teacher__cutmix_probability=0.0, teacher__augmentation="weak",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    result = outcome.result
    judge = "holdout" if labels_per_class == 20 else "agreement"
    assert result["judge"] == judge
    assert [row["adopted"] for row in result["rounds"]] == [False, False]
    assert all(row["student_score"] < row["teacher_score"] for row in result["rounds"])
    assert all(row["judge"] == judge for row in result["rounds"])
    assert outcome.out.count("not adopted: worse than its teacher") == 2
    assert result["student_accuracy"] == result["teacher_accuracy"] > 0.3
    page = (tmp_path / "run" / "report.html").read_text()
    assert judge.replace("holdout", "hold") in page.lower()
    # The teacher itself comes back: the stage before the students, trained alone, has its bits.
    alone = command(
        "selftrain", tmp_path / "alone", labels_per_class=labels_per_class, rounds=0,
        test_fraction=0.7, teacher__steps=40, teacher__cutmix_probability=0.0,
        teacher__augmentation="weak",
    )  # fmt: skip
    assert alone.code == 0, alone.err
    assert outcome.weights.keys() == alone.weights.keys()
    assert all(torch.equal(outcome.weights[key], alone.weights[key]) for key in alone.weights)


def test_where_a_hold_out_comes_from() -> None:
    from fastscarce.config import DataConfig
    from fastscarce.data import load, split
    from fastscarce.train.task import _holdout_per_class

    images = load("digits")
    assert _holdout_per_class(DataConfig(labels_per_class=4), images, None) == 0
    assert _holdout_per_class(DataConfig(labels_per_class=19), images, None) == 0
    assert _holdout_per_class(DataConfig(labels_per_class=20), images, None) == 4
    assert (
        _holdout_per_class(DataConfig(labels_per_class=4, holdout_per_class=1), images, None) == 1
    )
    fewest = np.bincount(images.labels).min()
    every = _holdout_per_class(DataConfig(labels_per_class=None), images, None)
    assert every == int(fewest * 2 / 3) // 5
    parts = split(images, labels_per_class=16, holdout_per_class=4, test_fraction=1 / 3, seed=0)
    together = np.concatenate([parts.labelled, parts.holdout, parts.unlabelled, parts.test])
    assert len(np.unique(together)) == len(together) == len(images)
    assert np.bincount(images.labels[parts.holdout]).tolist() == [4] * 10
    chosen = Guard.of(None, None, parts)  # type: ignore[arg-type]
    assert chosen.judge == "holdout"
    assert np.array_equal(chosen.positions, parts.holdout)
    few = split(images, labels_per_class=4, holdout_per_class=0, test_fraction=1 / 3, seed=0)
    chosen = Guard.of(None, None, few)  # type: ignore[arg-type]
    assert chosen.judge == "agreement"
    assert np.isin(chosen.positions, few.unlabelled).all()
    assert not np.isin(chosen.positions, few.test).any()
