"""What a training loop logs of a batch's rows, made in the pass that makes their loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastscarce import _ops  # noqa: F401  loads the kernels
from fastscarce.ops.autograd import TAILS
from fastscarce.ops.targets import MixedTopK, TopK

__all__ = ["RowStatistics", "empty_statistics", "row_statistics"]

_kd_statistics = torch.ops.fastscarce.kd_statistics.default


class RowStatistics(NamedTuple):
    """Of each row's logits, without a graph; every field has shape ``(rows,)``.

    Also of rows without a label, of weight 0, and below the threshold. A row of NaN or +inf, or
    without a finite logit, has no answer: label -100, NaN numbers. All but ``student_label`` is
    None without a teacher.

    A :class:`TopK` says what its ``tail`` makes of it: with ``"uniform"`` and ``"tail"`` the rest
    is spread evenly over the classes it does not name, with ``"renorm"`` and ``"support"`` the
    named ones have everything. Of a :class:`MixedTopK` the numbers are the means of both teachers'
    (not those of the mixture), weighted, and the label is the heavier one's, the first of equals.
    """

    student_label: Tensor
    """Most probable class of the student, int64, the lowest of equals."""
    teacher_label: Tensor | None
    """Most probable class of the teacher, int64, the lowest of equals."""
    confidence: Tensor | None
    """Its probability at ``T``, float32 (float64 for a float64 teacher)."""
    entropy: Tensor | None
    """Of the teacher's softmax at ``T``, in nats; as wide."""
    agreement: Tensor | None
    """Whether the two labels are the same, bool."""


def _dtype(teacher: Tensor | TopK | MixedTopK) -> torch.dtype:
    if isinstance(teacher, Tensor):
        parts = [teacher]
    elif isinstance(teacher, TopK):
        parts = [teacher.log_probs]
    else:
        parts = [teacher.a.log_probs, teacher.b.log_probs]
    return torch.float64 if any(x.dtype == torch.float64 for x in parts) else torch.float32


def empty_statistics(student: Tensor, teacher: Tensor | TopK | MixedTopK | None) -> RowStatistics:
    """Memory for the statistics of ``kd_loss``, which its ``_out`` operators fill."""
    rows, device = student.shape[0], student.device
    label = torch.empty(rows, dtype=torch.int64, device=device)
    if teacher is None:
        return RowStatistics(label, None, None, None, None)
    dtype = _dtype(teacher)
    return RowStatistics(
        label,
        torch.empty_like(label),
        torch.empty(rows, dtype=dtype, device=device),
        torch.empty(rows, dtype=dtype, device=device),
        torch.empty(rows, dtype=torch.bool, device=device),
    )


def row_statistics(
    student: Tensor,
    teacher: Tensor | None,
    records: tuple[Tensor | None, ...],
    tail: str,
    temperature: float,
) -> RowStatistics:
    """The same in a pass of their own, where there is no other: for the compiler, and DIST.

    Args:
        student: Logits, ``(rows, classes)``, checked.
        teacher: Logits of the same shape, checked, or None.
        records: What ``topk_arguments`` makes of a TopK teacher, or nothing.
        tail: One of ``TAILS``.
        temperature: ``T``, positive.
    """
    with torch.no_grad():
        made = _kd_statistics(
            student, teacher, *(records or (None,) * 7), TAILS[tail], float(temperature)
        )
    if teacher is None and not records:
        return RowStatistics(made[0], None, None, None, None)
    return RowStatistics(*made)
