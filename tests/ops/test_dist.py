"""DIST: values and gradients against the twin in float64, and what holds of any correlation.

Shapes: fewer rows or classes than lanes; part of a vector and whole ones; more than 64 classes,
where a row is no longer a lane; several pieces of rows, and pieces that are not full.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastscarce.ops import DistLoss, KDLoss, TopK, dist_loss, kd_loss, reference

SHAPES = [(5, 3), (11, 10), (33, 100), (300, 17), (70, 1001), (1, 7), (9, 1), (1100, 65)]


def example(rows: int, classes: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Two different matrices that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(rows * 1009 + classes)
    student, teacher = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return (spread * student).bfloat16().double(), (spread * teacher).bfloat16().double()


def both(function: Any, student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = function(leaf, teacher, **options)
    (gradient,) = torch.autograd.grad(1.5 * loss, leaf)
    return loss.detach(), gradient


def compare(dtype: torch.dtype, student: Tensor, teacher: Tensor, **options: Any) -> None:
    """Error against float64 <= that of the plain twin in float32, plus rounding."""
    student, teacher = student.to(dtype), teacher.to(dtype)
    exact, exact_gradient = both(reference.dist_loss, student.double(), teacher.double(), **options)
    eager, eager_gradient = both(reference.dist_loss, student.float(), teacher.float(), **options)
    loss, gradient = both(dist_loss, student, teacher, **options)
    wide = dtype == torch.float64
    assert gradient.dtype == dtype
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    rounding = 1e-13 if wide else 1e-6
    slack = 0.0 if wide else float((eager - exact).abs())
    assert abs(float(loss - exact)) <= slack + rounding * (1 + abs(float(exact)))
    slack = 0.0 if wide else 2 * float((eager_gradient - exact_gradient).abs().max())
    size = float(exact_gradient.abs().max())
    bound = slack + rounding * size + 1.01 * torch.finfo(dtype).eps * exact_gradient.abs()
    assert bool(((gradient - exact_gradient).abs() <= bound + torch.finfo(dtype).tiny).all())


@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_values_and_gradients(isa: str, rows: int, classes: int) -> None:
    student, teacher = example(rows, classes)
    compare(torch.float32, student, teacher)
    compare(torch.float32, student, teacher, temperature=4.0, inter=2.0, intra=0.5)
    compare(torch.float32, student, teacher, inter=0.0, t_squared=False, temperature=2.0)
    compare(torch.float32, student, teacher, intra=0.0, temperature=0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(isa: str, dtype: torch.dtype) -> None:
    for rows, classes in ((300, 17), (40, 131)):
        compare(dtype, *example(rows, classes), temperature=2.0)
    # A teacher of its own dtype, and rows that lie apart.
    student, teacher = example(20, 90)
    wide = torch.zeros(20, 200, dtype=dtype)
    wide[:, 3:93] = student
    expected = both(dist_loss, student.to(dtype), teacher.float())
    got = both(
        lambda s, t, **o: dist_loss(wide[:, 3:93].requires_grad_(), t, **o) + 0 * s.sum(),
        student.to(dtype),
        teacher.bfloat16(),
    )
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize(("rows", "classes"), [(31, 12), (12, 80)])
def test_is_one_less_pearson(isa: str, rows: int, classes: int) -> None:
    student, teacher = example(rows, classes)
    q, p = (x.div(3).softmax(1).numpy() for x in (student, teacher))
    by_row = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    by_column = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    options: Any = {"temperature": 3.0, "t_squared": False}
    inter = dist_loss(student.float(), teacher.float(), intra=0, **options)
    intra = dist_loss(student.float(), teacher.float(), inter=0, **options)
    # The definition's 1e-8 beside |a| |b| of about 1e-2.
    assert inter.item() == pytest.approx(by_row, rel=1e-5)
    assert intra.item() == pytest.approx(by_column, rel=1e-5)
    whole = dist_loss(student.float(), teacher.float(), inter=2, intra=3, temperature=3.0)
    assert whole.item() == pytest.approx(9 * (2 * by_row + 3 * by_column), rel=1e-5)


@pytest.mark.parametrize(("rows", "classes"), [(37, 10), (37, 100)])
def test_invariants(isa: str, rows: int, classes: int) -> None:
    student, teacher = (x.float() for x in example(rows, classes))
    value, gradient = both(dist_loss, student, teacher)
    assert gradient.sum(1).abs().max() < 1e-6 * gradient.abs().max() * classes
    for _ in range(20):
        again = both(dist_loss, student, teacher)
        assert torch.equal(again[0], value)
        assert torch.equal(again[1], gradient)
    far = both(dist_loss, student + 4096, teacher - 4096)
    torch.testing.assert_close(far[0], value, rtol=1e-3, atol=1e-4)
    # The same logits are perfectly correlated, and stay where they are.
    same, still = both(dist_loss, teacher, teacher)
    assert abs(same.item()) < 1e-5
    assert still.abs().max() < 1e-5
    large, gradient = both(dist_loss, 1e4 * student, 1e4 * teacher, temperature=0.05)
    assert large.isfinite()
    assert gradient.isfinite().all()


def test_threads_change_nothing() -> None:
    for rows, classes in ((5000, 10), (700, 300)):
        student, teacher = (x.float() for x in example(rows, classes))
        alone = both(dist_loss, student, teacher)
        torch.set_num_threads(2)
        try:
            together = both(dist_loss, student, teacher)
        finally:
            torch.set_num_threads(1)
        assert torch.equal(alone[0], together[0])
        assert torch.equal(alone[1], together[1])


@pytest.mark.parametrize("classes", [10, 100])
def test_masks_and_constants(isa: str, classes: int) -> None:
    student, teacher = (x.float() for x in example(9, classes))
    student[:, 3:7] = teacher[:, 3:7] = -math.inf
    student[4] = 0.5  # constant row: correlation 0
    compare(torch.float32, student, teacher, temperature=2.0)
    _, gradient = both(dist_loss, student, teacher)
    others = torch.arange(9) != 4
    assert not gradient[others, 3:7].any()
    # Rows that are all alike: every column is constant and counts 1.
    alike = student[:1].repeat(9, 1)
    intra = dist_loss(alike, teacher, inter=0)
    assert intra.item() == 1
    _, gradient = both(dist_loss, alike, teacher, inter=0)
    assert gradient.isfinite().all()
    # No finite logit: probabilities 0, and nothing is NaN.
    student[2] = teacher[5] = -math.inf
    value, gradient = both(dist_loss, student, teacher)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[2].any()
    # A batch's loss: a NaN is everybody's, unless its term has no weight.
    student[7, 0] = math.nan
    value, gradient = both(dist_loss, student, teacher)
    assert value.isnan()
    assert gradient.isnan().any()


def test_no_rows() -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    value = dist_loss(empty, torch.zeros(0, 5))
    value.backward()
    assert value.item() == 0
    assert empty.grad is not None
    assert empty.grad.shape == (0, 5)


def test_gradcheck_and_second_derivative() -> None:
    student, teacher = example(5, 4, spread=1.0)
    leaf = student.requires_grad_()

    def function(logits: Tensor, gradient: str = "auto") -> Tensor:
        return dist_loss(logits, teacher, temperature=2.0, inter=1.5, gradient=gradient)

    assert torch.autograd.gradcheck(function, (leaf,))
    assert torch.autograd.gradcheck(lambda x: function(x, "recompute"), (leaf,))
    assert torch.autograd.gradgradcheck(lambda x: function(x, "recompute"), (leaf,))


def test_backward_twice() -> None:
    student, teacher = (x.float() for x in example(6, 20))
    for gradient in ("in_forward", "recompute"):
        leaf = student.clone().requires_grad_()
        loss = dist_loss(leaf, teacher, gradient=gradient)
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore")
def test_opcheck_and_compile() -> None:
    student, teacher = (x.float() for x in example(5, 12))
    torch.library.opcheck(
        torch.ops.fastscarce.dist_loss.default,
        (student.clone().requires_grad_(), teacher, 2.0, 1.0, 0.5, True),
    )
    torch._dynamo.reset()  # what other tests compiled counts toward its limit
    compiled = torch.compile(dist_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        both(compiled, student, teacher, temperature=2.0),
        both(dist_loss, student, teacher, temperature=2.0),
    )
    target = torch.zeros(5, dtype=torch.int64)
    whole = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        whole(student, teacher, target, loss="dist"), kd_loss(student, teacher, target, loss="dist")
    )


@pytest.mark.parametrize("classes", [10, 100])
def test_with_a_label(classes: int) -> None:
    student, teacher = (x.float() for x in example(20, classes))
    target = torch.arange(20) % classes
    target[::3] = -100
    options: Any = {
        "temperature": 2.0,
        "inter": 2.0,
        "intra": 0.7,
        "label_smoothing": 0.1,
        "t_squared": False,
    }

    def whole(logits: Tensor, teacher: Tensor, by: Any = kd_loss, **more: Any) -> Tensor:
        loss: Tensor = by(logits, teacher, target, loss="dist", **options, **more)
        return loss

    for more in ({"alpha": 0.3}, {"alpha": 0.0}, {"class_weight": torch.rand(classes) + 0.5}):
        if "class_weight" in more:
            options["label_smoothing"] = 0.0
        got = both(whole, student, teacher, **more)
        exact = both(
            whole,
            student.double(),
            teacher.double(),
            by=reference.kd_loss,
            **{k: v.double() if isinstance(v, Tensor) else v for k, v in more.items()},
        )
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6, check_dtype=False)
    # Weights of any sum; the paper's are 1 for the label, beta and gamma for the correlations.
    pair = whole(student, teacher, alpha=(1.0, 1.0))
    label = kd_loss(student, None, target, label_smoothing=options["label_smoothing"])
    apart = {k: v for k, v in options.items() if k != "label_smoothing"}
    torch.testing.assert_close(pair, dist_loss(student, teacher, **apart) + label)
    # Without a label DIST alone, without a teacher cross entropy alone.
    alone = kd_loss(student, teacher, loss="dist", temperature=2.0)
    torch.testing.assert_close(alone, dist_loss(student, teacher, temperature=2.0))
    torch.testing.assert_close(
        kd_loss(student, None, target, loss="dist"), kd_loss(student, None, target)
    )


def test_modules() -> None:
    student, teacher = example(8, 12)
    of: Any = {"temperature": 4.0, "inter": 2.0, "intra": 3.0}
    expected = dist_loss(student, teacher, **of)
    assert torch.equal(DistLoss(**of)(student, teacher), expected)
    assert torch.equal(KDLoss("dist", **of)(student, teacher), expected)
    assert "inter=2.0" in repr(DistLoss(**of))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "a positive, finite temperature, got 0.0"),
        ({"inter": -1.0}, "inter and intra of 0 or more, got -1.0"),
        ({"intra": math.inf}, "inter and intra of 0 or more"),
        ({"gradient": "later"}, "'auto', 'in_forward' or 'recompute', got 'later'"),
        ({"teacher": torch.zeros(4, 11)}, r"one shape, \(rows, classes\)"),
        ({"student": torch.zeros(10), "teacher": torch.zeros(10)}, "one shape"),
        ({"student": torch.zeros(4, 0), "teacher": torch.zeros(4, 0)}, "classes at least 1"),
        ({"student": torch.zeros(4, 10, dtype=torch.int64)}, "student logits in float32"),
        ({"teacher": torch.zeros(4, 10, dtype=torch.int64)}, "teacher logits in float32"),
        ({"teacher": torch.zeros(4, 10, device="meta")}, "on one device, got cpu and meta"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    good = {"student": torch.randn(4, 10), "teacher": torch.randn(4, 10)}
    with pytest.raises(ValueError, match=words) as raised:
        dist_loss(**(good | change))
    assert str(raised.value).startswith("dist_loss needs")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.ones(4)}, "weight=None for loss 'dist', got a tensor"),
        ({"reduction": "none"}, "reduction='mean' for loss 'dist', got 'none'"),
        ({"threshold": 0.5}, "threshold=0.0 for loss 'dist', got 0.5"),
        ({"out": torch.zeros(4, 10)}, "out=None for loss 'dist', got a tensor"),
        ({"reuse_teacher_buffer": True}, "reuse_teacher_buffer=False for loss 'dist', got True"),
        ({"alpha": 1.5}, "alpha in 0 to 1, got 1.5"),
        (
            {
                "teacher": TopK(
                    torch.zeros(4, 1, dtype=torch.int32), torch.zeros(4, 1), torch.zeros(4)
                )
            },
            "loss 'kl' with a TopK teacher, got 'dist'",
        ),
    ],
)
def test_refusals_of_kd_loss(change: dict[str, Any], words: str) -> None:
    good = {
        "student": torch.randn(4, 10),
        "teacher": torch.randn(4, 10),
        "target": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=words):
        kd_loss(**(good | change), loss="dist")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("rows", "classes"), [*SHAPES, (300, 21841)])
def test_cuda(rows: int, classes: int) -> None:
    student, teacher = example(rows, classes)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        s, t = student.to(dtype), teacher.to(dtype)
        options: Any = {"temperature": 2.0, "inter": 1.5}
        expected, expected_gradient = both(dist_loss, s, t, **options)
        value, gradient = both(dist_loss, s.cuda(), t.cuda(), **options)
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-6)
        size = float(expected_gradient.abs().max())
        torch.testing.assert_close(
            gradient.cpu(), expected_gradient, rtol=1e-2, atol=1e-5 * size + 1e-12
        )
        again = both(dist_loss, s.cuda(), t.cuda(), **options)
        assert torch.equal(again[0], value)
        assert torch.equal(again[1], gradient)
