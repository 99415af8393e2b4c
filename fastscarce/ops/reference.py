"""Plain-PyTorch twins of the fused operators: what both back ends are tested against.

Written for clearness, from the formulas, in the dtype of the arguments; autograd gives the
gradients. A new loss begins here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastscarce.ops.targets import MixedTarget

__all__ = ["kd_loss", "kl_rows", "label_rows"]


def kl_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T**2 * KL(softmax(teacher / T) || softmax(student / T))`` of each row.

    A class of teacher probability 0 contributes 0, also where the student's logit is -inf.
    """
    p = (teacher / temperature).softmax(1)
    log_p = (teacher / temperature).log_softmax(1)
    log_q = (student / temperature).log_softmax(1)
    counts = p > 0
    zero = torch.zeros_like(p)
    terms = torch.where(counts, p, zero) * (
        torch.where(counts, log_p, zero) - torch.where(counts, log_q, zero)
    )
    return temperature**2 * terms.sum(1)


def label_rows(
    student: Tensor,
    target: Tensor | MixedTarget,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row with ``Y = (1 - eps) * label + eps / classes``, and its label mass.

    A mixed label is two rows of weight ``lam`` and ``1 - lam``; the ignored ones fall out. The mass
    is what is left: what the row counts in the mean. A dense label counts 1.
    """
    rows, classes = student.shape
    if isinstance(target, Tensor) and target.is_floating_point():
        label = target.to(student.dtype)
        mass = student.new_ones(rows)
        soft = (1 - label_smoothing) * label + label_smoothing / classes
    else:
        if isinstance(target, Tensor):
            target = MixedTarget(target, target, torch.ones(rows, device=target.device))
        label = student.new_zeros(rows, classes)
        mass = student.new_zeros(rows)
        lam = target.lam.to(student.dtype)
        for index, share in ((target.a, lam), (target.b, 1 - lam)):
            share = torch.where(index == ignore_index, torch.zeros_like(share), share)
            place = torch.where(index == ignore_index, torch.zeros_like(index), index)
            label = label.scatter_add(1, place[:, None], share[:, None])
            mass = mass + share
        soft = (1 - label_smoothing) * label + label_smoothing * mass[:, None] / classes
    log_q = student.log_softmax(1)
    zero = torch.zeros_like(log_q)
    return -(soft * torch.where(soft != 0, log_q, zero)).sum(1), mass


def kd_loss(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | MixedTarget | None = None,
    *,
    loss: str = "kl",
    temperature: float = 1.0,
    alpha: float = 0.5,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Twin of :func:`fastscarce.ops.kd_loss`; same arguments and result, no checks."""
    if loss != "kl":
        raise ValueError(f"kd_loss knows the loss 'kl', got {loss!r}.")
    rows = student.shape[0]
    weights = student.new_ones(rows) if weight is None else weight.to(student.dtype)
    distil = label = student.new_zeros(rows)
    distil_mass, label_mass = weights, student.new_zeros(rows)
    if teacher is not None:
        share = alpha if target is not None else 1.0
        distil = share * weights * kl_rows(student, teacher.to(student.dtype), temperature)
    if target is not None:
        share = 1 - alpha if teacher is not None else 1.0
        label, mass = label_rows(student, target, label_smoothing, ignore_index)
        label, label_mass = share * weights * label, weights * mass
    if reduction == "none":
        return distil + label
    if reduction == "sum":
        return (distil + label).sum()

    def mean(values: Tensor, masses: Tensor) -> Tensor:
        total = masses.sum()
        return values.sum() / torch.where(total == 0, torch.ones_like(total), total)

    return mean(distil, distil_mass) + mean(label, label_mass)
