"""Distillation losses, each one kernel: both softmaxes, the loss and its gradient in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from fastscarce.ops.autograd import (
    LOSSES,
    REDUCTIONS,
    TAILS,
    InForward,
    Recomputed,
    WriteTo,
    call,
)
from fastscarce.ops.checks import (
    buffer_of,
    check_indices,
    class_weights_of,
    column_of,
    labels_of,
    logits_of,
    parameters_of,
    term_weights,
    topk_arguments,
    weighted_label,
)
from fastscarce.ops.dist import dist_loss
from fastscarce.ops.statistics import RowStatistics, empty_statistics, row_statistics
from fastscarce.ops.targets import MixedTarget, MixedTopK, TopK
from fastscarce.ops.tensors import of_size_one, require_numbers, require_temperature

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["kd_loss"]

_kd_loss = torch.ops.fastscarce.kd_loss.default
_kd_loss_out = torch.ops.fastscarce.kd_loss_out.default
_kd_loss_topk = torch.ops.fastscarce.kd_loss_topk.default
_kd_loss_topk_out = torch.ops.fastscarce.kd_loss_topk_out.default


class _Options(TypedDict, total=False):
    """Options of :func:`kd_loss` that do not change what it returns, for type checkers."""

    loss: str
    tail: str
    temperature: float
    alpha: float | tuple[float, float]
    beta: float
    skew: float
    dkd_alpha: float
    dkd_beta: float
    inter: float
    intra: float
    threshold: float
    t_squared: bool
    weight: Tensor | None
    class_weight: Tensor | None
    label_smoothing: float
    ignore_index: int
    reduction: str
    gradient: str
    out: Tensor | None
    reuse_teacher_buffer: bool


@overload
def kd_loss(
    student: Tensor,
    teacher: Tensor | TopK | MixedTopK | None,
    target: Tensor | MixedTarget | None = None,
    *,
    statistics: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def kd_loss(
    student: Tensor,
    teacher: Tensor | TopK | MixedTopK | None,
    target: Tensor | MixedTarget | None = None,
    *,
    statistics: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, RowStatistics]: ...


@overload
def kd_loss(
    student: Tensor,
    teacher: Tensor | TopK | MixedTopK | None,
    target: Tensor | MixedTarget | None = None,
    *,
    statistics: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, RowStatistics]: ...


def kd_loss(
    student: Tensor,
    teacher: Tensor | TopK | MixedTopK | None,
    target: Tensor | MixedTarget | None = None,
    *,
    loss: str = "kl",
    tail: str = "uniform",
    temperature: float = 1.0,
    alpha: float | tuple[float, float] = 0.5,
    beta: float = 0.5,
    skew: float = 0.1,
    dkd_alpha: float = 1.0,
    dkd_beta: float = 8.0,
    inter: float = 1.0,
    intra: float = 1.0,
    threshold: float = 0.0,
    t_squared: bool = True,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    gradient: str = "auto",
    out: Tensor | None = None,
    reuse_teacher_buffer: bool = False,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
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
      out of both;
    - ``"dist"``: ``inter`` times the mean over rows, plus ``intra`` times the mean over columns, of
      1 - Pearson's correlation (Huang et al., NeurIPS 2022), see :func:`dist_loss`. A batch's loss,
      not a mean of rows': of the options below it takes the label's, ``temperature``, ``alpha``,
      ``t_squared`` and ``gradient`` (``"auto"`` and ``"in_forward"`` hold two gradients).

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
        alpha: Weight of the distillation term in 0 to 1, the label term having the rest; taken as
            1 without ``target`` and as 0 without ``teacher``. Or a pair, the weights of the two
            terms, 0 or more, of any sum.
        beta: Share of ``p`` in the mixture of ``"jsd"``, between 0 and 1.
        skew: Share of ``p`` in the mixture of ``"skew_kl"``, in 0 to 1, 1 left out.
        dkd_alpha: Weight of TCKD in ``"dkd"``, not negative.
        dkd_beta: Weight of NCKD in ``"dkd"``, not negative.
        inter: Weight of the rows' correlations in ``"dist"``, not negative.
        intra: Weight of the columns' correlations in ``"dist"``, not negative.
        threshold: Rows whose largest ``p`` (of a :class:`MixedTopK`: the mean of both, weighted) is
            below it have no distillation term, in 0 to 1. They
            count in the mean all the same, as in FixMatch.
        t_squared: Whether the distillation term has the factor ``T**2``, which keeps its gradient
            as large at every temperature.
        weight: Weight of each row, not negative, ``(rows,)``; rows of weight 0 are left out.
        class_weight: Weight of each class in the label term, ``(classes,)``, as in
            :func:`torch.nn.functional.cross_entropy`: of index labels the mean divides by the sum
            of their classes' weights. With ``label_smoothing`` a dense label is made of it.
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
        out: Memory for the gradient, contiguous, of the student's shape, dtype and device. It
            belongs to the loss until the backward pass has run. Untouched where no gradient is
            wanted. Not under ``torch.compile``.
        reuse_teacher_buffer: Writes the gradient over the teacher's logits, which are then lost: no
            memory beyond student and teacher. Without effect under ``torch.compile`` and where no
            gradient is wanted.
        statistics: Also give what each row's largest classes are and how sure the teacher is, made
            while the row is in a cache. Under ``torch.compile`` and for ``"dist"`` in a pass of its
            own, which reads both logits once more.

    Returns:
        With ``statistics`` a pair, the loss and :class:`RowStatistics`; else the loss alone.
        Loss in nats, float32 (float64 for float64 logits), a scalar, or ``(rows,)`` for ``"none"``.
        Classes masked with -inf in student and teacher count nothing. NaN for a row whose target is
        outside the classes, on a GPU or under ``torch.compile``; on a CPU this raises.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, a number is out of its range, or (on a
            CPU) a target is outside the classes.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015),
    section 2.
    """
    if loss == "dist":
        if teacher is not None:
            return _dist_and_label(
                student,
                teacher,
                target,
                dist={"temperature": temperature, "inter": inter, "intra": intra},
                alpha=alpha,
                t_squared=t_squared,
                refused={
                    "threshold": (threshold, 0.0),
                    "weight": (weight, None),
                    "reduction": (reduction, "mean"),
                    "out": (out, None),
                    "reuse_teacher_buffer": (reuse_teacher_buffer, False),
                },
                label={
                    "class_weight": class_weight,
                    "label_smoothing": label_smoothing,
                    "ignore_index": ignore_index,
                },
                gradient=gradient,
                statistics=statistics,
            )
        loss = "kl"  # without a teacher the label term alone
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ValueError(
            "kd_loss needs loss to be 'kl', 'reverse_kl', 'jsd', 'skew_kl', 'dkd', "
            f"'logit_standard' or 'dist', got {loss!r}."
        )
    if gradient not in ("auto", "in_forward", "recompute"):
        raise ValueError(
            f"kd_loss needs gradient 'auto', 'in_forward' or 'recompute', got {gradient!r}."
        )
    require_numbers(
        "kd_loss",
        temperature=temperature,
        threshold=threshold,
        label_smoothing=label_smoothing,
        beta=beta,
        skew=skew,
        dkd_alpha=dkd_alpha,
        dkd_beta=dkd_beta,
    )
    if loss == "skew_kl" and skew == 0.0:
        loss = "kl"  # which it is; a mixture of next to nothing would not be held by float32
    first, second = parameters_of(loss, beta, skew, dkd_alpha, dkd_beta)
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"kd_loss needs threshold in 0 to 1, got {threshold}.")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"kd_loss needs reduction 'mean', 'sum' or 'none', got {reduction!r}.")
    require_temperature("kd_loss", temperature)
    if not isinstance(ignore_index, int):
        raise ValueError(f"kd_loss needs ignore_index as a whole number, got {ignore_index!r}.")
    distil, label = term_weights(alpha, target is not None, teacher is not None)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"kd_loss needs label_smoothing in 0 to 1, got {label_smoothing}.")
    student = logits_of("student", student, student)
    if teacher is None:
        if target is None:
            raise ValueError("kd_loss needs a teacher, a target or both, got neither.")
    elif not isinstance(teacher, (TopK, MixedTopK)):
        given, teacher = teacher, logits_of("teacher", teacher, student)
    labels = labels_of(target, loss, student)
    if weight is not None:
        weight = column_of("weight", weight, student).to(torch.float32)
        if student.dtype == torch.float16 and reduction == "mean":
            weight = of_size_one(weight)
    buffer = None
    if (out is not None or reuse_teacher_buffer) and not torch.compiler.is_compiling():
        dense = given if isinstance(teacher, Tensor) else None
        buffer = buffer_of(out, reuse_teacher_buffer, dense, student, gradient)
    if class_weight is not None and target is not None:
        given_weight, class_weight = class_weight, class_weights_of(class_weight, student)
        soft = isinstance(target, Tensor) and target.is_floating_point()
        if soft or label_smoothing > 0:
            if loss == "dkd":
                raise ValueError(
                    "kd_loss needs label_smoothing 0 with class_weight and loss 'dkd', got "
                    f"{label_smoothing}."
                )
            wide = torch.float64 if student.dtype == torch.float64 else torch.float32
            made = weighted_label(
                target, given_weight.to(wide), weight, label_smoothing, ignore_index, reduction
            )
            labels, label_smoothing, class_weight = (made, None, None), 0.0, None
    else:
        class_weight = None

    numbers = (
        float(temperature),
        distil if t_squared else distil / temperature**2,
        label,
        float(label_smoothing),
        float(threshold),
        ignore_index,
        REDUCTIONS[reduction],
    )
    arguments: tuple[object, ...]
    operator: Any
    records: tuple[Tensor | None, ...] = ()
    if teacher is None or isinstance(teacher, Tensor):
        operator, writer = _kd_loss, _kd_loss_out
        arguments = (teacher, *labels, weight, class_weight, LOSSES[loss], first, second, *numbers)
    else:
        operator, writer = _kd_loss_topk, _kd_loss_topk_out
        records = topk_arguments(teacher, student, loss, tail)
        arguments = (*records, *labels, weight, class_weight, TAILS[tail], *numbers)
    with_gradient = student.requires_grad and torch.is_grad_enabled()
    result: Tensor
    if torch.compiler.is_compiling():
        if out is not None:
            raise ValueError("kd_loss needs out to be None under torch.compile.")
        result = operator(student, *arguments, with_gradient)[0]
        if not statistics:
            return result
        logits = teacher if isinstance(teacher, Tensor) else None
        return result, row_statistics(student, logits, records, tail, temperature)
    if statistics:
        found = empty_statistics(student, teacher)
        operator = WriteTo(writer, buffer if with_gradient else None, found)
    elif buffer is not None and with_gradient:
        operator = WriteTo(writer, buffer)
    if with_gradient:
        function = Recomputed if gradient == "recompute" else InForward
        result = function.apply(student, operator, arguments)
    else:
        result = call(operator, student, arguments, False)[0]
    if not student.is_cuda:
        check_indices(result, target, teacher, student.shape[1], ignore_index)
    return (result, found) if statistics else result


def _dist_and_label(
    student: Tensor,
    teacher: Tensor | TopK | MixedTopK,
    target: Tensor | MixedTarget | None,
    *,
    dist: dict[str, Any],
    alpha: float | tuple[float, float],
    t_squared: bool,
    refused: dict[str, tuple[Any, Any]],
    label: dict[str, Any],
    gradient: str,
    statistics: bool,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """DIST is a matter of all rows, so it is an operator of its own beside the label term's."""
    for name, (given, wanted) in refused.items():
        if given is not wanted and (isinstance(given, Tensor) or given != wanted):
            got = "a tensor" if isinstance(given, Tensor) else repr(given)
            raise ValueError(f"kd_loss needs {name}={wanted!r} for loss 'dist', got {got}.")
    if not isinstance(teacher, Tensor):
        raise ValueError("kd_loss needs loss 'kl' with a TopK teacher, got 'dist'.")
    shares = term_weights(alpha, target is not None, True)
    dist["inter"], dist["intra"] = shares[0] * dist["inter"], shares[0] * dist["intra"]
    loss = dist_loss(student, teacher, t_squared=t_squared, gradient=gradient, **dist)
    if target is not None:
        loss = loss + kd_loss(
            student, None, target, alpha=(0.0, shares[1]), gradient=gradient, **label
        )
    if not statistics:
        return loss
    student = logits_of("student", student, student)
    teacher = logits_of("teacher", teacher, student)
    return loss, row_statistics(student, teacher, (), "uniform", dist["temperature"])
