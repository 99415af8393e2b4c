"""Distillation losses, each one kernel: both softmaxes, the loss and its gradient in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastscarce.ops.autograd import LOSSES, REDUCTIONS, TAILS, InForward, Recomputed
from fastscarce.ops.targets import MixedTarget, MixedTopK, TopK

__all__ = ["kd_loss"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_kd_loss = torch.ops.fastscarce.kd_loss.default
_kd_loss_topk = torch.ops.fastscarce.kd_loss_topk.default


def kd_loss(
    student: Tensor,
    teacher: Tensor | TopK | MixedTopK | None,
    target: Tensor | MixedTarget | None = None,
    *,
    loss: str = "kl",
    tail: str = "uniform",
    temperature: float = 1.0,
    alpha: float = 0.5,
    beta: float = 0.5,
    skew: float = 0.1,
    dkd_alpha: float = 1.0,
    dkd_beta: float = 8.0,
    threshold: float = 0.0,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    gradient: str = "auto",
) -> Tensor:
    """Knowledge distillation plus cross entropy, from raw logits.

    ``alpha * T**2 * D(p, q) + (1 - alpha) * CE(student, target)`` with ``p = softmax(teacher / T)``
    and ``q = softmax(student / T)``. The divergence ``D`` is one of

    - ``"kl"``: ``KL(p || q)`` (Hinton, Vinyals and Dean, 2015);
    - ``"reverse_kl"``: ``KL(q || p)``;
    - ``"jsd"``: ``beta * KL(p || m) + (1 - beta) * KL(q || m)``, ``m = beta * p + (1 - beta) * q``;
    - ``"skew_kl"``: ``KL(p || skew * p + (1 - skew) * q)``;
    - ``"dkd"``: ``dkd_alpha * TCKD + dkd_beta * NCKD`` (Zhao et al., CVPR 2022): how the label
      stands against the rest, and the other classes among themselves. A mixed label is two classes
      apart from the rest; a row without a label has the second part alone;
    - ``"logit_standard"``: KL of logits less their mean, divided by their standard deviation
      (+ 1e-7, over classes - 1), then by ``T`` (Sun et al., CVPR 2024). Logits of -inf are left
      out of both.

    With ``reduction="mean"`` each term is a weighted mean over rows with a denominator
    of its own: the distillation term over all rows, the label term over labelled rows. A term
    without rows is 0.

    Args:
        student: Logits, float32, bfloat16, float16 or float64, shape ``(rows, classes)``. Rows may
            be strided.
        teacher: Logits of the same shape and device, of any of these dtypes; or a :class:`TopK`, or
            a :class:`MixedTopK`, at any temperature (loss ``"kl"`` only; of their classes alone is
            read, no matrix is made). Gets no gradient. None: cross entropy alone.
        target: Class indices, int64, ``(rows,)``; or a :class:`MixedTarget`; or a dense label,
            floating point, ``(rows, classes)``. None: distillation alone.
        loss: Divergence of the distillation term, one of the names above.
        tail: What a :class:`TopK` says of the classes it does not name. ``"uniform"``: each has an
            equal share of the rest, as in TinyViT (Wu et al., ECCV 2022). ``"renorm"``: nothing;
            the named classes have everything. ``"tail"``: together they have the rest, against the
            student's sum over them. ``"support"``: nothing, and the student's softmax is over the
            named classes too. A :class:`MixedTopK` takes the first two.
        temperature: ``T``, what both logits of the distillation term are divided by. Positive.
        alpha: Weight of the distillation term in 0 to 1; taken as 1 without ``target`` and as 0
            without ``teacher``.
        beta: Share of ``p`` in the mixture of ``"jsd"``, between 0 and 1.
        skew: Share of ``p`` in the mixture of ``"skew_kl"``, in 0 to 1, 1 left out.
        dkd_alpha: Weight of TCKD in ``"dkd"``, not negative.
        dkd_beta: Weight of NCKD in ``"dkd"``, not negative.
        threshold: Rows whose largest ``p`` (of a :class:`MixedTopK`: the mean of both, weighted) is
            below it have no distillation term, in 0 to 1. They
            count in the mean all the same, as in FixMatch.
        weight: Weight of each row, not negative, ``(rows,)``; rows of weight 0 are left out.
        label_smoothing: Share of the label spread evenly over all classes, in 0 to 1.
        ignore_index: A row with this target has no label term, and still distils. Of a
            :class:`MixedTarget` each half is ignored on its own: the other half keeps its weight
            ``lam`` or ``1 - lam``, in the loss as in the mean's denominator.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (a loss a row).
        gradient: ``"in_forward"`` makes the gradient in the pass that makes the loss: a logit is
            read once. ``"recompute"`` keeps the arguments and makes it in the backward pass: no
            memory is held between the two, and it can be differentiated again
            (``create_graph=True``, through plain PyTorch). ``"auto"`` is ``"in_forward"``. Under
            ``torch.compile`` it is always made in the forward pass.

    Returns:
        Loss in nats, float32 (float64 for float64 logits), a scalar, or ``(rows,)`` for ``"none"``.
        Classes masked with -inf in student and teacher count nothing. NaN for a row whose target is
        outside the classes, on a GPU or under ``torch.compile``; on a CPU this raises.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, a number is out of its range, or (on a
            CPU) a target is outside the classes.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015),
    section 2.
    """
    if loss not in LOSSES:
        raise ValueError(
            "kd_loss needs loss to be 'kl', 'reverse_kl', 'jsd', 'skew_kl', 'dkd' or "
            f"'logit_standard', got {loss!r}."
        )
    if gradient not in ("auto", "in_forward", "recompute"):
        raise ValueError(
            f"kd_loss needs gradient 'auto', 'in_forward' or 'recompute', got {gradient!r}."
        )
    first, second = _parameters(loss, beta, skew, dkd_alpha, dkd_beta)
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"kd_loss needs threshold in 0 to 1, got {threshold}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"kd_loss needs reduction 'mean', 'sum' or 'none', got {reduction!r}.")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"kd_loss needs a positive, finite temperature, got {temperature}.")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"kd_loss needs alpha in 0 to 1, got {alpha}.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"kd_loss needs label_smoothing in 0 to 1, got {label_smoothing}.")
    student = _logits("student", student, student)
    if teacher is None:
        if target is None:
            raise ValueError("kd_loss needs a teacher, a target or both, got neither.")
        alpha = 0.0
    elif isinstance(teacher, Tensor):
        teacher = _logits("teacher", teacher, student)
    partner = share = None
    if target is None:
        if loss == "dkd":
            raise ValueError("kd_loss needs a target for loss 'dkd', got none.")
        alpha = 1.0
    elif isinstance(target, MixedTarget):
        partner, share = _column("target.b", target.b, student), _column("lam", target.lam, student)
        target = _column("target.a", target.a, student)
    elif target.is_floating_point():
        if loss == "dkd":
            raise ValueError(
                "kd_loss needs class indices or a MixedTarget for loss 'dkd', got a dense label."
            )
        target = _logits("dense target", target, student)
    else:
        target = _column("target", target, student)
    if weight is not None:
        weight = _column("weight", weight, student).to(torch.float32)

    labels = (target, partner, share, weight)
    numbers = (
        float(temperature),
        float(alpha),
        float(label_smoothing),
        float(threshold),
        ignore_index,
        REDUCTIONS[reduction],
    )
    arguments: tuple[object, ...]
    if teacher is None or isinstance(teacher, Tensor):
        operator = _kd_loss
        arguments = (teacher, *labels, LOSSES[loss], first, second, *numbers)
    else:
        operator = _kd_loss_topk
        arguments = (*_named(teacher, student, loss, tail), *labels, TAILS[tail], *numbers)
    with_gradient = student.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        traced: Tensor = operator(student, *arguments, with_gradient)[0]
        return traced
    result: Tensor
    if with_gradient:
        function = Recomputed if gradient == "recompute" else InForward
        result = function.apply(operator, student, *arguments)
    else:
        result = operator(student, *arguments, False)[0]
    if not student.is_cuda:
        _check_indices(result, (target, partner), teacher, student.shape[1], ignore_index)
    return result


def _parameters(
    loss: str, beta: float, skew: float, dkd_alpha: float, dkd_beta: float
) -> tuple[float, float]:
    """The two numbers that the divergence takes."""
    if loss == "jsd":
        if not 0.0 < beta < 1.0:
            raise ValueError(f"kd_loss needs beta between 0 and 1, got {beta}.")
        return float(beta), 0.0
    if loss == "skew_kl":
        if not 0.0 <= skew < 1.0:
            raise ValueError(f"kd_loss needs skew in 0 to 1 and below 1, got {skew}.")
        return float(skew), 0.0
    if loss == "dkd":
        if not (0.0 <= dkd_alpha < math.inf and 0.0 <= dkd_beta < math.inf):
            raise ValueError(
                f"kd_loss needs dkd_alpha and dkd_beta of 0 or more, got {dkd_alpha} and "
                f"{dkd_beta}."
            )
        return float(dkd_alpha), float(dkd_beta)
    return 0.0, 0.0


def _logits(name: str, tensor: Tensor, student: Tensor) -> Tensor:
    """A matrix of the student's shape and device whose rows lie without gaps."""
    if tensor.dtype not in _FLOATS:
        raise ValueError(
            f"kd_loss needs {name} in float32, bfloat16, float16 or float64, got {tensor.dtype}."
        )
    if tensor is student:
        if tensor.dim() != 2 or tensor.shape[1] == 0:
            raise ValueError(
                "kd_loss needs student logits of shape (rows, classes), classes at least 1, got "
                f"{tuple(tensor.shape)}."
            )
    elif tensor.shape != student.shape:
        raise ValueError(
            f"kd_loss needs student logits and {name} of one shape, (rows, classes), got "
            f"{tuple(student.shape)} and {tuple(tensor.shape)}."
        )
    elif tensor.device != student.device:
        raise ValueError(
            f"kd_loss needs student logits and {name} on one device, got {student.device} and "
            f"{tensor.device}."
        )
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _column(name: str, tensor: Tensor, student: Tensor) -> Tensor:
    """One number a row, contiguous; indices in int64."""
    if tensor.dim() != 1 or tensor.shape[0] != student.shape[0]:
        raise ValueError(
            f"kd_loss needs {name} of shape (rows,) = ({student.shape[0]},), got "
            f"{tuple(tensor.shape)}."
        )
    if tensor.device != student.device:
        raise ValueError(
            f"kd_loss needs student logits and {name} on one device, got {student.device} and "
            f"{tensor.device}."
        )
    if name.startswith("target") and tensor.dtype != torch.int64:
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"kd_loss needs {name} in int64, got {tensor.dtype}.")
        tensor = tensor.long()
    return tensor.contiguous()


def _named(
    teacher: TopK | MixedTopK, student: Tensor, loss: str, tail: str
) -> tuple[Tensor | None, ...]:
    """The operator's tensors of one TopK teacher or two."""
    if loss != "kl":
        raise ValueError(f"kd_loss needs loss 'kl' with a TopK teacher, got {loss!r}.")
    if tail not in TAILS:
        raise ValueError(
            f"kd_loss needs tail 'uniform', 'renorm', 'tail' or 'support', got {tail!r}."
        )
    if isinstance(teacher, TopK):
        return (*_topk_columns(teacher, student), None, None, None, None)
    if tail not in ("uniform", "renorm"):
        raise ValueError(
            f"kd_loss needs tail 'uniform' or 'renorm' with a MixedTopK, got {tail!r}."
        )
    return (
        *_topk_columns(teacher.a, student),
        *_topk_columns(teacher.b, student),
        teacher.lam.contiguous(),
    )


def _topk_columns(teacher: TopK, student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    indices = teacher.indices
    if len(teacher) != student.shape[0] or teacher.k > student.shape[1]:
        raise ValueError(
            f"kd_loss needs a TopK of {student.shape[0]} rows and at most {student.shape[1]} "
            f"classes, as the student has, got {len(teacher)} rows and k = {teacher.k}."
        )
    if indices.device != student.device:
        raise ValueError(
            f"kd_loss needs student logits and teacher on one device, got {student.device} and "
            f"{indices.device}."
        )
    return indices.contiguous(), teacher.log_probs.contiguous(), teacher.log_tail.contiguous()


def _check_indices(
    loss: Tensor,
    targets: tuple[Tensor | None, ...],
    teacher: Tensor | TopK | MixedTopK | None,
    classes: int,
    ignore_index: int,
) -> None:
    """Names the first index outside the classes; the kernels make such a row NaN and go on."""
    loss = loss.detach()
    # One number is read on its own: a kernel a call for it would show beside a small batch.
    if not (math.isnan(loss.item()) if loss.dim() == 0 else bool(torch.isnan(loss).any())):
        return
    for target in targets:
        if target is None or target.dtype != torch.int64:
            continue
        outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"kd_loss needs targets in 0 to {classes - 1} or {ignore_index}, got "
                f"{int(target[row])} in row {row}."
            )
    both = (teacher.a, teacher.b) if isinstance(teacher, MixedTopK) else (teacher,)
    for one in both:
        if not isinstance(one, TopK):
            continue
        outside = (one.indices < 0) | (one.indices >= classes)
        if bool(outside.any()):
            row, place = outside.nonzero()[0].tolist()
            raise ValueError(
                f"kd_loss needs a teacher's indices in 0 to {classes - 1}, got "
                f"{int(one.indices[row, place])} in row {row}."
            )
