"""What the CUDA kernels load, emulated: a row once, where it is kept; results as in cases.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import (
    DKD,
    JSD,
    KL,
    LOGIT_STANDARD,
    NONE,
    REVERSE_KL,
    SKEW_KL,
    agree,
    clusters,
    cpu,
    emulated,
    kd,
    labels,
    logits,
    made_of,
    numbers,
    placed,
    same,
    topk_teacher,
)


@contextmanager
def reads(bytes_once: int, times: int, beside: int = 0) -> Iterator[None]:
    """What sweeps over rows load: those bytes so many times, and `beside` at most."""
    before = emulated.loaded()
    yield
    loaded = emulated.loaded() - before
    assert times * bytes_once <= loaded <= times * bytes_once + beside


# Sweeps of a row that is not kept: maxima, sums and gradient; sums of two rows; two deviations.
SWEEPS = {KL: 3, REVERSE_KL: 4, JSD: 4, SKEW_KL: 4, DKD: 3, LOGIT_STANDARD: 5}


@pytest.mark.parametrize("has_clusters", [True, False])
@pytest.mark.parametrize("divergence", SWEEPS)
def test_a_row_is_read_once(divergence: int, has_clusters: bool) -> None:
    # Registers of four threads and of a warp; shared memory of a block; of a cluster, without which
    # the row is read again.
    sizes = [(torch.float32, 7501)]
    if has_clusters:
        sizes += [(torch.bfloat16, 9), (torch.float16, 205), (torch.float32, 1101)]
    for dtype, classes in sizes:
        student, teacher = logits(2, classes, dtype)
        orders = 2 if dtype == torch.float32 else 1
        times = 1 if has_clusters else SWEEPS[divergence]
        once = 2 * student.numel() * student.element_size()
        with clusters(has_clusters), reads(once, orders * times):
            kd(student, teacher, **labels("mixed", 2, classes), divergence=divergence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_read_16_bytes_at_a_time(dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    rows, classes = 3, 1001
    student, teacher = logits(rows, classes, dtype)
    target = labels("dense", rows, classes)["target"].to(label_dtype)
    orders = 2 if dtype == torch.float32 else 1
    n = 16 // student.element_size()
    chunks = classes // n + 2
    # Labels are read for the sums and for the gradient; the first and the last chunk by elements.
    loads_a_chunk = 2 + 2 * max(1, n * target.element_size() // 16)
    most = rows * (chunks * loads_a_chunk + 2 * n * 4)
    before = emulated.loads()
    kd(student, teacher, target=placed(target))
    assert orders * rows * (chunks - 3) * loads_a_chunk <= emulated.loads() - before
    assert emulated.loads() - before <= orders * most


def test_a_row_of_float64_that_is_split() -> None:
    for divergence in (JSD, DKD):
        kd(*logits(1, 3801, torch.float64), **labels("index", 1, 3801), divergence=divergence)


@pytest.mark.parametrize("has_clusters", [True, False])
def test_a_row_alone_is_read_once(has_clusters: bool) -> None:
    for dtype, classes in ((torch.float32, 14501), (torch.float16, 205)):
        values = logits(2, classes, dtype)[0]
        values[0, :40] = values.max()  # more than are wanted
        once = values.numel() * values.element_size()
        for name, arguments, sweeps in (
            ("confidence", (0.4, 2.0), 2),
            # A round a byte, two for the index among equals (in one of the two rows), one collects.
            ("topk", (17,), 6),
        ):
            times = 1 if has_clusters or classes < 14000 else sweeps
            with clusters(has_clusters), reads(once, times):
                got = getattr(emulated, name)(values, *arguments)
            for a, b in zip(got, getattr(cpu, name)(values, *arguments), strict=True):
                same(1 * a, 1 * b, dtype, 1.0)


def test_topk_of_many_equals() -> None:
    values = torch.zeros(1, 70001, dtype=torch.bfloat16)
    values[0, 69000] = 1.0
    for a, b in zip(emulated.topk(values, 5), cpu.topk(values, 5), strict=True):
        same(a, b, torch.bfloat16)


@pytest.mark.parametrize("has_clusters", [True, False])
@pytest.mark.parametrize("policy", range(4))
def test_a_row_with_a_topk_teacher_is_read_once(policy: int, has_clusters: bool) -> None:
    rows, classes, k = 2, 14501, 40
    student = logits(rows, classes, torch.float32)[0]
    record = topk_teacher(rows, classes, k, torch.float32)
    record[0][1, 3] = classes  # outside: no loss, no gradient, and nothing is read there
    target = labels("mixed", rows, classes).values()
    # Two orders; the row that has a loss is swept three times where it is not kept.
    once = 2 * student.numel() * student.element_size()
    times = 1 if has_clusters else 2
    with clusters(has_clusters), reads(once, times, once // 10):
        agree(
            "kd_loss_topk",
            *(student, *record, None, None, None, None),
            *(*target, None, None, policy, *numbers(reduction=NONE)),
        )


def test_statistics_read_a_row_once() -> None:
    # A warp, a block, a cluster.
    for rows, classes in ((2, 101), (2, 1201), (1, 9001)):
        student, teacher = logits(rows, classes, torch.bfloat16)
        arguments = (placed(student, 1, 1), teacher, *(None,) * 7, 0, 2.0)
        with reads(2 * 2 * student.numel(), 1):
            got = emulated.kd_statistics(*arguments)
        made_of(got, cpu.kd_statistics(*arguments))


@pytest.mark.parametrize("has_clusters", [True, False])
def test_dist_reads_a_row_three_times(has_clusters: bool) -> None:
    for student_dtype, classes in ((torch.float32, 7501), (torch.bfloat16, 205)):
        student, teacher = logits(4, classes, student_dtype)
        arguments = (student, teacher, 2.0, 1.0, 2.0, True)
        want = cpu.dist_loss(*arguments)
        once = 2 * student.numel() * student.element_size()
        kept = has_clusters or classes < 7000
        # The columns' kernel reads three rows more to know what is typical, in each of 8 lanes.
        with clusters(has_clusters), reads(once, 3 if kept else 6, once * 6):
            got = emulated.dist_loss(*arguments)
        for a, b in zip(got, want, strict=True):
            same(a, b, student_dtype, 20.0)
