"""kd_loss with TopK teachers: values and gradients against their twins in float64.

Class counts: a row of part of a vector, whole vectors, a tail, one chunk of kd_loss and several.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastscarce.ops import KDLoss, MixedTarget, MixedTopK, TopK, kd_loss, reference, topk

TAILS = ["uniform", "renorm", "tail", "support"]


def normal(rows: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + rows * 1009 + classes)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return (2 * logits).bfloat16().double()  # exact in every dtype


def labels(rows: int, classes: int, form: str) -> Any:
    generator = torch.Generator().manual_seed(rows)

    def index() -> Tensor:
        values = torch.randint(classes, (rows,), generator=generator)
        values[::4] = -100
        return values

    if form == "none":
        return None
    if form == "dense":
        return normal(rows, classes, 5).softmax(1)
    if form == "mixed":
        return MixedTarget(index(), index(), torch.rand(rows, generator=generator))
    return index()


def single(teacher: TopK) -> TopK:
    return TopK(teacher.indices, teacher.log_probs.float(), teacher.log_tail.float())


def two(rows: int, classes: int, k: int) -> MixedTopK:
    generator = torch.Generator().manual_seed(k)
    lam = torch.rand(rows, generator=generator)
    lam[0], lam[-1] = 1, 0
    first, second = (normal(rows, classes, seed) for seed in (1, 2))
    return MixedTopK(single(topk(first, k)), single(topk(second, max(1, k // 2))), lam)


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def both(function: Any, student: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = function(leaf, *arguments, **options)
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()]
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.reshape(loss.shape))
    return loss.detach(), gradient


def compare(dtype: torch.dtype, student: Tensor, teacher: Any, target: Any, **options: Any) -> None:
    """Error against float64 <= that of the plain twin in float32, plus rounding."""
    student, target = cast(student, dtype), cast(target, dtype)
    exact, exact_gradient = both(
        reference.kd_loss, student.double(), teacher, cast(target, torch.float64), **options
    )
    eager, eager_gradient = both(
        reference.kd_loss, student.float(), teacher, cast(target, torch.float32), **options
    )
    loss, gradient = both(kd_loss, student, teacher, target, **options)
    wide = dtype == torch.float64
    assert gradient.dtype == dtype
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    rounding = 1e-14 if wide else 1e-6
    slack = 0.0 if wide else float((eager - exact).abs().max())
    assert float((loss - exact).abs().max()) <= slack + rounding * (1 + float(exact.abs().max()))
    slack = 0.0 if wide else 2 * float((eager_gradient - exact_gradient).abs().max())
    size = 4 * options.get("temperature", 1.0)
    if loss.dim() == 0 and options.get("reduction") != "sum":
        size /= len(exact_gradient)
    bound = slack + rounding * size + 1.01 * torch.finfo(dtype).eps * exact_gradient.abs()
    assert bool(((gradient - exact_gradient).abs() <= bound + torch.finfo(dtype).tiny).all())


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("form", ["index", "mixed", "dense", "none"])
@pytest.mark.parametrize("classes", [2, 10, 33, 100, 1001, 2100])
def test_values_and_gradients(isa: str, classes: int, form: str, tail: str) -> None:
    student, target = normal(11, classes), labels(11, classes, form)
    for temperature in (1.0, 2.0, 3.5):
        for k in {1, min(5, classes), min(40, classes)}:
            compare(
                torch.float32,
                student,
                single(topk(normal(11, classes, 1), k)),
                target,
                tail=tail,
                temperature=temperature,
                alpha=0.7,
                label_smoothing=0.1 if temperature == 2.0 else 0.0,
            )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(isa: str, dtype: torch.dtype, tail: str) -> None:
    for reduction in ("mean", "sum", "none"):
        for classes in (10, 131):
            teacher = single(topk(normal(9, classes, 1), 6))
            target = labels(9, classes, "index")
            compare(
                dtype,
                normal(9, classes),
                teacher,
                target,
                tail=tail,
                temperature=2.0,
                reduction=reduction,
                weight=torch.linspace(0, 2, 9),
            )


@pytest.mark.parametrize("tail", ["uniform", "renorm"])
def test_mixture(isa: str, tail: str) -> None:
    for classes, k in ((10, 4), (100, 12), (2100, 30)):
        for form in ("mixed", "none"):
            compare(
                torch.float32,
                normal(9, classes),
                two(9, classes, k),
                labels(9, classes, form),
                tail=tail,
                temperature=2.0,
            )


def test_mixture_has_the_gradient_of_two_losses() -> None:
    student, teacher = normal(7, 50), two(7, 50, 8)
    _, mixed = both(kd_loss, student, teacher, temperature=2.0)
    _, first = both(kd_loss, student, teacher.a, weight=teacher.lam, temperature=2.0)
    _, second = both(kd_loss, student, teacher.b, weight=1 - teacher.lam, temperature=2.0)
    total = float(teacher.lam.sum())
    torch.testing.assert_close(mixed, (total * first + (7 - total) * second) / 7)


@pytest.mark.parametrize("tail", TAILS)
def test_all_classes_are_the_dense_teacher(isa: str, tail: str) -> None:
    student, dense = normal(8, 90), normal(8, 90, 1)
    target = labels(8, 90, "index")
    expected = both(kd_loss, student, dense, target, temperature=3.0)
    got = both(kd_loss, student, topk(dense, 90), target, tail=tail, temperature=3.0)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_uniform_equals_the_dense_teacher_with_one_value_for_the_rest() -> None:
    student, teacher = normal(8, 60), topk(normal(8, 60, 1), 7)
    for temperature in (0.5, 1.0, 4.0):
        expected = both(kd_loss, student, teacher.dense(60), temperature=temperature)
        got = both(kd_loss, student, teacher, temperature=temperature)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("tail", TAILS)
def test_half_precision_records(isa: str, tail: str) -> None:
    # A table keeps 16 bits a value; the loss reads them as they are.
    wide = topk(normal(6, 300, 1), 16)
    record = TopK(wide.indices, wide.log_probs.half(), wide.log_tail.half())
    student = normal(6, 300).float()
    exact, _ = both(kd_loss, student, wide, tail=tail)
    compare(torch.float32, student, record, None, tail=tail)
    value, _ = both(kd_loss, student, record, tail=tail)
    torch.testing.assert_close(value, exact, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck_and_second_derivative(tail: str) -> None:
    student, teacher = normal(4, 9).requires_grad_(), topk(normal(4, 9, 1), 3)
    target = labels(4, 9, "index")

    def function(logits: Tensor, mode: str = "in_forward") -> Tensor:
        return kd_loss(logits, teacher, target, tail=tail, temperature=2.0, gradient=mode)

    assert torch.autograd.gradcheck(function, (student,))
    assert torch.autograd.gradgradcheck(lambda x: function(x, "recompute"), (student,))
    for reduction in ("mean", "none"):
        options: Any = {"tail": tail, "reduction": reduction}
        again = both(kd_loss, student, teacher, target, gradient="recompute", **options)
        torch.testing.assert_close(again, both(kd_loss, student, teacher, target, **options))
    if tail in ("uniform", "renorm"):
        mixture = two(4, 9, 4)
        assert torch.autograd.gradgradcheck(
            lambda x: kd_loss(x, mixture, target, tail=tail, gradient="recompute"), (student,)
        )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("classes", [10, 2100])
def test_threshold(isa: str, classes: int, tail: str) -> None:
    student, teacher = normal(20, classes), single(topk(normal(20, classes, 1), 6))
    target = labels(20, classes, "index")
    sure = reference.topk_rows(student, teacher, 2.0, tail)[1]
    middle = float(sure.sort().values[9:11].mean())
    options: Any = {"tail": tail, "temperature": 2.0, "reduction": "none"}
    compare(torch.float32, student, teacher, target, threshold=middle, **options)
    some = kd_loss(student, teacher, threshold=middle, **options)
    assert int((some == 0).sum()) == 10
    _, gradient = both(kd_loss, student, teacher, threshold=middle, **options)
    assert not gradient[some == 0].any()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("classes", [10, 100, 2100])
def test_masks(isa: str, classes: int, tail: str) -> None:
    # Classes that neither side allows: with a teacher that names the others they count nothing.
    student, dense = normal(6, classes).float(), normal(6, classes, 1).float()
    student[:, 2:5] = dense[:, 2:5] = -math.inf
    kept = [i for i in range(classes) if not 2 <= i < 5]
    target = torch.full((6,), 7)
    place = torch.tensor(kept)
    for k in (3, len(kept)):
        part = topk(dense[:, kept], k)
        teacher = topk(dense, k)
        assert torch.equal(teacher.indices.long(), place[part.indices.long()])
        # At another temperature the excluded classes count in the mean that the tail is.
        options: Any = {"tail": tail, "temperature": 1.0 if tail == "tail" else 2.0}
        value, gradient = both(kd_loss, student, teacher, target, **options)
        few = torch.where(target > 4, target - 3, target)
        exact, exact_gradient = both(
            reference.kd_loss, student[:, kept].double(), part, few, **options
        )
        assert gradient.isfinite().all()
        if tail == "uniform" and k == 3:
            assert value == math.inf  # the rest falls on all classes, also on those
            continue
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient[:, kept].double(), exact_gradient, rtol=1e-4, atol=1e-6)
        assert not gradient[:, 2:5].any()
    # The student excludes a class that the teacher names: infinite, and a finite gradient.
    student[:, 7] = -math.inf
    teacher = topk(dense, 4)
    teacher.indices[:, 0] = 7
    value, gradient = both(kd_loss, student, teacher, tail=tail, reduction="none")
    assert (value == math.inf).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
def test_edges(isa: str, tail: str) -> None:
    student = normal(5, 40).float()
    silent = topk(torch.full((5, 40), -math.inf), 4)
    value, gradient = both(kd_loss, student, silent, tail=tail)
    assert value == 0
    assert not gradient.any()
    empty = torch.full((5, 40), -math.inf)
    _, gradient = both(kd_loss, empty, silent, tail=tail)
    assert not gradient.isnan().any()
    bad = topk(student, 4)
    bad.log_probs[2, 1] = math.nan
    rows = kd_loss(student, bad, tail=tail, reduction="none")
    assert rows.isnan().nonzero().tolist() == [[2]]
    teacher = topk(normal(5, 40, 1).float(), 4)
    large, gradient = both(kd_loss, 1e4 * student, teacher, tail=tail, temperature=0.05)
    assert large.isfinite()
    assert gradient.isfinite().all()
    none = topk(student[:0], 4)
    assert kd_loss(student[:0], none, tail=tail) == 0
    one = torch.zeros(3, 1)
    assert kd_loss(one, topk(one, 1), tail=tail) == 0


@pytest.mark.parametrize("tail", TAILS)
def test_invariants(isa: str, tail: str) -> None:
    student, teacher = normal(9, 200).float(), topk(normal(9, 200, 1).float(), 12)
    options: Any = {"tail": tail, "temperature": 3.0, "reduction": "sum"}
    target = labels(9, 200, "index")
    value, gradient = both(kd_loss, student, teacher, target, **options)
    assert gradient.sum(1).abs().max() < 2e-5
    shifted, _ = both(kd_loss, student + 8, teacher, target, **options)
    torch.testing.assert_close(shifted, value, rtol=1e-5, atol=1e-5)
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            again, again_gradient = both(kd_loss, student, teacher, target, **options)
            assert torch.equal(again, value)
            assert torch.equal(again_gradient, gradient)
    finally:
        torch.set_num_threads(1)


def test_gradients_written_past_the_caches(isa: str) -> None:
    # From 8 MiB on; odd rows begin at every offset of a vector.
    student = normal(2, 1050001).float()
    teacher = topk(normal(2, 1050001, 1).float(), 33)
    target = torch.tensor([1050000, 3])
    for tail in TAILS:
        compare(torch.float32, student, teacher, target, tail=tail, temperature=2.0)


@pytest.mark.parametrize("k", [3, 33])
def test_streamed_lines_are_those_of_a_small_batch(isa: str, k: int) -> None:
    # Above 8 MiB lines are streamed, corrected first where they hold a class that differs; with
    # many such lines in a chunk (k = 33) the chunk is finished before it is streamed.
    student, half = normal(1100, 2101).float(), 550
    teacher = topk(normal(1100, 2101, 1).float(), k)
    first = teacher.indices[:, 0].long()  # a label among the k
    target = MixedTarget(first, (first + 7) % 2101, torch.linspace(0, 1, 1100))
    for tail in TAILS:
        options: dict[str, Any] = {"tail": tail, "temperature": 2.0, "reduction": "sum"}
        _, whole = both(kd_loss, student, teacher, target, **options)
        for rows in (slice(None, half), slice(half, None)):
            record = TopK(teacher.indices[rows], teacher.log_probs[rows], teacher.log_tail[rows])
            part = MixedTarget(target.a[rows], target.b[rows], target.lam[rows])
            _, gradient = both(kd_loss, student[rows], record, part, **options)
            assert torch.equal(whole[rows], gradient)


@pytest.mark.parametrize("tail", TAILS)
def test_indices_outside(isa: str, tail: str) -> None:
    student = normal(4, 20).float()
    for wrong in (-1, 20, 2**31 - 1, -(2**31)):
        teacher = topk(student, 3)
        teacher.indices[2, 1] = wrong
        with pytest.raises(ValueError, match=rf"indices in 0 to 19, got {wrong} in row 2"):
            kd_loss(student, teacher, tail=tail)
        mixture = MixedTopK(topk(student, 2), teacher, torch.ones(4))
        if tail in ("uniform", "renorm"):
            with pytest.raises(ValueError, match=rf"got {wrong} in row 2"):
                kd_loss(student, mixture, tail=tail)
        loss, gradient, _ = torch.ops.fastscarce.kd_loss_topk(
            student,
            *(teacher.indices, teacher.log_probs, teacher.log_tail),
            *(None,) * 9,
            TAILS.index(tail),
            *(1.0, 1.0, 0.0, 0.0, 0.0, -100, 0, True),
        )
        assert loss.isnan().nonzero().tolist() == [[2]]
        assert not gradient[2].any()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_module_autocast_opcheck_compile() -> None:
    student, teacher = normal(6, 33).float(), topk(normal(6, 33, 1).float(), 5)
    module = KDLoss(tail="renorm", temperature=2.0, alpha=1.0)
    assert module(student, teacher) == kd_loss(student, teacher, tail="renorm", temperature=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(student.bfloat16(), teacher).dtype == torch.float32
    tensors = (teacher.indices, teacher.log_probs, teacher.log_tail)
    numbers = (0, 2.0, 0.5, 0.5, 0.0, 0.0, -100, 2, True)
    arguments = (*tensors, *(None,) * 4, torch.arange(6), *(None,) * 4, *numbers)
    leaf = student.clone().requires_grad_()
    torch.library.opcheck(torch.ops.fastscarce.kd_loss_topk.default, (leaf, *arguments))

    def loss_of(x: Tensor) -> Tensor:
        return kd_loss(2 * x, teacher, torch.arange(6), temperature=2.0)

    compiled = torch.compile(loss_of, fullgraph=True)
    torch.testing.assert_close(both(compiled, student), both(loss_of, student))


def test_refusals() -> None:
    student = torch.zeros(4, 10)
    teacher = topk(student, 3)
    with pytest.raises(ValueError, match="loss 'kl' with a TopK teacher, got 'jsd'"):
        kd_loss(student, teacher, loss="jsd")
    with pytest.raises(ValueError, match="tail 'uniform', 'renorm', 'tail' or 'support', got 'x'"):
        kd_loss(student, teacher, tail="x")
    mixture = MixedTopK(teacher, teacher, torch.ones(4))
    with pytest.raises(ValueError, match="'uniform' or 'renorm' with a MixedTopK, got 'tail'"):
        kd_loss(student, mixture, tail="tail")
    with pytest.raises(ValueError, match="TopK of 3 rows and at most 10"):
        kd_loss(student[:3], teacher)
    with pytest.raises(ValueError, match=r"at most 2 classes, .* k = 3"):
        kd_loss(student[:, :2], teacher)
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        kd_loss(student, teacher.to("meta"))
    with pytest.raises(ValueError, match="two TopK of as many rows"):
        MixedTopK(teacher, topk(student[:3], 3), torch.ones(4))
    with pytest.raises((RuntimeError, ValueError), match=r"int32 indices \(rows, k\)"):
        torch.ops.fastscarce.kd_loss_topk(
            student,
            *(teacher.indices.long(), teacher.log_probs, teacher.log_tail),
            *(None,) * 9,
            *(0, 1.0, 1.0, 0.0, 0.0, 0.0, -100, 0, True),
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("classes", [1, 10, 1000, 21841])
def test_cuda(classes: int, tail: str) -> None:
    student, target = normal(37, classes), labels(37, classes, "mixed")
    teachers: list[Any] = [topk(normal(37, classes, 1), min(16, classes))]
    if tail in ("uniform", "renorm"):
        teachers.append(two(37, classes, min(16, classes)))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for teacher in teachers:
            s = student.to(dtype)
            options: Any = {"tail": tail, "temperature": 2.0, "threshold": 0.05}
            leaf = s.cuda().requires_grad_()
            value = kd_loss(leaf, teacher.to("cuda"), target.to("cuda"), **options)
            value.backward()
            expected, expected_gradient = both(kd_loss, s, teacher, target, **options)
            torch.testing.assert_close(value.detach().cpu(), expected, rtol=1e-5, atol=1e-6)
            assert leaf.grad is not None
            torch.testing.assert_close(
                0.5 * leaf.grad.cpu(), expected_gradient, rtol=1e-2, atol=1e-6
            )
