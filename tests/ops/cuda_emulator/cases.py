"""The CUDA kernels, emulated, against the CPU's: run by ../test_cuda_emulated.py, in a process of
its own under AddressSanitizer. Shapes are few and hit every path of the kernels once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastscarce import _ops  # noqa: F401  loads the CPU's kernels

torch.ops.load_library(os.environ["FASTSCARCE_EMULATED"])
emulated = torch.ops.fastscarce_emulated
cpu = torch.ops.fastscarce

NONE, SUM, MEAN = 0, 1, 2
KL, REVERSE_KL, JSD, SKEW_KL, DKD, LOGIT_STANDARD = range(6)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CLASSES = [1, 2, 3, 7, 31, 33, 100, 365, 1000, 1001, 1023, 4097, 21841]
INF = float("inf")


def placed(values: Tensor, gap: int = 0, shift: int = 0) -> Tensor:
    """The same matrix, `gap` elements between its rows and its base `shift` elements off; its last
    element is the last of its memory, so that AddressSanitizer sees a read past it."""
    rows, columns = values.shape
    memory = torch.full(
        (shift + max(rows * (columns + gap) - gap, 0),), float("nan"), dtype=values.dtype
    )
    view = memory.as_strided((rows, columns), (columns + gap, 1), shift)
    return view.copy_(values)


def logits(rows: int, classes: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * classes + rows + seed)
    both = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64) * 3
    return placed(both[0].to(dtype)), placed(both[1].to(dtype))


def labels(form: str, rows: int, classes: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows + classes)
    index = torch.randint(classes, (rows,), generator=generator)
    if form == "none":
        return {}
    if form == "dense":
        dense = torch.rand(rows, classes, generator=generator)
        return {"target": placed(dense / dense.sum(1, keepdim=True))}
    if form == "ignored":
        index[::2] = -100
    if form == "mixed":
        partner = torch.randint(classes, (rows,), generator=generator)
        partner[-1] = -100
        return {
            "target": index,
            "partner": partner,
            "share": torch.rand(rows, generator=generator),
        }
    return {"target": index}


def numbers(**changed: Any) -> tuple[Any, ...]:
    values = {
        "temperature": 4.0,
        "distillation": 0.7,
        "label": 0.3,
        "label_smoothing": 0.0,
        "threshold": 0.0,
        "ignore_index": -100,
        "reduction": MEAN,
        "with_gradient": True,
        **changed,
    }
    return tuple(values.values())


def same(got: Tensor, want: Tensor, dtype: torch.dtype, scale: float = 0.0) -> None:
    """Equal but for rounding: of the accumulation, relative to the largest value (to `scale`), and
    of a 16-bit result."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    a, b = got.double(), want.double()
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.isinf(), b.isinf())
    finite = b.isfinite()
    a, b = a[finite], b[finite]
    if b.numel() == 0:
        return
    accumulated = 1e-13 if dtype == torch.float64 else 2e-6
    last = torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
    bound = accumulated * max(float(b.abs().max()), scale) + 1.01 * last * b.abs()
    assert bool(((a - b).abs() <= bound).all()), float(((a - b).abs() - bound).max())


def agree(name: str, *arguments: Any, scale: float = 1.0) -> tuple[Tensor, ...]:
    """What the emulated kernel returns, after comparison; of float32 in both orders."""
    want = getattr(cpu, name)(*arguments)
    student = arguments[0]
    first: tuple[Tensor, ...] | None = None
    for order in (0, 1) if student.dtype == torch.float32 else (1,):
        emulated.set_order(order)
        got: tuple[Tensor, ...] = getattr(emulated, name)(*arguments)
        for a, b in zip(got, want, strict=True):
            same(a, b, student.dtype, scale)
        if first is not None:
            for a, b in zip(got, first, strict=True):
                assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), "the order of threads shows"
        first = got
    assert first is not None
    return first


def kd(
    student: Tensor,
    teacher: Tensor | None,
    *,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    target: Tensor | None = None,
    partner: Tensor | None = None,
    share: Tensor | None = None,
    divergence: int = KL,
    first: float = 0.5,
    second: float = 2.0,
    scale: float = 1.0,
    **changed: Any,
) -> tuple[Tensor, ...]:
    # A gradient's terms have the size of T / rows, or of T * rows where 16 bits want no 1 / rows.
    return agree(
        "kd_loss",
        *(student, teacher, target, partner, share, weight, class_weight),
        *(divergence, first, second, *numbers(**changed)),
        scale=scale,
    )


def reverse_kl_scale(student: Tensor, teacher: Tensor) -> float:
    """What `same` is to allow for the gradient T q (log(q / p) - K) of reverse KL, at any T.

    Each logarithm is as large as the spread of its row's logits over T, each of the six roundings
    on the way to the difference is at most half an eps of that, and nothing damps it where q is
    not small. 2e-6 of a quarter of the spread are four eps of it. JSD and skew KL divide by m,
    which is no smaller than a share of q, and DKD subtracts probabilities: they have no such loss.
    """
    spread = 0.0
    for logits in (student, teacher):
        for row in logits:
            finite = row[row.isfinite()]
            if finite.numel():
                spread = max(spread, float(finite.max() - finite.min()))
    return max(1.0, spread / 4)


@contextmanager
def clusters(has: bool) -> Iterator[None]:
    emulated.set_clusters(has)
    try:
        yield
    finally:
        emulated.set_clusters(True)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl(dtype: torch.dtype, classes: int) -> None:
    rows = 5 if classes < 4000 else 2
    form = ("index", "ignored", "mixed", "dense")[CLASSES.index(classes) % 4]
    temperature = (1.0, 4.0, 2.5, 3.0, 7.0)[CLASSES.index(classes) % 5]
    kd(
        *logits(rows, classes, dtype),
        **labels(form, rows, classes),
        temperature=temperature,
        label_smoothing=0.1 if classes % 2 else 0.0,
    )


@pytest.mark.parametrize("has_clusters", [True, False])
@pytest.mark.parametrize(
    ("dtype", "classes"),
    # A block; a cluster of 2, of 8; a row that 8 blocks don't hold.
    [(torch.float32, 5003), (torch.float32, 9001), (torch.float32, 70001), (torch.bfloat16, 21843),
     (torch.float64, 120001)],
    ids=str,
)  # fmt: skip
def test_a_row_that_is_split(dtype: torch.dtype, classes: int, has_clusters: bool) -> None:
    with clusters(has_clusters):
        kd(*logits(2, classes, dtype), **labels("mixed", 2, classes), label_smoothing=0.1)


@pytest.mark.parametrize("form", ["none", "index", "mixed", "dense"])
@pytest.mark.parametrize("classes", [10, 1001, 5000])
def test_forms(classes: int, form: str) -> None:
    for reduction in (NONE, SUM, MEAN):
        student, teacher = logits(3, classes, torch.float32)
        kd(student, teacher, **labels(form, 3, classes), reduction=reduction)
    if form != "none":
        kd(student, None, **labels(form, 3, classes))
    kd(student, teacher, **labels(form, 3, classes), with_gradient=False)


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("gap", [0, 5, 8])
@pytest.mark.parametrize("classes", [13, 1000, 5001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_bases(dtype: torch.dtype, classes: int, gap: int, shift: int) -> None:
    student, teacher = logits(3, classes, dtype)
    index = labels("index", 3, classes)
    kd(placed(student, gap, shift), placed(teacher, gap, shift), **index)
    if gap == 5:
        kd(placed(student, 0, shift), placed(teacher, gap, 2), **index)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_teacher_of_another_dtype(dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    for classes in (9, 300, 4200):
        student, teacher = logits(2, classes, dtype)
        kd(student, teacher.to(teacher_dtype), **labels("index", 2, classes))


@pytest.mark.parametrize(
    ("divergence", "classes"),
    [*((d, c) for d in (KL, DKD) for c in (7, 600, 4500)),
     *((d, c) for d in (REVERSE_KL, JSD, SKEW_KL, LOGIT_STANDARD) for c in (7, 300))],
)  # fmt: skip
def test_rows_of_every_kind(divergence: int, classes: int) -> None:
    student, teacher = logits(12, classes, torch.float32)
    student[1] = -INF
    teacher[2] = -INF
    student[3, 1:], teacher[3, 1:] = -INF, -INF
    student[4, ::2], teacher[4, ::2] = -INF, -INF
    student[5, 1] = float("nan")
    teacher[6, 0] = -INF
    if divergence != REVERSE_KL:  # its gradient loses the digits of so large differences
        student[7], teacher[7] = student[7] * 1e4, teacher[7] * 1e4
    student[8, 2], teacher[8, 2] = -INF, 50.0
    target = labels("index", 12, classes)["target"]
    target[:2], target[3], target[4] = 0, 0, 1
    target[9], target[10] = classes, -1
    weight = torch.rand(12)
    weight[11] = 0
    class_weight = torch.rand(classes)
    class_weight[int(target[0])] = 0
    scale = reverse_kl_scale(student, teacher) if divergence == REVERSE_KL else 1.0
    for temperature in (1.0, 0.05, 6.0):
        kd(
            student, teacher, target=target, weight=weight, class_weight=class_weight,
            divergence=divergence, reduction=NONE, temperature=temperature, threshold=0.3,
            scale=scale,
        )  # fmt: skip
    dry = [0, 4, 6, 7]
    kd(
        student[dry], teacher[dry], target=target[dry], weight=weight[dry],
        class_weight=class_weight, divergence=divergence, threshold=0.5, scale=scale,
    )  # fmt: skip
    kd(student, teacher, target=target, divergence=divergence, reduction=SUM, scale=scale)


@pytest.mark.parametrize("classes", [10, 1500])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0, 9.0, 0.5])
def test_temperatures(classes: int, temperature: float) -> None:
    kd(
        *logits(3, classes, torch.float32),
        **labels("mixed", 3, classes),
        temperature=temperature,
    )


@pytest.mark.parametrize("rows", [0, 1, 64, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_rows(rows: int, dtype: torch.dtype) -> None:
    student, teacher = logits(rows, 3, dtype)
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(1))
    kd(student, teacher, **labels("ignored", rows, 3), weight=weight)
    kd(student, teacher, reduction=SUM)
    kd(student, teacher, **labels("none", rows, 3))


def test_nothing_is_labelled() -> None:
    student, teacher = logits(4, 50, torch.bfloat16)
    target = torch.full((4,), -100)
    kd(student, teacher, target=target)
    kd(student, None, target=target)
    kd(student, teacher, target=target, weight=torch.zeros(4))


@pytest.mark.parametrize("classes", [7, 1001, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", [REVERSE_KL, JSD, SKEW_KL, DKD, LOGIT_STANDARD])
def test_divergences(divergence: int, dtype: torch.dtype, classes: int) -> None:
    for form in ("index", "mixed", "dense")[: 2 if divergence == DKD else 3]:
        kd(
            *logits(2, classes, dtype),
            **labels(form, 2, classes),
            divergence=divergence,
            label_smoothing=0.1 if form == "index" else 0.0,
        )


@pytest.mark.parametrize("divergence", [REVERSE_KL, JSD, SKEW_KL, DKD, LOGIT_STANDARD])
def test_divergences_of_float64_and_strides(divergence: int) -> None:
    student, teacher = logits(3, 333, torch.float64)
    index = labels("index", 3, 333)
    kd(student, teacher, **index, divergence=divergence, reduction=NONE, threshold=0.2)
    kd(placed(student, 3, 1), placed(teacher, 1, 0), divergence=divergence, **index)
    kd(student, teacher.to(torch.float16), **index, divergence=divergence)
    kd(student.bfloat16(), teacher.float(), **index, divergence=divergence)


def topk_teacher(rows: int, classes: int, k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    record: tuple[Tensor, ...] = cpu.topk(logits(rows, classes, torch.float32, seed=k)[1], k)
    return record[0], record[1].to(dtype), record[2].to(dtype)


@pytest.mark.parametrize("policy", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_teachers(dtype: torch.dtype, policy: int) -> None:
    for rows, classes, k in ((2, 7, 7), (2, 365, 5), (1, 1101, 300)):
        student = logits(rows, classes, dtype)[0]
        record = topk_teacher(rows, classes, k, torch.float16 if k == 5 else torch.float32)
        for form in ("dense", "mixed") if k == 5 else ("none",):
            target = labels(form, rows, classes)
            names = ("target", "partner", "share")
            agree(
                "kd_loss_topk",
                *(student, *record, None, None, None, None),
                *(target.get(name) for name in names),
                *(None, None, policy, *numbers(threshold=0.2, label_smoothing=0.1)),
            )
        if policy < 2:
            agree(
                "kd_loss_topk",
                *(student, *record, *topk_teacher(rows, classes, k + (k == 5), torch.float32)),
                *(torch.rand(rows), None, None, None, None, None, policy, *numbers(reduction=SUM)),
            )


def test_topk_teachers_of_strange_rows() -> None:
    student = logits(5, 100, torch.float32)[0]
    indices, log_probs, log_tail = topk_teacher(5, 100, 4, torch.float32)
    indices[0, 1] = 100
    indices[1, 0] = -1
    log_probs[2], log_tail[2] = -INF, -INF
    student[3, 50:] = -INF
    for policy in range(4):
        agree(
            "kd_loss_topk",
            *(student, indices, log_probs, log_tail, None, None, None, None),
            *(torch.arange(5), None, None, torch.rand(5), None, policy, *numbers(reduction=NONE)),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_in_given_memory(dtype: torch.dtype) -> None:
    for classes in (11, 1001, 4100):
        student, teacher = logits(2, classes, dtype)
        _, gradient, _ = kd(student, teacher)
        into = placed(torch.zeros_like(student), 0, 1)
        none = (None,) * 5
        options = (*none, KL, 0.5, 2.0, *numbers())
        emulated.kd_loss_out(student, teacher, *options, into, *none)
        assert torch.equal(into, gradient)
        emulated.kd_loss_out(student, teacher, *options, teacher, *none)
        assert torch.equal(teacher, gradient), "written over the teacher"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 3, 1001])
def test_scaling(dtype: torch.dtype, classes: int) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for shift in (0, 1):
        gradient = placed(logits(7, classes, dtype)[0], 0, shift)
        factor = torch.tensor(0.25, dtype=wide)
        for upstream in (torch.tensor(3.0, dtype=wide), torch.rand(7, dtype=wide)):
            want = cpu.kd_loss_backward(gradient, factor, upstream)
            assert torch.equal(emulated.kd_loss_backward(gradient, factor, upstream), want)
            scaled = placed(gradient, 0, shift)
            emulated.kd_loss_backward_(scaled, factor, upstream)
            assert torch.equal(scaled, want)
        kept = placed(gradient, 0, shift)
        emulated.kd_loss_backward_(kept, factor, torch.tensor(4.0, dtype=wide))
        assert torch.equal(kept, gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dist(dtype: torch.dtype) -> None:
    for rows, classes in ((1, 5), (5, 1), (40, 33), (3, 701)):
        student, teacher = logits(rows, classes, dtype)
        student[:, 0] = -INF if classes > 1 else 0
        for temperature, inter, intra in ((1.0, 1.0, 1.0), (4.0, 2.0, 0.0))[: 1 + (rows == 3)]:
            arguments = (placed(student, 3), teacher, temperature, inter, intra, True)
            want = cpu.dist_loss(*arguments)
            got = emulated.dist_loss(*arguments)
            for a, b in zip(got, want, strict=True):
                # Correlations lose digits where a column hardly changes.
                same(a, b, dtype, 20.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "classes", "k"), [(3, 1, 1), (4, 7, 3), (2, 1001, 17), (1, 4097, 2048)]
)
def test_topk(rows: int, classes: int, k: int, dtype: torch.dtype) -> None:
    values = logits(rows, classes, dtype)[0]
    values[0, ::2] = 1.0  # ties
    values[-1, classes // 2 :] = -INF
    for shift in (0, 1):
        matrix = placed(values, 5 * shift, shift)
        for a, b in zip(emulated.topk(matrix, k), cpu.topk(matrix, k), strict=True):
            same(a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("classes", "k"), [(1, 1), (10, 10), (33, 5), (256, 256), (70000, 3)])
def test_pack_topk(classes: int, k: int, dtype: torch.dtype) -> None:
    """Rows as bytes: those that the CPU's kernel makes of the same log-probabilities."""
    values = logits(4, classes, dtype)[0]
    values[1, ::2] = 1.0  # ties
    values[2, classes // 2 :] = -INF
    values[3, 0] = float("nan")
    tags = torch.tensor([0, 1, 2**31, 2**32 - 1])
    for codes, tag, shift in ((False, None, 0), (True, tags, 1)):
        matrix = placed(values, 5 * shift, shift)
        want, got = (of.pack_topk(matrix, k, codes, tag) for of in (cpu, emulated))
        assert got.shape == want.shape
        dense = k == classes
        named = 0 if dense else (4 if classes > 65536 else 2) * k
        assert torch.equal(got[:, :named], want[:, :named])
        # The last bits of a sum depend on its order: a float16 or a code may round the other way.
        assert float((got != want).float().mean()) < 0.02
        read = [of.unpack_topk(want, classes, k, codes, tag is not None) for of in (cpu, emulated)]
        for a, b in zip(*read, strict=True):
            assert torch.equal(a.nan_to_num(1.0), b.nan_to_num(1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 31, 1000, 1001, 4097])
def test_confidence(classes: int, dtype: torch.dtype) -> None:
    values = logits(5, classes, dtype)[0]
    values[1] = -INF
    values[2, -1] = float("nan")
    for shift in (0, 3):
        matrix = placed(values, shift, shift)
        want = cpu.confidence(matrix, 0.4, 2.0)
        for a, b in zip(emulated.confidence(matrix, 0.4, 2.0), want, strict=True):
            same(1 * a, 1 * b, dtype, 1.0)


def made_of(statistics: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    labels_and_agreement = (0, 1, 4)
    for i, (a, b) in enumerate(zip(statistics, want, strict=True)):
        if i in labels_and_agreement:
            assert torch.equal(a, b)
        else:
            same(a, b, b.dtype, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 33, 1000, 1025, 4097])
def test_statistics(classes: int, dtype: torch.dtype) -> None:
    student, teacher = logits(7, classes, dtype)
    student[1], teacher[2] = -INF, -INF
    student[3, -1], teacher[4, 0] = float("nan"), INF
    student[5], teacher[5] = 1.0, 1.0  # ties
    nothing = (None,) * 7
    for temperature in (1.0, 0.5, 4.0):
        for of in (teacher, teacher.float(), None):
            arguments = (placed(student, 3, 1), of, *nothing, 0, temperature)
            made_of(emulated.kd_statistics(*arguments), cpu.kd_statistics(*arguments))


@pytest.mark.parametrize("policy", range(4))
def test_statistics_of_records(policy: int) -> None:
    for classes, k in ((7, 7), (365, 5), (3001, 300)):
        student = logits(4, classes, torch.float32)[0]
        indices, log_probs, log_tail = topk_teacher(4, classes, k, torch.float32)
        indices[1, 0] = classes  # outside: no answer
        log_probs[2], log_tail[2] = -INF, -INF
        for second in ((None,) * 4, (*topk_teacher(4, classes, 3, torch.float32), torch.rand(4))):
            if second[0] is not None and policy > 1:
                continue
            arguments = (student, None, indices, log_probs, log_tail, *second, policy, 2.0)
            made_of(emulated.kd_statistics(*arguments), cpu.kd_statistics(*arguments))


def test_statistics_beside_the_loss() -> None:
    student, teacher = logits(5, 1001, torch.float32)
    want = cpu.kd_statistics(student, teacher, *(None,) * 7, 0, 4.0)
    loss, gradient, _ = cpu.kd_loss(student, teacher, *(None,) * 5, KL, 0.5, 2.0, *numbers())
    found = tuple(torch.empty_like(x) for x in want)
    # The gradient goes over the teacher, so the statistics have to come first.
    made, _, _ = emulated.kd_loss_out(
        student, teacher, *(None,) * 5, KL, 0.5, 2.0, *numbers(), teacher, *found
    )
    made_of(found, want)
    same(made, loss, torch.float32)
    same(teacher, gradient, torch.float32, 1.0)


REFUSED: list[Callable[[], object]] = [
    lambda: emulated.topk(torch.randn(2, 5000), 3000),
    lambda: emulated.confidence(torch.randn(2, 6).T, 0.5, 1.0),
    lambda: emulated.kd_loss_backward(torch.randn(2, 3), torch.tensor(1.0), torch.randn(5)),
]


@pytest.mark.parametrize("call", REFUSED)
def test_refused(call: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, ValueError), match="needs"):
        call()
