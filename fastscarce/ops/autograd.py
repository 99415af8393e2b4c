"""How the losses reach autograd: the gradient is made in the forward pass, or in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastscarce import _ops  # noqa: F401  loads the kernels
from fastscarce.ops import reference
from fastscarce.ops.targets import MixedTarget, MixedTopK, TopK
from fastscarce.ops.tensors import mark_written

__all__ = [
    "LOSSES",
    "REDUCTIONS",
    "TAILS",
    "InForward",
    "Recomputed",
    "WriteTo",
    "call",
    "keeps_graph",
    "refuse_graph",
]

# Names and the numbers that the operators know them by.
LOSSES = {"kl": 0, "reverse_kl": 1, "jsd": 2, "skew_kl": 3, "dkd": 4, "logit_standard": 5}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
TAILS = {"uniform": 0, "renorm": 1, "tail": 2, "support": 3}

_backward = torch.ops.fastscarce.kd_loss_backward.default
_backward_in_place = torch.ops.fastscarce.kd_loss_backward_.default


def _always() -> bool:
    return True


# Where autograd is this module's: the gradients registered for tracing cost a Python call each.
_below_autograd = torch._C._AutoDispatchBelowAutograd

# Whether the backward pass that runs now keeps its graph; where torch does not say, assume it does.
keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", _always)


def refuse_graph(cure: str) -> None:
    """Stop a backward pass with ``create_graph=True``, whose second derivative would be missing.

    Raises:
        RuntimeError: This is one.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The loss made its gradient in the forward pass, which can't be differentiated again; "
            f"{cure}."
        )


class WriteTo:
    """An operator that writes into memory it is given: the gradient, or statistics, or both.

    Statistics are written by the first call, the forward pass; later ones make the gradient alone.
    """

    def __init__(
        self, operator: Any, gradient: Tensor | None, statistics: tuple[Tensor | None, ...] = ()
    ) -> None:
        self.operator = operator
        self.gradient = gradient
        self.statistics = statistics

    def __call__(self, student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient, factor."""
        statistics, self.statistics = self.statistics or (None,) * 5, ()
        loss, gradient, factor = self.operator(student, *arguments, self.gradient, *statistics)
        if self.gradient is not None:
            mark_written(self.gradient)
        return loss, gradient if self.gradient is None else self.gradient, factor


def call(operator: Any, student: Tensor, arguments: tuple[Any, ...], with_gradient: bool) -> Any:
    """Loss, gradient and factor, outside autograd: nothing gets a gradient by itself."""
    with _below_autograd():
        return operator(student, *arguments, with_gradient)


class InForward(torch.autograd.Function):
    """``apply(student, operator, arguments)``: only the student is autograd's to look at."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, operator: Any, arguments: tuple[Any, ...]) -> Tensor:
        """The loss."""
        loss: Tensor
        loss, gradient, factor = call(operator, student, arguments, True)
        ctx.save_for_backward(gradient, factor)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        """The student's gradient, and None for all else."""
        refuse_graph("pass gradient='recompute'")
        gradient, factor = ctx.saved_tensors
        upstream = upstream.contiguous()
        if keeps_graph():
            # Another backward pass will read the stored gradient: leave it as it is.
            return _backward(gradient, factor, upstream), None, None
        # The last use of the stored gradient: hand it out, scaled where it lies. The kernel
        # compares the scale with 1 on the device and then touches nothing.
        _backward_in_place(gradient, factor, upstream)
        return gradient, None, None


class Recomputed(torch.autograd.Function):
    """Keeps the arguments instead of the gradient, which the backward pass makes."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, operator: Any, arguments: tuple[Any, ...]) -> Tensor:
        """The loss."""
        numbers = next(i for i, x in enumerate(arguments) if isinstance(x, (int, float)))
        # Autograd can't save what was made in inference mode; a copy it can.
        tensors = [
            one.clone() if isinstance(one, Tensor) and one.is_inference() else one
            for one in arguments[:numbers]
        ]
        ctx.save_for_backward(student, *tensors)
        ctx.operator, ctx.options = operator, arguments[numbers:]
        loss: Tensor = call(operator, student, arguments, False)[0]
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        """The student's gradient, and None for all else."""
        student, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A graph of the gradient is wanted: autograd makes it, through the twin.
            teacher, labels, options = _twin_arguments(tensors, ctx.options)
            gradient = _twin_gradient(student, upstream, teacher, *labels, **options)
        else:
            _, gradient, factor = call(ctx.operator, student, (*tensors, *ctx.options), True)
            _backward_in_place(gradient, factor, upstream.contiguous())
        return gradient, None, None


def _name(names: dict[str, int], number: int) -> str:
    return next(name for name, value in names.items() if value == number)


def _twin_arguments(
    tensors: list[Tensor | None], options: tuple[Any, ...]
) -> tuple[Tensor | TopK | MixedTopK | None, list[Tensor | None], dict[str, Any]]:
    """Teacher, label tensors and options of the twin, from the operator's arguments."""
    if len(tensors) == 6:
        teacher, *labels = tensors
        divergence, first, second = options[:3]
        found = {
            "loss": _name(LOSSES, divergence),
            "beta": first,
            "skew": first,
            "dkd_alpha": first,
            "dkd_beta": second,
        }
        return teacher, labels, {**found, "numbers": options[3:]}
    indices, log_probs, log_tail, *second_teacher, mix = tensors[:7]
    first_teacher = (indices, log_probs, log_tail)
    topk: TopK | MixedTopK = TopK(*first_teacher)  # type: ignore[arg-type]
    if mix is not None:
        topk = MixedTopK(topk, TopK(*second_teacher), mix)  # type: ignore[arg-type]
    return topk, tensors[7:], {"tail": _name(TAILS, options[0]), "numbers": options[1:]}


def _twin_gradient(
    student: Tensor,
    upstream: Tensor,
    teacher: Tensor | TopK | MixedTopK | None,
    target: Tensor | None,
    partner: Tensor | None,
    share: Tensor | None,
    weight: Tensor | None,
    class_weight: Tensor | None,
    *,
    numbers: tuple[Any, ...],
    **options: Any,
) -> Tensor:
    temperature, distil, hard, label_smoothing, threshold, ignore_index, reduction = numbers
    # The twin's weights sum to 1.
    scale = (distil if teacher is not None else 0) + (hard if target is not None else 0)
    label: Tensor | MixedTarget | None = target
    if target is not None and partner is not None and share is not None:
        label = MixedTarget(target, partner, share)
    # In float64: what the kernels make of logarithms of probabilities, the twin makes of
    # probabilities, which may be too small for float32.
    loss = reference.kd_loss(
        student.double(),
        teacher,
        label,
        temperature=temperature,
        alpha=distil / scale if scale else 0.0,
        threshold=threshold,
        weight=weight,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=_name(REDUCTIONS, reduction),
        **options,
    )
    (gradient,) = torch.autograd.grad(scale * loss, student, upstream.double(), create_graph=True)
    return gradient
