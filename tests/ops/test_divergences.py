"""The divergences beside KL: values and gradients against their twins in float64.

Class counts: part of a vector, whole vectors, a tail, and a row larger than a chunk of kd_loss.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastscarce.ops import MixedTarget, kd_loss, reference

LOSSES = ["reverse_kl", "jsd", "skew_kl", "dkd", "logit_standard"]
FORMS = ["index", "mixed", "dense", "none"]


def example(rows: int, classes: int, form: str = "index", spread: float = 2.0) -> Any:
    generator = torch.Generator().manual_seed(rows * 1009 + classes)

    def normal() -> Tensor:
        logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        return (spread * logits).bfloat16().double()  # exact in every dtype but float16's tails

    def index() -> Tensor:
        values = torch.randint(classes, (rows,), generator=generator)
        values[::4] = -100
        return values

    target: Any = index()
    if form == "mixed":
        lam = torch.rand(rows, generator=generator)
        lam[1::5] = 1
        target = MixedTarget(index(), index().roll(1), lam)
    elif form == "dense":
        target = normal().softmax(1)
    elif form == "none":
        target = None
    return normal(), normal(), target


def applies(loss: str, form: str) -> bool:
    return loss != "dkd" or form in ("index", "mixed")


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def both(function: Any, student: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = function(leaf, *arguments, **options)
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()]
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.reshape(loss.shape))
    return loss.detach(), gradient


def compare(dtype: torch.dtype, tensors: Any, **options: Any) -> None:
    """Error against float64 <= that of the plain twin in float32, plus rounding."""
    arguments = [cast(x, dtype) for x in tensors]
    exact, exact_gradient = both(
        reference.kd_loss, *(cast(x, torch.float64) for x in arguments), **options
    )
    eager, eager_gradient = both(
        reference.kd_loss, *(cast(x, torch.float32) for x in arguments), **options
    )
    loss, gradient = both(kd_loss, *arguments, **options)
    wide = dtype == torch.float64
    assert gradient.dtype == dtype
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    rounding = 1e-14 if wide else 1e-6
    slack = 0.0 if wide else float((eager - exact).abs().max())
    assert float((loss - exact).abs().max()) <= slack + rounding * (1 + float(exact.abs().max()))
    slack = 0.0 if wide else 2 * float((eager_gradient - exact_gradient).abs().max())
    size = 4 * options.get("temperature", 1.0) * max(1.0, options.get("dkd_beta", 8.0) / 8)
    if loss.dim() == 0 and options.get("reduction") != "sum":
        size /= max(len(exact_gradient), 1)
    bound = slack + rounding * size + 1.01 * torch.finfo(dtype).eps * exact_gradient.abs()
    assert bool(((gradient - exact_gradient).abs() <= bound + torch.finfo(dtype).tiny).all())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [2, 3, 10, 16, 33, 100, 1001, 1025])
def test_values_and_gradients(isa: str, classes: int, form: str, loss: str) -> None:
    if not applies(loss, form):
        form = "mixed"
    for temperature in (1.0, 4.0):
        compare(
            torch.float32,
            example(11, classes, form),
            loss=loss,
            temperature=temperature,
            alpha=0.7,
            beta=0.3,
            label_smoothing=0.1 if temperature == 4.0 else 0.0,
        )


def labels_of_every_kind(rows: int, classes: int) -> MixedTarget:
    """Both, either or neither missing; both the same; a share of 0 and of 1; the last class."""
    row = torch.arange(rows)
    first, second = row % classes, (row * 7 + 1) % classes
    kind = row % 8
    second = torch.where(kind == 0, first, second)
    first = torch.where(kind == 1, classes - 1, first)
    first = torch.where((kind == 2) | (kind == 4), -100, first)
    second = torch.where((kind == 3) | (kind == 4), -100, second)
    lam = 0.125 + 0.75 * (row * 13 % 8) / 8
    lam = torch.where(kind == 5, 0.0, torch.where(kind == 6, 1.0, lam))
    return MixedTarget(first, second, lam)


# Up to 64 classes a row is a lane, and rows come in blocks of 8 or 16.
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [5, 8, 31, 64, 65])
def test_rows_and_labels(isa: str, classes: int, loss: str) -> None:
    for rows in (1, 7, 8, 9, 17, 83):
        student, teacher, target = example(rows, classes)
        mixed = labels_of_every_kind(rows, classes)
        weight = torch.linspace(0, 2, rows) if rows > 1 else None
        for label in (target, mixed, MixedTarget(mixed.a, mixed.a, mixed.lam)):
            compare(
                torch.float32,
                (student, teacher, label),
                loss=loss,
                temperature=2.5 if rows == 9 else 2.0,
                alpha=1.0 if rows == 8 else 0.6,
                weight=weight,
                reduction="none",
                label_smoothing=0.1 if rows == 17 else 0.0,
            )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [5, 64, 65])
def test_rows_next_to_odd_ones(isa: str, classes: int, loss: str) -> None:
    """What is infinite, NaN, masked or left out stays in its row."""
    student, teacher, _ = (cast(x, torch.float32) for x in example(37, classes))
    target = torch.arange(37) % classes
    options: Any = {"loss": loss, "temperature": 2.0, "alpha": 0.6, "reduction": "none"}
    expected, expected_gradient = both(kd_loss, student, teacher, target, **options)
    student[2] = -math.inf
    teacher[5] = -math.inf
    student[9, 1] = math.nan
    teacher[12, classes - 1] = math.nan
    student[17, 2] = -math.inf
    teacher[18, 3] = -math.inf
    student[21, 0] = math.inf
    weight = torch.ones(37)
    weight[24] = 0
    others = torch.ones(37, dtype=torch.bool)
    others[[2, 5, 9, 12, 17, 18, 21, 24]] = False
    value, gradient = both(kd_loss, student, teacher, target, weight=weight, **options)
    assert torch.equal(value[others], expected[others])
    assert torch.equal(gradient[others], expected_gradient[others])
    assert value[2] == math.inf
    assert value[[9, 12, 21]].isnan().all()
    assert gradient[[2, 5, 17, 18, 24]].isfinite().all()
    assert value[5].isfinite()
    assert value[24] == 0
    assert not gradient[24].any()
    if loss != "logit_standard":
        # The teacher leaves the row alone: only the label term is left.
        label_only, label_gradient = both(kd_loss, student, None, target, reduction="none")
        torch.testing.assert_close(value[5], 0.4 * label_only[5])
        torch.testing.assert_close(gradient[5], 0.4 * label_gradient[5])
    for rows in (slice(0, 1), slice(9, 16), slice(2, 37)):
        part, part_gradient = both(
            kd_loss, student[rows], teacher[rows], target[rows], weight=weight[rows], **options
        )
        torch.testing.assert_close(part, value[rows], equal_nan=True)
        # `both` gives every row another upstream.
        assert torch.equal(part_gradient.isnan(), gradient[rows].isnan())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masked", ["student", "teacher", "both", "either"])
def test_random_masks(isa: str, masked: str, loss: str) -> None:
    """Infinite, NaN and finite where the float64 body is, with every kind of label."""
    generator = torch.Generator().manual_seed(1)
    for classes in (2, 5, 33, 64, 65):
        student, teacher, _ = (cast(x, torch.float32) for x in example(100, classes))
        first, second = torch.rand(2, 100, classes, generator=generator) < 0.2
        if masked != "teacher":
            student[first] = -math.inf
        if masked in ("teacher", "both"):
            teacher[first] = -math.inf
        if masked == "either":
            teacher[second] = -math.inf
        label = labels_of_every_kind(100, classes)
        options: Any = {"loss": loss, "temperature": 2.0, "reduction": "none", "threshold": 0.1}
        exact = both(kd_loss, student.double(), teacher.double(), label, **options)
        got = both(kd_loss, student, teacher, label, **options)
        for value, expected in zip(got, exact, strict=True):
            assert torch.equal(value.isnan(), expected.isnan())
            assert torch.equal(value.isinf(), expected.isinf())
            finite = expected.isfinite()
            torch.testing.assert_close(
                value[finite].double(), expected[finite], rtol=1e-4, atol=2e-5
            )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(isa: str, dtype: torch.dtype, loss: str) -> None:
    for reduction in ("mean", "sum", "none"):
        for classes in (10, 131):
            tensors = example(9, classes)
            compare(dtype, tensors, loss=loss, temperature=2.0, reduction=reduction)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str) -> None:
    for form in FORMS:
        if not applies(loss, form):
            continue
        student, teacher, target = example(5, 7, form)

        def function(logits: Tensor, teacher: Tensor = teacher, target: Any = target) -> Tensor:
            return kd_loss(logits, teacher, target, loss=loss, temperature=2.0)

        assert torch.autograd.gradcheck(function, (student.requires_grad_(),))


@pytest.mark.parametrize("loss", ["kl", *LOSSES])
def test_recompute_and_second_derivative(loss: str) -> None:
    student, teacher, target = example(4, 6)
    options: Any = {"loss": loss, "temperature": 2.0, "label_smoothing": 0.1}
    for reduction in ("mean", "none"):
        expected = both(kd_loss, student, teacher, target, reduction=reduction, **options)
        got = both(
            kd_loss, student, teacher, target, reduction=reduction, gradient="recompute", **options
        )
        torch.testing.assert_close(got, expected)

    def function(logits: Tensor) -> Tensor:
        return kd_loss(logits, teacher, target, gradient="recompute", **options)

    leaf = student.requires_grad_()
    assert torch.autograd.gradgradcheck(function, (leaf,))


def test_jsd_tends_to_kl() -> None:
    student, teacher, _ = example(6, 20)
    jsd = kd_loss(student, teacher, loss="jsd", beta=1e-6) / 1e-6
    torch.testing.assert_close(jsd, kd_loss(student, teacher), rtol=1e-4, atol=1e-6)


def test_dkd_is_kl_with_the_teachers_own_weights() -> None:
    # KL = TCKD + (1 - p_label) NCKD: with one row, beta can say so.
    student, teacher, _ = example(1, 9)
    label = torch.tensor([4])
    rest = 1 - float(teacher.softmax(1)[0, 4])
    whole = kd_loss(student, teacher, label, loss="dkd", alpha=1.0, dkd_beta=rest)
    torch.testing.assert_close(whole, kd_loss(student, teacher))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [10, 100])
def test_masks(isa: str, classes: int, loss: str) -> None:
    student, teacher, _ = example(9, classes)
    student, teacher = student.float(), teacher.float()
    student[:, 3:7] = teacher[:, 3:7] = -math.inf
    target = torch.zeros(9, dtype=torch.int64)
    kept = [i for i in range(classes) if not 3 <= i < 7]
    options: Any = {"loss": loss, "temperature": 2.0, "alpha": 0.6}
    value, gradient = both(kd_loss, student, teacher, target, **options)
    exact, exact_gradient = both(
        reference.kd_loss, student[:, kept], teacher[:, kept], target, **options
    )
    torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[:, kept], exact_gradient, rtol=1e-4, atol=1e-6)
    assert not gradient[:, 3:7].any()
    # One side excludes what the other wants: the gradient stays finite all the same.
    student[0, 1] = teacher[1, 2] = -math.inf
    _, gradient = both(kd_loss, student, teacher, target, **options)
    assert gradient.isfinite().all()
    empty = torch.full((9, classes), -math.inf)
    _, gradient = both(kd_loss, empty, empty, target, **options)
    assert not gradient.isnan().any()


@pytest.mark.parametrize("loss", LOSSES)
def test_invariants(isa: str, loss: str) -> None:
    student, teacher, target = example(9, 50)
    s, t = ((x * 256).round().float() / 256 for x in (student, teacher))
    options: Any = {"loss": loss, "temperature": 3.0, "reduction": "sum"}
    value, gradient = both(kd_loss, s, t, target, **options)
    assert gradient.sum(1).abs().max() < 2e-4
    shifted, _ = both(kd_loss, s + 8, t - 8, target, **options)
    torch.testing.assert_close(value, shifted, rtol=1e-4, atol=1e-4)
    for _ in range(20):
        again, again_gradient = both(kd_loss, s, t, target, **options)
        assert torch.equal(again, value)
        assert torch.equal(again_gradient, gradient)
    # Shifted by 4096, which float32 holds exactly for these logits: no digit may get lost.
    for exact, far in zip(
        both(kd_loss, s, t, target, **options),
        both(kd_loss, s + 4096, t - 4096, target, **options),
        strict=True,
    ):
        torch.testing.assert_close(far, exact, rtol=1e-4, atol=1e-4)
    large, gradient = both(kd_loss, 1e4 * s, 1e4 * t, target, **options)
    assert gradient.isfinite().all()
    assert large.isfinite()
    s[4, 5] = math.nan
    bad = kd_loss(s, t, target, **{**options, "reduction": "none"})
    assert bad[4].isnan()
    assert bad.isnan().sum() == 1


@pytest.mark.parametrize("loss", ["kl", *LOSSES])
@pytest.mark.parametrize("classes", [10, 100])
def test_threshold(isa: str, classes: int, loss: str) -> None:
    tensors = example(20, classes)
    options: Any = {"loss": loss, "temperature": 2.0, "reduction": "none", "alpha": 0.5}
    p = tensors[1]
    if loss == "logit_standard":
        p = reference.standardised(p)
    middle = float((p / 2.0).softmax(1).amax(1).sort().values[9:11].mean())
    compare(torch.float32, tensors, threshold=middle, **options)
    all_rows = kd_loss(*tensors, **options)
    some = kd_loss(*tensors, threshold=middle, **options)
    assert 5 <= int((all_rows != some).sum()) <= 10
    nobody, gradient = both(
        kd_loss, *tensors[:2], torch.full((20,), -100), threshold=1.0, **options
    )
    assert not nobody.any()
    assert not gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_zero_rows_and_one_class(isa: str, loss: str) -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    value = kd_loss(empty, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), loss=loss)
    assert value == 0
    value.backward()
    one = torch.randn(4, 1, requires_grad=True)
    value = kd_loss(one, torch.randn(4, 1), torch.zeros(4, dtype=torch.int64), loss=loss)
    value.backward()
    assert abs(value.item()) < 1e-6
    assert one.grad is not None
    assert one.grad.abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", LOSSES)
def test_opcheck_and_compile(loss: str) -> None:
    student, teacher, target = example(5, 12)
    numbers = (reference_number(loss), 0.4, 2.0, 2.0, 0.5, 0.5, 0.1, 0.2, -100, 2, True)
    torch.library.opcheck(
        torch.ops.fastscarce.kd_loss.default,
        (student.float().requires_grad_(), teacher, target, *(None,) * 4, *numbers),
    )
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    options: Any = {"loss": loss, "temperature": 2.0}
    torch.testing.assert_close(
        both(compiled, student.float(), teacher, target, **options),
        both(kd_loss, student.float(), teacher, target, **options),
    )


def reference_number(loss: str) -> int:
    return 1 + LOSSES.index(loss)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": "jsd", "beta": 1.0}, "beta between 0 and 1, got 1.0"),
        ({"loss": "skew_kl", "skew": 1.0}, "skew in 0 to 1"),
        ({"loss": "dkd", "dkd_beta": -1.0}, "dkd_alpha and dkd_beta of 0 or more"),
        ({"loss": "dkd", "target": None}, "a target for loss 'dkd'"),
        ({"loss": "dkd", "target": torch.rand(4, 10)}, "indices or a MixedTarget"),
        ({"threshold": 1.5}, "threshold in 0 to 1, got 1.5"),
        ({"gradient": "later"}, "'auto', 'in_forward' or 'recompute', got 'later'"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    good = {
        "student": torch.randn(4, 10),
        "teacher": torch.randn(4, 10),
        "target": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=words) as raised:
        kd_loss(**(good | change))
    assert str(raised.value).startswith("kd_loss needs")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [1, 10, 1000, 1025, 21841])
def test_cuda(classes: int, loss: str) -> None:
    student, teacher, target = example(37, classes, "mixed")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        s, t = student.to(dtype), teacher.to(dtype)
        options: Any = {"loss": loss, "temperature": 2.0, "threshold": 0.05}
        leaf = s.cuda().requires_grad_()
        value = kd_loss(leaf, t.cuda(), target.to("cuda"), **options)
        value.backward()
        expected, expected_gradient = both(kd_loss, s, t, target, **options)
        torch.testing.assert_close(value.detach().cpu(), expected, rtol=1e-5, atol=1e-6)
        assert leaf.grad is not None
        torch.testing.assert_close(0.5 * leaf.grad.cpu(), expected_gradient, rtol=1e-2, atol=1e-6)
