"""Statistics of rows against their twin in float64, and the loss beside them.

Class counts: 1 to 64 have a loss that takes a row a lane; 65 is less than, and 1000 more than, a
block of vectors; 21841 has rows wider than a block, and is cut into parts on several threads where
the rows are fewer.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastscarce.ops import (
    KDLoss,
    MixedTarget,
    MixedTopK,
    RowStatistics,
    TopK,
    WeightedKDLoss,
    confidence,
    kd_loss,
    reference,
    topk,
)

CLASSES = [1, 2, 10, 33, 64, 65, 1000, 21841]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOSSES = ["kl", "reverse_kl", "jsd", "skew_kl", "dkd", "logit_standard"]
TAILS = ["uniform", "renorm", "tail", "support"]


def normal(rows: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + rows * 1009 + classes)
    return 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


def odd_ones(logits: Tensor) -> Tensor:
    """With ties, masked classes, NaN, infinities, and a row without a finite logit."""
    rows, classes = logits.shape
    if rows < 9:
        return logits
    logits[0] = 0
    logits[1, classes // 2 :] = logits[1].max()
    logits[2, : classes // 2] = -math.inf
    logits[3] = -math.inf
    logits[4, -1] = math.nan
    logits[5, 0] = math.nan
    logits[6, classes // 3] = math.inf
    logits[7] = -math.inf
    logits[7, -1] = -1e4
    return logits


def statistics_of(student: Tensor, teacher: Any, **options: Any) -> RowStatistics:
    return kd_loss(student, teacher, statistics=True, **options)[1]


def check(got: RowStatistics, student: Tensor, teacher: Any, temperature: float, tail: str) -> None:
    dense = isinstance(teacher, Tensor)
    of = teacher.double() if dense else teacher
    label, teacher_label, sure, entropy = reference.row_statistics(
        student.double(), of, temperature, tail
    )
    assert got.teacher_label is not None
    assert got.confidence is not None
    assert got.entropy is not None
    assert torch.equal(got.student_label, label)
    assert torch.equal(got.teacher_label, teacher_label)
    assert got.agreement is not None
    assert torch.equal(got.agreement, label == teacher_label)
    tolerance = 1e-12 if got.confidence.dtype == torch.float64 else 5e-6
    close: Any = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(got.confidence.double(), sure, **close)
    torch.testing.assert_close(got.entropy.double(), entropy, **close)
    assert not any(x.requires_grad for x in got if x is not None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_values(isa: str, classes: int, dtype: torch.dtype) -> None:
    for rows in (0, 1, 37 if classes < 5000 else 9):
        student = odd_ones(normal(rows, classes)).to(dtype)
        teacher = odd_ones(normal(rows, classes, 1)).flip(0).to(dtype)
        student[-1:] = teacher[-1:]
        for temperature in (0.5, 1.0, 4.0):
            got = statistics_of(student, teacher, temperature=temperature)
            check(got, student, teacher, temperature, "uniform")
            # Every number of the teacher is the one that `confidence` gives, but for the rounding
            # of another order of sums where a row is a lane.
            alone = confidence(teacher, temperature=temperature)
            close = 1e-6 if classes <= 64 else 0.0
            for a, b in zip(got[1:4], (alone.label, alone.confidence, alone.entropy), strict=True):
                torch.testing.assert_close(a, b, rtol=close, atol=close, equal_nan=True)


@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_teacher_of_another_dtype(isa: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = normal(9, 70).to(dtype), normal(9, 70, 1).to(teacher_dtype)
    # Two logits that float32 can't tell apart.
    teacher[0, 5], teacher[0, 60] = 20, 20 * (1 + 1e-9)
    got = statistics_of(student, teacher, temperature=2.0)
    check(got, student, teacher, 2.0, "uniform")
    assert got.teacher_label is not None
    assert got.teacher_label[0] == (60 if teacher_dtype == torch.float64 else 5)
    assert got.confidence is not None
    assert (got.confidence.dtype == torch.float64) == (teacher_dtype == torch.float64)


# ---- TopK teachers


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("classes", CLASSES)
def test_topk_teachers(isa: str, classes: int, tail: str) -> None:
    wide_rows = classes > 1000  # their float64 twins take long; the narrow ones try every mixture
    for rows in (1, 13) if wide_rows else (0, 1, 13):
        student = normal(rows, classes)
        kept = {5, 1000} if wide_rows else {1, *(min(k, classes) for k in (5, 40, 1000))}
        for k in sorted(kept):
            for temperature in (4.0,) if wide_rows else (0.5, 1.0, 4.0):
                wide = topk(normal(rows, classes, 1), k)
                single = TopK(wide.indices, wide.log_probs.float(), wide.log_tail.float())
                half = TopK(wide.indices, wide.log_probs.half(), wide.log_tail.half())
                for teacher in (wide, single, half):
                    got = statistics_of(student, teacher, tail=tail, temperature=temperature)
                    check(got, student, teacher, temperature, tail)


def test_all_classes_say_what_the_logits_say(isa: str) -> None:
    student, teacher = normal(9, 90), normal(9, 90, 1)
    for tail in TAILS:
        got = statistics_of(student, topk(teacher, 90), tail=tail, temperature=3.0)
        for a, b in zip(got, statistics_of(student, teacher, temperature=3.0), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tail", ["uniform", "renorm"])
def test_mixtures(isa: str, tail: str) -> None:
    lam = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.75, 0.499, 0.3])
    for classes, k in ((10, 4), (100, 12), (2100, 30)):
        student, a, b = (normal(7, classes, seed) for seed in range(3))
        first, second = topk(a, k), topk(b, k // 2)
        mixture = MixedTopK(first, second, lam)
        got = statistics_of(student, mixture, tail=tail, temperature=2.0)
        check(got, student, mixture, 2.0, tail)
        assert torch.equal(got.teacher_label, torch.where(lam >= 0.5, a.argmax(1), b.argmax(1)))
        # A teacher without weight may say nothing; one with weight leaves no answer.
        second.log_probs[1:3] = -math.inf
        second.log_tail[1:3] = -math.inf
        got = statistics_of(student, mixture, tail=tail, temperature=2.0)
        check(got, student, mixture, 2.0, tail)
        assert got.teacher_label is not None
        assert (got.teacher_label == -100).tolist() == [i == 2 for i in range(7)]


def test_records_in_any_order(isa: str) -> None:
    # The lowest class of equals, wherever it stands; a class of a probability of 0 is never it.
    student = torch.zeros(4, 30)
    indices = torch.tensor([[7, 3, 20], [20, 3, 7], [1, 2, 0], [4, 5, 6]], dtype=torch.int32)
    equal = math.log(0.3)
    log_probs = torch.tensor(
        [[equal, equal, equal], [-3, equal, equal], [-math.inf, -1, -math.inf], [-math.inf] * 3]
    )
    teacher = TopK(indices, log_probs, torch.full((4,), -6.0))
    for tail in TAILS:
        got = statistics_of(student, teacher, tail=tail)
        check(got, student, teacher, 1.0, tail)
        assert got.teacher_label is not None
        assert got.teacher_label.tolist() == [3, 3, 2, -100]


@pytest.mark.parametrize("tail", TAILS)
def test_records_without_an_answer(isa: str, tail: str) -> None:
    logits = odd_ones(normal(9, 50))
    student = normal(9, 50, 1)
    for k in (1, 8, 50):
        teacher = topk(logits, k)
        got = statistics_of(student, teacher, tail=tail)
        assert got.teacher_label is not None
        assert (got.teacher_label == -100).nonzero()[:, 0].tolist() == [3, 4, 5, 6]
        assert got.confidence is not None
        assert got.entropy is not None
        assert got.confidence.isnan().nonzero()[:, 0].tolist() == [3, 4, 5, 6]
        assert got.entropy.isnan().nonzero()[:, 0].tolist() == [3, 4, 5, 6]
    # Past the Python door an index outside the classes reads nothing.
    teacher.indices[0, 0] = 2**31 - 1
    teacher.indices[1, 0] = -1
    with pytest.raises(ValueError, match="indices in 0 to 49, got 2147483647 in row 0"):
        statistics_of(student, teacher, tail=tail)
    records = (teacher.indices, teacher.log_probs, teacher.log_tail, *(None,) * 4)
    made = torch.ops.fastscarce.kd_statistics(student, None, *records, TAILS.index(tail), 1.0)
    assert made[1][:2].tolist() == [-100, -100]


# ---- the loss beside them


def gradient_of(
    student: Tensor, *arguments: Any, reduction: str, **options: Any
) -> tuple[Tensor, Tensor, RowStatistics | None]:
    leaf = student.detach().clone().requires_grad_()
    made = kd_loss(leaf, *arguments, reduction=reduction, **options)
    loss, found = made if isinstance(made, tuple) else (made, None)
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()]
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.reshape(loss.shape))
    return loss.detach(), gradient, found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_stays_the_same(loss: str, dtype: torch.dtype, threads: int) -> None:
    for rows, classes in ((0, 7), (37, 10), (50, 65), (1, 21841), (7, 21841)):
        student, teacher = normal(rows, classes).to(dtype), normal(rows, classes, 1).to(dtype)
        target = torch.arange(rows) % classes
        options: Any = {"loss": loss, "temperature": 2.0}
        alone = statistics_of(student, teacher, temperature=2.0)
        torch.set_num_threads(threads)
        try:
            for reduction in ("mean", "sum", "none"):
                options["reduction"] = reduction
                value, gradient, _ = gradient_of(student, teacher, target, **options)
                memory = torch.empty_like(student)
                for how in (
                    {},
                    {"gradient": "recompute"},
                    {"out": memory},
                    {"reuse_teacher_buffer": True},
                ):
                    given = teacher.clone()
                    made = gradient_of(student, given, target, statistics=True, **how, **options)
                    assert torch.equal(made[0], value)
                    assert torch.equal(made[1], gradient)
                    assert made[2] is not None
                    for a, b in zip(made[2], alone, strict=True):
                        assert torch.equal(a, b)
                    if "out" in how:
                        assert torch.equal(memory, gradient)
                        assert made[1].data_ptr() == memory.data_ptr()
                with torch.no_grad():
                    plain, found = kd_loss(student, teacher, target, statistics=True, **options)
                assert torch.equal(plain, value)
                for a, b in zip(found, alone, strict=True):
                    assert torch.equal(a, b)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("tail", TAILS)
def test_the_loss_of_a_topk_teacher_stays_the_same(isa: str, tail: str) -> None:
    student, teacher = normal(41, 300).float(), topk(normal(41, 300, 1).float(), 9)
    mixed = MixedTopK(teacher, topk(normal(41, 300, 2).float(), 5), torch.linspace(0, 1, 41))
    target = torch.arange(41)
    for given in (teacher, mixed) if tail in ("uniform", "renorm") else (teacher,):
        options: Any = {"tail": tail, "temperature": 2.0, "reduction": "mean"}
        value, gradient, _ = gradient_of(student, given, target, **options)
        alone = statistics_of(student, given, tail=tail, temperature=2.0)
        for how in ({}, {"gradient": "recompute"}, {"out": torch.empty_like(student)}):
            made = gradient_of(student, given, target, statistics=True, **how, **options)
            assert torch.equal(made[0], value)
            assert torch.equal(made[1], gradient)
            assert made[2] is not None
            for a, b in zip(made[2], alone, strict=True):
                assert torch.equal(a, b)


def test_any_number_of_threads_gives_the_same() -> None:
    for rows, classes in ((301, 10), (301, 1000), (31, 21841), (1, 21841)):
        student, teacher = normal(rows, classes).float(), normal(rows, classes, 1).float()
        for given in (teacher, topk(teacher, min(classes, 20))):
            first = statistics_of(student, given, temperature=4.0)
            torch.set_num_threads(2)
            try:
                for _ in range(20):
                    again = statistics_of(student, given, temperature=4.0)
                    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            finally:
                torch.set_num_threads(1)


@pytest.mark.parametrize("classes", [1, 3, 10, 64, 65])
def test_a_row_is_the_same_wherever_it_lies(isa: str, classes: int) -> None:
    student, teacher = odd_ones(normal(41, classes)).float(), odd_ones(normal(41, classes, 1))
    whole = statistics_of(student, teacher.half(), temperature=2.0)
    for rows in (slice(0, 1), slice(3, 20), slice(7, 41)):
        part = statistics_of(student[rows], teacher[rows].half(), temperature=2.0)
        for a, b in zip(part, whole, strict=True):
            assert a is not None
            assert b is not None
            torch.testing.assert_close(a, b[rows], rtol=0, atol=0, equal_nan=True)


def test_rows_that_teach_nothing_have_statistics(isa: str) -> None:
    for classes in (10, 100):
        student, teacher = normal(12, classes).float(), normal(12, classes, 1).float()
        expected = statistics_of(student, teacher, temperature=2.0)
        target = torch.full((12,), -100)
        weight = torch.zeros(12)
        for options in (
            {"target": target},
            {"target": target, "weight": weight},
            {"threshold": 1.0},
            {"target": target, "alpha": 0.0},
            {"target": target, "alpha": (0.0, 1.0)},
            {"target": normal(12, classes).softmax(1).float(), "label_smoothing": 0.1},
        ):
            got = statistics_of(student, teacher, temperature=2.0, **options)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_without_a_teacher(isa: str) -> None:
    student = odd_ones(normal(9, 40)).float()
    sound = torch.tensor([0, 1, 2, 7, 8])
    for loss in ("kl", "dist"):
        value, found = kd_loss(student[sound], None, sound, statistics=True, loss=loss)
        assert torch.equal(value, kd_loss(student[sound], None, sound))
        assert torch.equal(found.student_label, student[sound].argmax(1))
        assert found[1:] == (None,) * 4


def test_dist() -> None:
    student, teacher = normal(12, 40).float(), normal(12, 40, 1).float()
    for target in (None, torch.arange(12)):
        options: Any = {"loss": "dist", "temperature": 2.0}
        leaf = student.clone().requires_grad_()
        value, found = kd_loss(leaf, teacher, target, statistics=True, **options)
        assert torch.equal(value, kd_loss(student, teacher, target, **options))
        assert value.requires_grad
        check(found, student, teacher, 2.0, "uniform")


def test_strided_rows(isa: str) -> None:
    wide, other = normal(30, 90).float(), normal(30, 90, 1).float()
    for cut in (
        lambda x: x[::2],
        lambda x: x[:, 7:70],
        lambda x: x.t(),
        lambda x: x[:1].expand(30, 90),
    ):
        got = statistics_of(cut(wide), cut(other), temperature=2.0)
        expected = statistics_of(cut(wide).clone(), cut(other).clone(), temperature=2.0)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_later_passes_leave_the_statistics_alone() -> None:
    student, teacher = normal(6, 30).requires_grad_(), normal(6, 30, 1)
    target = torch.arange(6)
    for mode in ("in_forward", "recompute"):
        loss, found = kd_loss(student, teacher, target, gradient=mode, statistics=True)
        for x in found:
            assert x is not None
            x.zero_()
        for last in (False, True):
            torch.autograd.grad(loss, student, retain_graph=not last)
        assert not any(x.any() for x in found if x is not None)

    def loss_of(logits: Tensor) -> Tensor:
        options: Any = {"gradient": "recompute", "temperature": 2.0}
        return kd_loss(logits, teacher, target, statistics=True, **options)[0]

    assert torch.autograd.gradgradcheck(loss_of, (student,))


def test_a_teacher_with_a_graph_gets_no_gradient() -> None:
    student, teacher = normal(6, 30), normal(6, 30, 1).requires_grad_()
    for leaf in (student, student.clone().requires_grad_()):
        loss, found = kd_loss(leaf, teacher, statistics=True)
        assert loss.requires_grad == leaf.requires_grad
        assert not any(x.requires_grad for x in found if x is not None)


# ---- the operator, the compiler, modules


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_opcheck() -> None:
    student, teacher = normal(5, 12).float(), normal(5, 12, 1).float()
    record = topk(teacher, 3)
    parts = (record.indices, record.log_probs, record.log_tail)
    operator = torch.ops.fastscarce.kd_statistics.default
    mixed = (*parts, *parts, torch.rand(5))
    for given in ((teacher, *(None,) * 7), (None, *parts, *(None,) * 4), (None, *mixed)):
        torch.library.opcheck(operator, (student, *given, 0, 2.0))
    torch.library.opcheck(operator, (student, *(None,) * 8, 0, 2.0))
    torch.library.opcheck(operator, (student, teacher.double(), *(None,) * 7, 0, 2.0))
    numbers = (2.0, 0.5, 0.5, 0.0, 0.0, -100, 2)
    columns = tuple(operator(student, teacher, *(None,) * 7, 0, 2.0))
    labels = (torch.arange(5), *(None,) * 4)
    for written in ((True, student * 0, *columns), (True, None, *columns), (False, None, *columns)):
        torch.library.opcheck(
            torch.ops.fastscarce.kd_loss_out.default,
            (student, teacher, *labels, 0, 0.0, 0.0, *numbers, *written),
        )
        torch.library.opcheck(
            torch.ops.fastscarce.kd_loss_topk_out.default,
            (student, *parts, *(None,) * 4, *labels, 0, *numbers, *written),
        )


def test_compiled() -> None:
    student, teacher = normal(6, 33).float(), normal(6, 33, 1).float()
    target = torch.arange(6)
    record = topk(teacher, 5)
    for given, options in (
        (teacher, {}),
        (record, {"tail": "renorm"}),
        (MixedTopK(record, record, torch.rand(6)), {}),
        (None, {}),
        (teacher, {"loss": "dist"}),
    ):

        def both(x: Tensor, given: Any = given, options: Any = options) -> Any:
            return kd_loss(2 * x, given, target, temperature=2.0, statistics=True, **options)

        torch._dynamo.reset()  # what other tests compiled counts toward its limit
        leaf = student.clone().requires_grad_()
        loss, found = torch.compile(both, fullgraph=True, backend="aot_eager")(leaf)
        expected, expected_found = both(student)
        torch.testing.assert_close(loss.detach(), expected)
        for a, b in zip(found, expected_found, strict=True):
            assert a is b is None or torch.equal(a, b)
        (gradient,) = torch.autograd.grad(loss, leaf)
        eager = student.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(both(eager)[0], eager)[0])


def test_modules() -> None:
    student, teacher = normal(6, 33).float(), normal(6, 33, 1).float()
    target = MixedTarget(torch.arange(6), torch.arange(6).flip(0), torch.rand(6))
    module = KDLoss(temperature=2.0, statistics=True)
    weighted = WeightedKDLoss(0.5, 0.5, temperature=2.0, statistics=True)
    expected = kd_loss(student, teacher, target, temperature=2.0, statistics=True)
    for one in (module, weighted):
        loss, found = one(student, teacher, target)
        torch.testing.assert_close(loss, expected[0])
        assert all(torch.equal(a, b) for a, b in zip(found, expected[1], strict=True))
    module.statistics = False
    assert torch.equal(module(student, teacher, target), expected[0])


def test_what_the_operators_refuse() -> None:
    student, teacher = torch.zeros(5, 12), torch.zeros(5, 12)
    operator = torch.ops.fastscarce.kd_statistics
    columns = list(operator(student, teacher, *(None,) * 7, 0, 2.0))
    numbers = (0, 0.0, 0.0, 2.0, 0.5, 0.5, 0.0, 0.0, -100, 2, False, None)
    for place, wrong in (
        (0, None),
        (1, None),
        (1, torch.zeros(4, dtype=torch.int64)),
        (2, torch.zeros(5, dtype=torch.float64)),
        (3, torch.zeros(10)[::2]),
        (4, torch.zeros(5)),
    ):
        given = [wrong if i == place else x for i, x in enumerate(columns)]
        with pytest.raises((RuntimeError, ValueError), match="all of a row's statistics"):
            torch.ops.fastscarce.kd_loss_out(student, teacher, *(None,) * 5, *numbers, *given)
    with pytest.raises((RuntimeError, ValueError), match="logits of a teacher, all of its records"):
        operator(student, teacher, torch.zeros(5, 1, dtype=torch.int32), *(None,) * 6, 0, 1.0)
    with pytest.raises((RuntimeError, ValueError), match="teacher logits of the student's shape"):
        operator(student, teacher[:4], *(None,) * 7, 0, 1.0)
    with pytest.raises(ValueError, match="kd_loss needs a positive, finite temperature, got 0"):
        kd_loss(student, teacher, temperature=0, statistics=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("classes", [1, 10, 33, 1000, 1025, 21841])
def test_cuda(classes: int) -> None:
    for dtype in DTYPES:
        student = odd_ones(normal(37, classes)).to(dtype)
        teacher = odd_ones(normal(37, classes, 1)).flip(0).to(dtype)
        record = topk(normal(37, classes, 2), min(classes, 16))
        mixed = MixedTopK(record, topk(teacher.double(), 1), torch.linspace(0, 1, 37))
        for given, tails in ((teacher, TAILS[:1]), (record, TAILS), (mixed, TAILS[:2])):
            for tail in tails:
                options: Any = {"tail": tail, "temperature": 2.0}
                expected = statistics_of(student, given, **options)
                leaf = student.cuda().requires_grad_()
                first = statistics_of(leaf, given.to("cuda"), **options)
                for a, b in zip(first, expected, strict=True):
                    assert a is not None
                    torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5, equal_nan=True)
                for a, b in zip(
                    first, statistics_of(leaf, given.to("cuda"), **options), strict=True
                ):
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
