"""DIST: how well the student's softmax is correlated with the teacher's, by row and by column."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastscarce.ops import reference
from fastscarce.ops.autograd import InForward, Recomputed, call
from fastscarce.ops.tensors import (
    require_floats,
    require_numbers,
    require_temperature,
    without_gaps,
)

__all__ = ["dist_loss"]

_dist_loss = torch.ops.fastscarce.dist_loss.default


class _Recomputed(Recomputed):
    """Differentiated again through the twin of DIST."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        """The student's gradient, and None for all else."""
        if not torch.is_grad_enabled():
            return Recomputed.backward(ctx, upstream)
        student, teacher = ctx.saved_tensors
        temperature, inter, intra = ctx.options
        loss = reference.dist_loss(
            student.double(),
            teacher,
            temperature=temperature,
            inter=inter,
            intra=intra,
            t_squared=False,
        )
        (gradient,) = torch.autograd.grad(loss, student, upstream.double(), create_graph=True)
        return gradient, None, None


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
    t_squared: bool = True,
    gradient: str = "auto",
) -> Tensor:
    """DIST (Huang et al., NeurIPS 2022), from raw logits.

    ``inter * mean over rows of (1 - rho) + intra * mean over columns of (1 - rho)``, with ``rho``
    the correlation of ``q = softmax(student / T)`` and ``p = softmax(teacher / T)``: between the
    classes of a row, and between the rows of a class. ``rho(a, b) = <a0, b0> / (|a0| |b0| + 1e-8)``
    with ``a0`` and ``b0`` less their means, so a constant row or column has ``rho`` 0.

    A batch's columns are part of the loss: it is not a mean of losses of rows, and one NaN makes
    every gradient NaN.

    Args:
        student: Logits, float32, bfloat16, float16 or float64, shape ``(rows, classes)``. Rows may
            be strided.
        teacher: Logits of the same shape and device, of any of these dtypes; gets no gradient.
        temperature: ``T``, what both logits are divided by. Positive.
        inter: Weight of the rows' term, not negative; the paper's beta.
        intra: Weight of the columns' term, not negative; the paper's gamma.
        t_squared: Multiply by ``T**2``, as the authors' code does and their paper does not.
        gradient: ``"in_forward"`` makes the gradient in the pass that makes the loss.
            ``"recompute"`` keeps the arguments and makes it in the backward pass: no memory is held
            between the two, and it can be differentiated again (``create_graph=True``, through
            plain PyTorch). ``"auto"`` is ``"in_forward"``. Under ``torch.compile`` it is always
            made in the forward pass.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without rows. A class masked with -inf in
        student and teacher is a constant column: it counts 1 among the columns.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or a number is out of its range.

    Source: Huang, You, Wang, Qian and Xu, "Knowledge Distillation from A Stronger Teacher"
    (NeurIPS 2022), equations 6 to 10.
    """
    if gradient not in ("auto", "in_forward", "recompute"):
        raise ValueError(
            f"dist_loss needs gradient 'auto', 'in_forward' or 'recompute', got {gradient!r}."
        )
    require_numbers("dist_loss", temperature=temperature, inter=inter, intra=intra)
    require_temperature("dist_loss", temperature)
    if not (0.0 <= inter < math.inf and 0.0 <= intra < math.inf):
        raise ValueError(f"dist_loss needs inter and intra of 0 or more, got {inter} and {intra}.")
    student, teacher = _logits(student, teacher)
    scale = temperature**2 if t_squared else 1.0
    arguments = (teacher, float(temperature), float(inter * scale), float(intra * scale))
    with_gradient = student.requires_grad and torch.is_grad_enabled()
    loss: Tensor
    if torch.compiler.is_compiling():
        loss = _dist_loss(student, *arguments, with_gradient)[0]
    elif with_gradient:
        function = _Recomputed if gradient == "recompute" else InForward
        loss = function.apply(student, _dist_loss, arguments)
    else:
        loss = call(_dist_loss, student, arguments, False)[0]
    return loss


def _logits(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices of one shape on one device, whose rows lie without gaps."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        require_floats("dist_loss", f"{name} logits", tensor)
    if student.dim() != 2 or student.shape[1] == 0 or teacher.shape != student.shape:
        raise ValueError(
            "dist_loss needs student and teacher logits of one shape, (rows, classes), classes at "
            f"least 1, got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if teacher.device != student.device:
        raise ValueError(
            f"dist_loss needs student and teacher logits on one device, got {student.device} and "
            f"{teacher.device}."
        )
    return without_gaps(student), without_gaps(teacher)
