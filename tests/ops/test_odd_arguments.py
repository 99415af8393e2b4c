"""Memory, numbers and objects that few calls have: a right answer, or one sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastscarce.ops import (
    MixedTarget,
    MixedTopK,
    TopK,
    WeightedKDLoss,
    confidence,
    dist_loss,
    kd_loss,
    linear_kd_loss,
    topk,
)

MIXTURES = ("reverse_kl", "jsd", "skew_kl")


@pytest.mark.parametrize("loss", MIXTURES)
def test_second_derivatives_where_probabilities_are_too_small_for_float32(loss: str) -> None:
    values = torch.tensor([[0.0, -2.0, -1.0, 0.5], [0.1, 0.2, -95.0, 0.4]])
    teacher = torch.tensor([[0.3, -0.2, -110.0, 0.2], [0.3, -0.2, -96.0, 0.2]])

    def derivatives(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        student = values.to(dtype).requires_grad_()
        value = kd_loss(student, teacher.to(dtype), loss=loss, gradient="recompute")
        (first,) = torch.autograd.grad(value, student, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), student)
        return first.detach(), second

    for found, expected in zip(derivatives(torch.float32), derivatives(torch.float64), strict=True):
        assert bool(expected.isfinite().all())
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["teacher", "out"])
def test_memory_that_a_loss_writes_to_is_stale_for_autograd(way: str) -> None:
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    buffer = teacher if way == "teacher" else torch.randn(4, 6)
    other = (student * buffer).sum()
    options: dict[str, Any] = (
        {"reuse_teacher_buffer": True} if way == "teacher" else {"out": buffer}
    )
    loss = kd_loss(student, teacher, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + loss).backward()
    student.grad = None
    kd_loss(student, torch.randn(4, 6), **options if way == "out" else {}).backward()


def test_skew_of_nothing_is_kl() -> None:
    student, teacher = torch.tensor([[0.0, 100.0]]), torch.tensor([[100.0, 0.0]])
    skewed = kd_loss(student, teacher, loss="skew_kl", skew=0.0)
    assert float(skewed) == float(kd_loss(student, teacher)) == pytest.approx(100.0)


@pytest.mark.parametrize("weight", [1e-8, 1e-6, 1.0, 1e6])
def test_a_mean_does_not_depend_on_the_size_of_weights(weight: float) -> None:
    student = torch.randn(8, 6).half()
    teacher = torch.randn(8, 6).half()

    def gradient(scale: float) -> torch.Tensor:
        leaf = student.clone().requires_grad_()
        kd_loss(leaf, teacher, weight=torch.full((8,), scale)).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient(weight), gradient(1.0), rtol=2e-3, atol=1e-6)


def test_teachers_of_inference_mode() -> None:
    with torch.inference_mode():
        teacher = torch.randn(4, 6)
    student = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"not made in inference mode.*make it under torch.no_grad"
    ):
        kd_loss(student, teacher, reuse_teacher_buffer=True)
    for loss in ("kl", "dist"):
        (one,) = torch.autograd.grad(kd_loss(student, teacher, loss=loss), student)
        again = kd_loss(student, teacher, loss=loss, gradient="recompute")
        (other,) = torch.autograd.grad(again, student)
        torch.testing.assert_close(one, other)


def test_a_dense_label_with_class_weights_is_not_rounded_to_16_bits() -> None:
    student, label = torch.randn(3, 5).half(), torch.rand(3, 5).half()
    weight = torch.tensor([1e-8, 1.0, 1e5, 2.0, 3.0])
    value = kd_loss(student, None, label, class_weight=weight)
    expected = kd_loss(student.double(), None, label.double(), class_weight=weight)
    assert float(value) == pytest.approx(float(expected), rel=1e-4)


def test_the_head_smooths_labels_of_dkd_and_names_rows_of_all() -> None:
    features, weight = torch.randn(40, 4), torch.randn(7, 4)
    teacher, target = torch.randn(40, 7), torch.randint(7, (40,))
    target[3] = -100
    options: dict[str, Any] = {"loss": "dkd", "label_smoothing": 0.1}
    found = linear_kd_loss(features, weight, None, teacher, target, memory=1e-4, **options)
    expected = kd_loss(features @ weight.T, teacher, target, **options)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    target[39] = 7
    with pytest.raises(ValueError, match=r"targets in 0 to 6 .*, got 7 in row 39"):
        linear_kd_loss(features, weight, None, teacher, target, memory=1e-4)


def test_empty_slices_are_matrices_too() -> None:
    empty = torch.randn(3, 10)[:, ::2][:0]
    assert float(kd_loss(empty, empty)) == 0.0
    assert len(topk(empty, 2)) == 0
    assert float(dist_loss(empty, empty)) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: kd_loss(s, s, alpha=None), "alpha as a number"),
        (lambda s: kd_loss(s, s, alpha=(1, 2, 3)), "alpha as a number or two"),
        (lambda s: kd_loss(s, s, temperature="4"), "temperature as a number, got '4'"),
        (lambda s: kd_loss(s, s, temperature=1e200), "a temperature of at most 1e.18"),
        (lambda s: kd_loss(s, s, threshold=None), "threshold as a number"),
        (lambda s: kd_loss(s, s, loss=["kl"]), "needs loss to be 'kl'"),
        (lambda s: kd_loss(s, s, reduction=["mean"]), "needs reduction"),
        (lambda s: kd_loss(s, s, ignore_index=1.5), "ignore_index as a whole number"),
        (lambda s: dist_loss(s, s, temperature=None), "temperature as a number"),
        (lambda s: confidence(s, None), "threshold as a number"),
        (lambda s: MixedTarget([0], [1], [0.5]), "MixedTarget needs a as a tensor"),
        (lambda s: TopK([[0]], s, s), "TopK needs indices as a tensor"),
        (lambda s: MixedTopK(topk(s, 1), 3, s[:, 0]), "MixedTopK needs b as a TopK"),
        (lambda s: linear_kd_loss(s, s, [0], None, None), "bias as a tensor"),
        (lambda s: linear_kd_loss(s, s[:0], None, s[:, :0]), "a weight of one class or more"),
        (lambda s: linear_kd_loss(s, s, None, s @ s.T, memory="1"), "memory as a number"),
        (
            lambda s: linear_kd_loss(s, s, None, s @ s.T, class_weight=torch.ones(9)),
            "class_weight of shape",
        ),
    ],
)
def test_what_is_no_number_and_no_tensor(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        call(torch.randn(3, 4))
    assert "\n" not in str(raised.value)


def test_a_warm_up_keeps_what_a_teacher_is_asked_for() -> None:
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    labels = torch.randint(6, (4,))
    loss = WeightedKDLoss(0.0, 1.0, statistics=True)
    _, rows = loss(student, teacher, labels)
    assert torch.equal(rows.teacher_label, teacher.argmax(1))
    plain = WeightedKDLoss(0.0, 1.0)(student, teacher, labels)
    reused = WeightedKDLoss(0.0, 1.0)(student, teacher.clone(), labels, reuse_teacher_buffer=True)
    assert float(plain.detach()) == pytest.approx(float(reused.detach()))


def test_reusing_a_buffer_compiles() -> None:
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    compiled = torch.compile(
        lambda s, t: kd_loss(s, t, reuse_teacher_buffer=True), fullgraph=True, backend="aot_eager"
    )
    kept = teacher.clone()
    value = compiled(student, teacher).detach()
    assert float(value) == pytest.approx(float(kd_loss(student, kept).detach()))
    assert torch.equal(teacher, kept)


def good() -> dict[str, Any]:
    """Arguments that are taken."""
    return {
        "student": torch.randn(4, 10),
        "teacher": torch.randn(4, 10),
        "target": torch.zeros(4, dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": torch.randn(4, 9)}, r"one shape.*\(4, 10\) and \(4, 9\)"),
        ({"student": torch.randn(40)}, r"\(rows, classes\).*\(40,\)"),
        ({"student": torch.randn(4, 0), "teacher": None}, "classes at least 1"),
        ({"student": torch.ones(4, 10, dtype=torch.int64)}, "student in float32"),
        ({"teacher": torch.ones(4, 10, dtype=torch.int64)}, "teacher in float32"),
        ({"teacher": torch.ones(4, 10, device="meta")}, "one device"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target of shape \(rows,\)"),
        ({"target": torch.zeros(4, 3)}, "one shape"),
        ({"target": torch.zeros(4, dtype=torch.bool)}, "target in int64"),
        ({"target": torch.full((4,), 10)}, "0 to 9 or ignore_index, -100, got 10 in row 0"),
        ({"target": torch.tensor([0, 1, -1, 2])}, "got -1 in row 2"),
        (
            {"target": MixedTarget(torch.zeros(4).long(), torch.full((4,), 12), torch.ones(4))},
            "got 12 in row 0",
        ),
        ({"weight": torch.ones(5)}, r"weight of shape \(rows,\)"),
        ({"teacher": None, "target": None}, "neither"),
        ({"temperature": 0.0}, "positive, finite temperature, got 0"),
        ({"temperature": math.nan}, "temperature"),
        ({"alpha": 1.5}, "alpha in 0 to 1, got 1.5"),
        ({"label_smoothing": -0.1}, "label_smoothing in 0 to 1"),
        ({"reduction": "batchmean"}, "'mean', 'sum' or 'none', got 'batchmean'"),
        ({"loss": "l2"}, "'logit_standard' or 'dist', got 'l2'"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        kd_loss(**(good() | change))
    assert str(raised.value).startswith("kd_loss needs")
