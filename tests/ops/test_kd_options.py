"""What kd_loss takes beside logits and labels: class weights, T**2, and memory for the gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastscarce.ops import KDLoss, MixedTarget, kd_loss, reference, topk

LOSSES = ["kl", "reverse_kl", "jsd", "skew_kl", "dkd", "logit_standard"]


def example(rows: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, labels with ignored ones, class weights with a zero."""
    generator = torch.Generator().manual_seed(rows * 1009 + classes)
    student, teacher = (torch.randn(rows, classes, generator=generator) * 2 for _ in range(2))
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[::4] = -100
    weights = torch.rand(classes, generator=generator) * 3
    weights[0] = 0
    return student, teacher, labels, weights


def both(function: Any, student: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = function(leaf, *arguments, **options)
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()]
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.reshape(loss.shape))
    return loss.detach(), gradient


def close(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=2e-6)


# ---- class weights


@pytest.mark.parametrize("classes", [10, 100, 2100])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_are_those_of_cross_entropy(isa: str, smoothing: float, classes: int) -> None:
    student, _, labels, weights = example(37, classes)
    for reduction in ("mean", "sum", "none"):
        options: Any = {"label_smoothing": smoothing, "reduction": reduction}
        expected = both(F.cross_entropy, student, labels, weight=weights, **options)
        got = both(kd_loss, student, None, labels, class_weight=weights, **options)
        close(got, expected)
        soft = student.flip(0).softmax(1)
        expected = both(F.cross_entropy, student, soft, weight=weights, **options)
        close(both(kd_loss, student, None, soft, class_weight=weights, **options), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [10, 100])
def test_class_weights_beside_a_teacher(isa: str, classes: int, loss: str) -> None:
    student, teacher, labels, weights = example(21, classes)
    mixed = MixedTarget(labels, labels.roll(1), torch.linspace(0, 1, 21))
    for target in (labels, mixed):
        for smoothing in (0.0, 0.1):
            options: Any = {
                "loss": loss,
                "temperature": 2.0,
                "label_smoothing": smoothing,
                "class_weight": weights,
                "weight": torch.linspace(0, 2, 21),
            }
            if loss == "dkd" and smoothing:
                continue
            expected = both(reference.kd_loss, student.double(), teacher, target, **options)
            close(both(kd_loss, student, teacher, target, **options), expected)


def test_class_weights_with_topk_and_recompute() -> None:
    student, teacher, labels, weights = example(9, 50)
    record = topk(teacher, 8)
    options: Any = {"class_weight": weights, "temperature": 3.0}
    expected = both(reference.kd_loss, student.double(), record, labels, **options)
    close(both(kd_loss, student, record, labels, **options), expected)
    close(both(kd_loss, student, record, labels, gradient="recompute", **options), expected)
    leaf = student[:3, :6].double().requires_grad_()
    options["class_weight"] = weights[:6]
    target = torch.tensor([1, -100, 5])

    def function(logits: Tensor) -> Tensor:
        return kd_loss(logits, teacher[:3, :6], target, gradient="recompute", **options)

    assert torch.autograd.gradgradcheck(function, (leaf,))


def test_class_weights_in_a_module_and_compiled() -> None:
    student, teacher, labels, weights = example(6, 12)
    module = KDLoss(class_weight=weights)
    assert "class_weight" in dict(module.named_buffers())
    assert not module.state_dict()
    expected = kd_loss(student, teacher, labels, class_weight=weights)
    assert module(student, teacher, labels) == expected
    torch._dynamo.reset()  # what other tests compiled counts toward its limit
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher, labels, class_weight=weights), expected)


# ---- T squared


@pytest.mark.parametrize("loss", LOSSES)
def test_without_t_squared(loss: str) -> None:
    student, teacher, labels, _ = example(9, 40)
    options: Any = {"loss": loss, "temperature": 3.0, "t_squared": False}
    if loss != "dkd":
        value, gradient = both(kd_loss, student, teacher, **options)
        with_it, with_it_gradient = both(
            kd_loss, student, teacher, **(options | {"t_squared": True})
        )
        torch.testing.assert_close(9 * value, with_it)
        torch.testing.assert_close(9 * gradient, with_it_gradient)
    expected = both(reference.kd_loss, student.double(), teacher, labels, **options)
    close(both(kd_loss, student, teacher, labels, **options), expected)
    close(both(kd_loss, student, teacher, labels, gradient="recompute", **options), expected)


# ---- memory for the gradient


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_in_the_teachers_memory(isa: str, dtype: torch.dtype, loss: str) -> None:
    for rows, classes in ((37, 10), (21, 100), (9, 1025), (1, 20000)):
        student, teacher, labels, _ = example(rows, classes)
        student, teacher = student.to(dtype), teacher.to(dtype)
        options: Any = {"loss": loss, "temperature": 2.0}
        expected = both(kd_loss, student, teacher, labels, **options)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                dead = teacher.clone()
                got = both(kd_loss, student, dead, labels, reuse_teacher_buffer=True, **options)
            finally:
                torch.set_num_threads(1)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
            assert got[1].data_ptr() == dead.data_ptr()


def test_gradient_in_given_memory() -> None:
    student, teacher, labels, _ = example(9, 100)
    for given in (teacher, topk(teacher, 5), None):
        expected = both(kd_loss, student, given, labels)
        out = torch.full_like(student, math.nan)
        got = both(kd_loss, student, given, labels, out=out)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(out, expected[1])
        assert got[1].data_ptr() == out.data_ptr()
    out.fill_(7)
    with torch.no_grad():
        kd_loss(student, teacher, labels, out=out)
    assert (out == 7).all()


def test_memory_stays_the_losses_until_the_backward_pass() -> None:
    student, teacher, labels, _ = example(9, 100)
    leaf, out = student.requires_grad_(), torch.empty_like(student)
    loss = kd_loss(leaf, teacher, labels, out=out)
    out.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = kd_loss(leaf, teacher, labels, out=out)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert first.data_ptr() != out.data_ptr()
    assert torch.equal(first, second)


def test_opcheck() -> None:
    student, teacher, labels, weights = example(5, 12)
    numbers = (2.0, 0.5, 0.5, 0.0, 0.0, -100, 2, True)
    written = (student * 0, *(None,) * 5)
    torch.library.opcheck(
        torch.ops.fastscarce.kd_loss_out.default,
        (student, teacher, labels, None, None, None, weights, 0, 0.0, 0.0, *numbers, *written),
    )
    record = topk(teacher, 3)
    parts = (record.indices, record.log_probs, record.log_tail)
    torch.library.opcheck(
        torch.ops.fastscarce.kd_loss_topk_out.default,
        (student, *parts, *(None,) * 4, labels, *(None,) * 4, 0, *numbers, *written),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_weight": torch.ones(9)}, r"class_weight of shape \(10,\), .* \(9,\)"),
        ({"class_weight": torch.ones(10, dtype=torch.int64)}, "floating point, got torch.int64"),
        (
            {"class_weight": torch.ones(10), "label_smoothing": 0.1, "loss": "dkd"},
            "label_smoothing 0 with class_weight and loss 'dkd', got 0.1",
        ),
        ({"out": torch.zeros(4, 9)}, r"out of the student's shape.*\(4, 9\)"),
        ({"out": torch.zeros(4, 10).double()}, "got .* torch.float64"),
        ({"out": torch.zeros(10, 4).t()}, "contiguous out"),
        ({"out": torch.zeros(4, 10), "gradient": "recompute"}, "'auto' or 'in_forward' with out"),
        ({"out": torch.zeros(4, 10), "reuse_teacher_buffer": True}, "got both"),
        ({"teacher": None, "reuse_teacher_buffer": True}, "teacher logits for reuse_teacher"),
        (
            {"teacher": topk(torch.zeros(4, 10), 2), "reuse_teacher_buffer": True},
            "teacher logits for reuse_teacher",
        ),
        (
            {"teacher": torch.zeros(4, 10).double(), "reuse_teacher_buffer": True},
            "teacher of the student's shape, dtype",
        ),
        (
            {"teacher": torch.zeros(4, 10, requires_grad=True), "reuse_teacher_buffer": True},
            "requires no gradient",
        ),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    good = {
        "student": torch.randn(4, 10, requires_grad=True),
        "teacher": torch.randn(4, 10),
        "target": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=words) as raised:
        kd_loss(**(good | change))
    assert str(raised.value).startswith("kd_loss needs")


def test_refuses_the_students_own_memory() -> None:
    logits = torch.randn(4, 10)
    with pytest.raises(ValueError, match="other memory than the student's logits"):
        kd_loss(logits.requires_grad_(), logits.detach(), reuse_teacher_buffer=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [10, 1025])
def test_cuda(classes: int, loss: str) -> None:
    student, teacher, labels, weights = example(37, classes)
    options: Any = {"loss": loss, "temperature": 2.0, "t_squared": False}
    expected = both(kd_loss, student, teacher, labels, class_weight=weights, **options)
    dead = teacher.cuda()
    got = both(
        kd_loss,
        student.cuda(),
        dead,
        labels.cuda(),
        class_weight=weights.cuda(),
        reuse_teacher_buffer=True,
        **options,
    )
    torch.testing.assert_close(got[0].cpu(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=1e-4, atol=1e-6)
    assert got[1].data_ptr() == dead.data_ptr()


# ---- weights of any sum


def test_pair_of_weights() -> None:
    student, teacher, labels, _ = example(9, 40)
    options: Any = {"temperature": 2.0}
    for pair in ((0.3, 1.7), (4.0, 0.0), (0.0, 2.0)):
        value, gradient = both(kd_loss, student, teacher, labels, alpha=pair, **options)
        distil = both(kd_loss, student, teacher, **options)
        hard = both(kd_loss, student, None, labels, **options)
        torch.testing.assert_close(value, pair[0] * distil[0] + pair[1] * hard[0])
        torch.testing.assert_close(gradient, pair[0] * distil[1] + pair[1] * hard[1])
        again = both(kd_loss, student, teacher, labels, alpha=pair, gradient="recompute", **options)
        torch.testing.assert_close(again, (value, gradient))
    leaf = student[:3, :6].double().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: kd_loss(
            x, teacher[:3, :6], torch.tensor([1, -100, 5]), alpha=(0.3, 1.7), gradient="recompute"
        ),
        (leaf,),
    )
    alone = kd_loss(student, teacher, alpha=(3.0, 1.0))
    torch.testing.assert_close(alone, 3 * kd_loss(student, teacher))
    with pytest.raises(ValueError, match="a pair alpha of finite weights"):
        kd_loss(student, teacher, labels, alpha=(-1.0, 2.0))
