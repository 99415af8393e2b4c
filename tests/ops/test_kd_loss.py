"""kd_loss against its twin in float64.

The class counts hit each path of the kernels: 1 to 64 lie one row a lane (below 8 in part of a
block, 10 and 31 with a block that overlaps), 65 to 1023 are one chunk with and without a tail, 1025
two chunks, 21841 many (and, with few rows, parts on several threads).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastscarce.ops import MixedTarget, kd_loss, reference

CLASSES = [1, 2, 3, 7, 8, 10, 31, 33, 64, 65, 100, 365, 1000, 1001, 1023, 1025, 21841]
FORMS = ["index", "mixed", "dense", "none", "no_teacher"]


def example(
    rows: int, classes: int, form: str = "index", seed: int = 0, spread: float = 3.0
) -> tuple[Tensor, Tensor | None, Tensor | MixedTarget | None]:
    generator = torch.Generator().manual_seed(seed + rows * 100003 + classes)

    def normal() -> Tensor:
        return spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)

    def index() -> Tensor:
        values = torch.randint(classes, (rows,), generator=generator)
        values[::4] = -100
        return values

    student, teacher = normal(), normal()
    target: Tensor | MixedTarget | None = index()
    if form == "mixed":
        target = MixedTarget(index(), index().roll(1), torch.rand(rows, generator=generator))
    elif form == "dense":
        target = normal().softmax(1)
        target[:, classes // 2 + 1 :] = 0
    elif form == "none":
        target = None
    return student, None if form == "no_teacher" else teacher, target


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def gradient_of(function: Any, student: Tensor, *arguments: Any, **options: Any) -> Any:
    leaf = student.detach().clone().requires_grad_()
    loss = function(leaf, *arguments, **options)
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()]
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.reshape(loss.shape))
    return loss.detach(), gradient


def compare(dtype: torch.dtype, student: Tensor, teacher: Any, target: Any, **options: Any) -> None:
    """Error of kd_loss against float64 <= that of the plain twin in float32, plus rounding."""
    student, teacher, target = (as_dtype(x, dtype) for x in (student, teacher, target))
    double = [as_dtype(x, torch.float64) for x in (student, teacher, target)]
    single = [as_dtype(x, torch.float32) for x in (student, teacher, target)]
    exact, exact_gradient = gradient_of(reference.kd_loss, *double, **options)
    eager, eager_gradient = gradient_of(reference.kd_loss, *single, **options)
    loss, gradient = gradient_of(kd_loss, student, teacher, target, **options)
    accumulated = 1e-15 if dtype == torch.float64 else 2.4e-7
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    if loss.numel() == 0:
        assert loss.shape == exact.shape
        return
    slack = 0.0 if dtype == torch.float64 else float((eager - exact).abs().max())
    scale = 1 + float(exact.abs().max())
    assert float((loss - exact).abs().max()) <= slack + 4 * accumulated * scale
    if not exact_gradient.numel():
        return
    slack = 0.0 if dtype == torch.float64 else float((eager_gradient - exact_gradient).abs().max())
    # Terms of a gradient cancel (q - p): rounding is relative to what is subtracted.
    size = options.get("temperature", 1.0) / (student.shape[0] if loss.dim() == 0 else 1) * 2
    if options.get("reduction") == "sum":
        size *= student.shape[0]
    rounding = torch.finfo(dtype).eps * exact_gradient.abs() * 1.01 + torch.finfo(dtype).tiny
    bound = slack + 8 * accumulated * max(size, 1e-30) + rounding
    assert bool(((gradient - exact_gradient).abs() <= bound).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", CLASSES)
def test_values_and_gradients(isa: str, classes: int, form: str) -> None:
    rows = 37 if classes <= 100 else 5
    for temperature in (1.0, 4.0, 2.5):
        compare(
            torch.float32,
            *example(rows, classes, form),
            temperature=temperature,
            alpha=0.7,
            label_smoothing=0.1 if temperature == 4.0 else 0.0,
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 0.5, 0.05])
@pytest.mark.parametrize("classes", [10, 100])
def test_temperatures(isa: str, classes: int, temperature: float) -> None:
    compare(torch.float32, *example(9, classes), temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [3, 10, 33, 1001, 1025])
def test_dtypes(isa: str, classes: int, form: str, dtype: torch.dtype) -> None:
    for reduction in ("mean", "sum", "none"):
        compare(dtype, *example(11, classes, form), temperature=2.0, reduction=reduction)


@pytest.mark.parametrize("teacher_dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_teacher_of_another_dtype(isa: str, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher, target = example(6, 70)
    assert teacher is not None
    teacher = teacher.to(teacher_dtype)
    loss = kd_loss(student.to(dtype), teacher, target)
    exact = reference.kd_loss(student.to(dtype).double(), teacher.double(), target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1, 7, 33])
@pytest.mark.parametrize("classes", [10, 300, 21841])
def test_rows_and_weights(isa: str, rows: int, classes: int, reduction: str) -> None:
    weight = torch.rand(rows)
    weight[::3] = 0
    for form in FORMS if classes == 10 else FORMS[:2]:
        student, teacher, target = example(rows, classes, form)
        compare(torch.float32, student, teacher, target, weight=weight, reduction=reduction)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("classes", [10, 1000, 21841])
def test_repeatable(isa: str, classes: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        student, teacher, target = example(1 if classes > 10000 else 40, classes)
        student, teacher = as_dtype(student, torch.float32), as_dtype(teacher, torch.float32)
        first, first_gradient = gradient_of(kd_loss, student, teacher, target, temperature=4.0)
        for _ in range(100 if classes < 10000 else 20):
            loss, gradient = gradient_of(kd_loss, student, teacher, target, temperature=4.0)
            assert torch.equal(first, loss)
            assert torch.equal(first_gradient, gradient)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_one_wide_row_is_the_same_for_any_number_of_threads(isa: str, form: str) -> None:
    student, teacher, target = example(1, 21841, form)
    edges: list[tuple[float, slice]] = [(0.0, slice(0, 0)), (math.nan, slice(5, 6))]
    # Classes of several chunks.
    edges += [(-math.inf, slice(9000, 12000)), (-math.inf, slice(0, 3000))]
    for value, at in edges:
        given = as_dtype(student.clone(), torch.float32)
        given[:, at] = value
        expected = gradient_of(kd_loss, given, as_dtype(teacher, torch.float32), target)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            try:
                got = gradient_of(kd_loss, given, as_dtype(teacher, torch.float32), target)
            finally:
                torch.set_num_threads(1)
            for one, other in zip(expected, got, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_no_gradient_gives_the_same_loss(isa: str) -> None:
    for classes in (10, 1000, 1025):
        student, teacher, target = example(9, classes)
        leaf = student.float().requires_grad_()
        with torch.no_grad():
            alone = kd_loss(leaf, teacher, target, temperature=2.0)
        assert not alone.requires_grad
        assert torch.equal(alone, kd_loss(leaf, teacher, target, temperature=2.0).detach())


@pytest.mark.parametrize("classes", [10, 100, 1100])
def test_masks(isa: str, classes: int) -> None:
    student, teacher, _ = example(9, classes)
    assert teacher is not None
    student, teacher = student.float(), teacher.float()
    student[:, 3:7] = teacher[:, 3:7] = -math.inf
    target = torch.zeros(9, dtype=torch.int64)
    loss, gradient = gradient_of(kd_loss, student, teacher, target, temperature=2.0)
    kept = [i for i in range(classes) if not 3 <= i < 7]
    exact, exact_gradient = gradient_of(
        reference.kd_loss, student[:, kept], teacher[:, kept], target, temperature=2.0
    )
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(gradient[:, kept], exact_gradient, rtol=1e-4, atol=1e-7)
    assert not gradient[:, 3:7].any()

    # The teacher wants a class that the student excludes: infinite loss, finite gradient.
    student[0, 1] = -math.inf
    loss, gradient = gradient_of(kd_loss, student, teacher, None, reduction="none")
    assert loss[0] == math.inf
    assert loss[1:].isfinite().all()
    assert gradient.isfinite().all()

    # No class left on both sides: nothing to learn. In the student alone: infinite.
    empty = torch.full((9, classes), -math.inf)
    loss, gradient = gradient_of(kd_loss, empty, empty, None)
    assert loss == 0
    assert not gradient.any()
    loss, gradient = gradient_of(kd_loss, empty, teacher, None)
    assert loss == math.inf
    assert gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("classes", [10, 100, 3000])
def test_large_logits_stay_finite(isa: str, classes: int, temperature: float) -> None:
    student, teacher, target = example(9, classes, spread=1.0)
    assert teacher is not None
    for scale in (1e4, -1e4):
        s, t = (scale * student).float(), (scale * teacher).float()
        loss, gradient = gradient_of(kd_loss, s, t, target, temperature=temperature)
        exact = reference.kd_loss(s.double(), t.double(), target, temperature=temperature)
        assert gradient.isfinite().all()
        torch.testing.assert_close(
            loss.double(), exact * torch.ones(()).double(), rtol=1e-5, atol=1e-3
        )


@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.5, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_maxima_of_chunks_far_apart(isa: str, dtype: torch.dtype, temperature: float) -> None:
    # Exponentials of a chunk are relative to the maxima so far: those rise, fall, or are not there.
    student, teacher, target = example(6, 3500)
    assert teacher is not None
    quarter = torch.arange(3500) // 875
    for logits, row, shifts in (
        (student, 0, (0, 300, 600, 900)),
        (student, 1, (900, 600, 300, 0)),
        (teacher, 1, (0, 400, 0, 400)),
        (student, 2, (0, 5, 10, 5)),
        (teacher, 2, (10, 5, 0, 10)),
        (student, 3, (-math.inf, 0, -math.inf, 1)),
        (teacher, 3, (-math.inf, 0, -math.inf, -1)),
        (teacher, 4, (0, -math.inf, 7, -math.inf)),
    ):
        logits[row] += torch.tensor(shifts, dtype=torch.float64)[quarter]
    if isinstance(target, Tensor):
        target[:] = torch.tensor([3000, 10, 2000, 900, -100, 3499])
    compare(dtype, student, teacher, target, temperature=temperature, reduction="none")
    compare(dtype, student, None, target, reduction="none")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("classes", [10, 100])
def test_nan_is_not_hidden(isa: str, classes: int, bad: float) -> None:
    for side in (0, 1):
        logits = [x.float() for x in example(9, classes, "none")[:2] if x is not None]
        logits[side][4, 5] = bad
        loss = kd_loss(logits[0], logits[1], None, reduction="none")
        assert loss[4].isnan()
        assert loss[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("classes", [10, 1000])
def test_invariants(isa: str, classes: int) -> None:
    student, teacher, target = example(9, classes)
    assert teacher is not None
    s, t = student.float(), teacher.float()
    loss, gradient = gradient_of(kd_loss, s, t, target, temperature=3.0, reduction="sum")
    assert gradient.sum(1).abs().max() < 1e-5
    shifted, _ = gradient_of(kd_loss, s + 8, t - 8, target, temperature=3.0, reduction="sum")
    torch.testing.assert_close(loss, shifted, rtol=1e-5, atol=1e-5)
    nothing = torch.full((9,), -100)
    loss, gradient = gradient_of(kd_loss, s, None, nothing)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("classes", [2, 100])
def test_exponential_is_accurate(isa: str, classes: int) -> None:
    # Two classes count: the gradient of the second is its probability, e^x / (1 + e^x).
    logits = torch.full((5000, classes), -math.inf)
    logits[:, 0] = 0
    logits[:, 1] = torch.linspace(-86, 0, 5000)
    target = torch.zeros(5000, dtype=torch.int64)
    _, gradient = gradient_of(kd_loss, logits, None, target, reduction="sum")
    exact = 0.5 * torch.sigmoid(logits[:, 1].double())
    error = ((gradient[:, 1].double() - exact) / exact).abs().max()
    assert error < 3.5 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("rows", "classes"), [(2200, 1001), (1100, 2101)])
@pytest.mark.parametrize("form", ["dense", "none", "soft", "smooth"])
def test_streamed_rows_are_those_of_a_small_batch(
    isa: str, rows: int, classes: int, form: str
) -> None:
    # Above 8 MiB the gradient is streamed, a row of it while the next one is worked on; rows that
    # are left out come between, first and last. Odd rows begin at every offset of a vector.
    generator = torch.Generator().manual_seed(rows)
    student, teacher, soft = (torch.randn(rows, classes, generator=generator) for _ in range(3))
    target = torch.randint(classes, (rows,), generator=generator)
    weight = torch.ones(rows)
    weight[[0, 1, 7, 8, rows // 2, rows - 1]] = 0
    options: dict[str, Any] = {"temperature": 2.0, "reduction": "sum"}
    if form == "smooth":
        options["label_smoothing"] = 0.1

    def of(part: slice) -> Tensor:
        given = None if form == "none" else teacher[part]
        label = soft[part].softmax(1) if form == "soft" else target[part]
        _, found = gradient_of(kd_loss, student[part], given, label, weight=weight[part], **options)
        return found

    whole = of(slice(None))
    for part in (slice(None, rows // 3), slice(rows // 3, rows)):
        assert torch.equal(whole[part], of(part))
    assert not whole[weight == 0].any()


def test_strided_rows(isa: str) -> None:
    student, teacher, _ = example(12, 90)
    assert teacher is not None
    s, t = student.float(), teacher.float()
    for cut in (
        lambda x: x[::2],
        lambda x: x[:, 7:70],
        lambda x: x.t().contiguous().t(),
        lambda x: x[:1].expand(12, 90),
    ):
        y = torch.zeros(cut(s).shape[0], dtype=torch.int64)
        expected = kd_loss(cut(s).clone(), cut(t).clone(), y)
        assert torch.equal(kd_loss(cut(s), cut(t), y), expected)


def test_many_rows_in_half_keep_small_gradients() -> None:
    rows, classes = 8192, 16
    student = torch.zeros(rows, classes, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64)
    # 65536: the usual first scale of mixed-precision training.
    (65536 * kd_loss(student, None, target)).backward()
    assert student.grad is not None
    torch.testing.assert_close(
        student.grad[:, 1:].float(), torch.full((rows, classes - 1), 65536 / 16 / rows)
    )


def test_retain_graph_and_double_use() -> None:
    student, teacher, target = example(5, 100)
    leaf = student.float().requires_grad_()
    loss = kd_loss(leaf, teacher, target)
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    once = leaf.grad.clone()
    leaf.grad.mul_(3)  # what is handed out is not what is kept
    leaf.grad = None
    (2 * loss).backward(retain_graph=True)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 2 * once, rtol=0, atol=0)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 3 * once, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, reduction: str) -> None:
    student, teacher, target = example(4, 11, form)

    def loss(logits: Tensor) -> Tensor:
        options: dict[str, Any] = {"label_smoothing": 0.1, "reduction": reduction}
        return kd_loss(logits, teacher, target, temperature=2.0, **options)

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck(form: str, with_gradient: bool) -> None:
    student, teacher, target = example(5, 12, form)
    student = student.float().requires_grad_(with_gradient)
    mixed = target if isinstance(target, MixedTarget) else None
    labels = (mixed.a, mixed.b, mixed.lam) if mixed else (target, None, None)
    numbers = (0, 0.0, 0.0, 2.0, 0.5, 0.5, 0.1, 0.0, -100, 2)
    torch.library.opcheck(
        torch.ops.fastscarce.kd_loss.default,
        (student, teacher, *labels, None, None, *numbers, with_gradient),
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_opcheck_backward() -> None:
    arguments = (torch.randn(5, 12), torch.tensor(0.5), torch.tensor(2.0))
    torch.library.opcheck(torch.ops.fastscarce.kd_loss_backward.default, arguments)
    torch.library.opcheck(torch.ops.fastscarce.kd_loss_backward_.default, arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["mixed", "none"])
def test_compile_fullgraph(form: str) -> None:
    student, teacher, target = example(6, 20, form)
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    loss, gradient = gradient_of(compiled, student.float(), teacher, target, temperature=2.0)
    expected, expected_gradient = gradient_of(
        kd_loss, student.float(), teacher, target, temperature=2.0
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.filterwarnings("ignore")
def test_compile_with_inductor() -> None:
    student, teacher, target = example(6, 20)
    weights = torch.randn(20, 20)

    def step(x: Tensor) -> Tensor:
        return kd_loss(x @ weights, teacher, target, temperature=2.0)

    compiled = torch.compile(step, fullgraph=True)
    for expected, got in zip(
        gradient_of(step, student.float()), gradient_of(compiled, student.float()), strict=True
    ):
        torch.testing.assert_close(expected, got)


def test_autocast() -> None:
    student, teacher, target = example(6, 20)
    weights = torch.randn(20, 20, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = student.float() @ weights
        loss = kd_loss(logits, teacher, target)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert weights.grad is not None
    assert weights.grad.isfinite().all()


def test_kernel_is_safe_without_checks(isa: str) -> None:
    for classes in (10, 100, 2000):
        target = torch.tensor([0, classes, -1, 2**62, -(2**62), 1])
        numbers = (0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, -100, 0, True)
        loss, gradient, _ = torch.ops.fastscarce.kd_loss(
            torch.randn(6, classes), None, target, *(None,) * 4, *numbers
        )
        assert loss.isnan().tolist() == [False, True, True, True, True, False]
        assert not gradient[1:5].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [1, 10, 33, 1000, 1025, 21841])
def test_cuda(classes: int, form: str) -> None:
    def on_gpu(value: Any) -> Any:
        return None if value is None else value.to("cuda")

    student, teacher, target = example(37, classes, form)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        s, t = as_dtype(student, dtype), as_dtype(teacher, dtype)
        leaf = s.cuda().requires_grad_()
        loss = kd_loss(leaf, on_gpu(t), on_gpu(target), temperature=2.0)
        loss.backward()
        assert leaf.grad is not None
        expected, expected_gradient = gradient_of(kd_loss, s, t, target, temperature=2.0)
        torch.testing.assert_close(loss.detach().cpu(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaf.grad.cpu() * 0.5, expected_gradient, rtol=1e-2, atol=1e-6)
