"""What the losses ask of their arguments, each in one sentence that says what to do next."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastscarce.ops.autograd import TAILS
from fastscarce.ops.targets import MixedTarget, MixedTopK, TopK
from fastscarce.ops.tensors import (
    require_floats,
    require_numbers,
    require_tensor,
    without_gaps,
)

__all__ = [
    "buffer_of",
    "check_indices",
    "check_target",
    "class_weights_of",
    "column_of",
    "labels_of",
    "logits_of",
    "parameters_of",
    "term_weights",
    "topk_arguments",
    "weighted_label",
]


def term_weights(
    alpha: float | tuple[float, float], target: bool, teacher: bool
) -> tuple[float, float]:
    """Weights of the distillation and of the label term; 0 for one that is not there."""
    if isinstance(alpha, (tuple, list)):
        if len(alpha) != 2 or not all(hasattr(one, "__float__") for one in alpha):
            raise ValueError(f"kd_loss needs alpha as a number or two, got {alpha}.")
        distil, label = alpha
        if not (0.0 <= distil < math.inf and 0.0 <= label < math.inf):
            raise ValueError(
                f"kd_loss needs a pair alpha of finite weights of 0 or more, got {alpha}."
            )
    else:
        require_numbers("kd_loss", alpha=alpha)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"kd_loss needs alpha in 0 to 1, got {alpha}.")
        # A term alone has all the weight.
        distil = alpha if target else 1.0
        label = 1.0 - alpha if teacher else 1.0
    return float(distil) if teacher else 0.0, float(label) if target else 0.0


def parameters_of(
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


def logits_of(name: str, tensor: Tensor, student: Tensor) -> Tensor:
    """A matrix of the student's shape and device whose rows lie without gaps."""
    require_floats("kd_loss", name, tensor)
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
    return without_gaps(tensor)


def column_of(name: str, tensor: Tensor, student: Tensor) -> Tensor:
    """One number a row, contiguous; indices in int64."""
    require_tensor("kd_loss", name, tensor)
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


def topk_arguments(
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


def check_indices(
    loss: Tensor,
    target: Tensor | MixedTarget | None,
    teacher: Tensor | TopK | MixedTopK | None,
    classes: int,
    ignore_index: int,
) -> None:
    """Names the first index outside the classes; the kernels make such a row NaN and go on."""
    loss = loss.detach()
    # One number is read on its own: a kernel a call for it would show beside a small batch.
    if not (math.isnan(loss.item()) if loss.dim() == 0 else bool(torch.isnan(loss).any())):
        return
    check_target(target, classes, ignore_index)
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


def check_target(
    target: Tensor | MixedTarget | None, classes: int, ignore_index: int, *, name: str = "kd_loss"
) -> None:
    """Names the first label outside the classes."""
    for index in (target.a, target.b) if isinstance(target, MixedTarget) else (target,):
        if index is None or index.is_floating_point():
            continue
        outside = ((index < 0) | (index >= classes)) & (index != ignore_index)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"{name} needs targets in 0 to {classes - 1} or ignore_index, {ignore_index}, got "
                f"{int(index[row])} in row {row}."
            )


def labels_of(
    target: Tensor | MixedTarget | None, loss: str, student: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Target, partner and share as the operators take them."""
    if target is None:
        if loss == "dkd":
            raise ValueError("kd_loss needs a target for loss 'dkd', got none.")
        return None, None, None
    if isinstance(target, MixedTarget):
        return (
            column_of("target.a", target.a, student),
            column_of("target.b", target.b, student),
            column_of("lam", target.lam, student),
        )
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return column_of("target", target, student), None, None
    if loss == "dkd":
        raise ValueError(
            "kd_loss needs class indices or a MixedTarget for loss 'dkd', got a dense label."
        )
    return logits_of("dense target", target, student), None, None


def class_weights_of(class_weight: Tensor, student: Tensor) -> Tensor:
    """One float32 number a class, on the student's device."""
    require_tensor("kd_loss", "class_weight", class_weight)
    if class_weight.shape != student.shape[1:] or not class_weight.is_floating_point():
        raise ValueError(
            f"kd_loss needs class_weight of shape ({student.shape[1]},), floating point, got "
            f"{class_weight.dtype} {tuple(class_weight.shape)}."
        )
    if class_weight.device != student.device:
        raise ValueError(
            f"kd_loss needs student logits and class_weight on one device, got {student.device} "
            f"and {class_weight.device}."
        )
    return class_weight.to(torch.float32).contiguous()


def weighted_label(
    target: Tensor | MixedTarget,
    class_weight: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The label with class weights as a dense one, where the kernels have no other way to say it.

    A dense label times the weights; or, with label smoothing, ``weight[c] * Y[c]`` over all
    classes, scaled so that a mean over rows becomes the mean over weights of labels.
    """
    if isinstance(target, Tensor) and target.is_floating_point():
        # Not in 16 bits, which a product of the two may not fit in.
        smooth = (1 - label_smoothing) * target.to(class_weight.dtype)
        return (smooth + label_smoothing / target.shape[1]) * class_weight
    if isinstance(target, Tensor):
        target = MixedTarget(target, target, torch.ones_like(target, dtype=torch.float32))
    label = class_weight.new_zeros((len(target), class_weight.shape[0]))
    mass, labelled = label.new_zeros(len(target)), label.new_zeros(len(target))
    for index, share in ((target.a, target.lam), (target.b, 1 - target.lam)):
        share = torch.where(index == ignore_index, 0.0, share)
        place = torch.where(index == ignore_index, 0, index)
        inside = (place >= 0) & (place < label.shape[1])
        # An index outside makes its row NaN, which is found and named afterwards.
        share = torch.where(inside, share, torch.nan).to(class_weight.dtype)
        place = place.clamp(0, label.shape[1] - 1)
        label = label.scatter_add(1, place[:, None], share[:, None])
        mass = mass + share
        labelled = labelled + share * class_weight[place]
    label = (1 - label_smoothing) * label + label_smoothing * mass[:, None] / label.shape[1]
    label = label * class_weight
    if reduction == "mean":
        rows = torch.ones_like(mass) if weight is None else weight
        total = (rows * labelled).sum()
        label = label * (rows.sum() / torch.where(total == 0, 1.0, total))
    return label


def buffer_of(
    out: Tensor | None, reuse_teacher_buffer: bool, teacher: object, student: Tensor, gradient: str
) -> Tensor | None:
    """Where the gradient is to be written, if anywhere in particular."""
    if out is None and not reuse_teacher_buffer:
        return None
    if gradient == "recompute":
        raise ValueError(
            "kd_loss needs gradient 'auto' or 'in_forward' with out or reuse_teacher_buffer: "
            "'recompute' holds no gradient."
        )
    if out is not None and reuse_teacher_buffer:
        raise ValueError("kd_loss needs out or reuse_teacher_buffer, got both.")
    name = "out"
    if out is None:
        if not isinstance(teacher, Tensor):
            raise ValueError("kd_loss needs teacher logits for reuse_teacher_buffer, got none.")
        name, out = "teacher", teacher
    require_tensor("kd_loss", name, out)
    if out.shape != student.shape or out.dtype != student.dtype or out.device != student.device:
        raise ValueError(
            f"kd_loss needs {name} of the student's shape, dtype and device to write the gradient "
            f"to, {tuple(student.shape)} {student.dtype} on {student.device}, got "
            f"{tuple(out.shape)} {out.dtype} on {out.device}."
        )
    if not out.is_contiguous() or out.requires_grad:
        raise ValueError(
            f"kd_loss needs a contiguous {name} that requires no gradient to write to."
        )
    if out.is_inference() and not student.is_inference():
        raise ValueError(
            f"kd_loss needs a {name} to write to that was not made in inference mode, which "
            "autograd can't save; make it under torch.no_grad()."
        )
    if out.untyped_storage().data_ptr() == student.untyped_storage().data_ptr() and out.numel():
        raise ValueError(f"kd_loss needs {name} to be other memory than the student's logits.")
    return out
