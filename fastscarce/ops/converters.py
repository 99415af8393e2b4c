"""Other libraries' distillation losses and cross entropies, each with its own conventions.

A function here takes the arguments of the class that it stands in for and returns a module that
is called in the same way, gives the same number and the same gradient of the logits, and works
through :func:`fastscarce.ops.kd_loss`. What differs between the libraries is which term ``alpha``
weighs, whether the weights sum to 1, whether there is a ``T**2``, and whether a mean divides by
rows or by rows and classes.

The result is float32 (float64 for float64 logits) also where the other library's is bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastscarce.ops.kd import kd_loss
from fastscarce.ops.targets import MixedTarget
from fastscarce.ops.weighted import CrossEntropyLoss, TokenDistillationLoss, WeightedKDLoss

__all__ = [
    "deit_distillation",
    "liger_jsd",
    "liger_kl_div",
    "mdistiller_dkd",
    "mdistiller_kd",
    "timm_label_smoothing_cross_entropy",
    "timm_logit_distillation",
    "timm_soft_target_cross_entropy",
    "timm_token_distillation",
    "torchdistill_kd",
    "torchdistill_logit_std_kd",
]


def timm_label_smoothing_cross_entropy(smoothing: float = 0.1) -> CrossEntropyLoss:
    """``timm.loss.LabelSmoothingCrossEntropy``, called ``(logits, target)``.

    Args:
        smoothing: Share of the label spread evenly over all classes, in 0 to 1.

    Source: timm 1.0.31, ``timm/loss/cross_entropy.py``.
    """
    return CrossEntropyLoss(label_smoothing=smoothing)


def timm_soft_target_cross_entropy() -> CrossEntropyLoss:
    """``timm.loss.SoftTargetCrossEntropy``, called ``(logits, target)`` with a dense target.

    A :class:`fastscarce.ops.MixedTarget` in place of the dense target gives the same number from
    20 bytes a row.

    Source: timm 1.0.31, ``timm/loss/cross_entropy.py``.
    """
    return CrossEntropyLoss()


def timm_logit_distillation(
    task_loss_weight: float | None = None,
    distill_loss_weight: float | None = None,
    temperature: float = 1.0,
    *,
    smoothing: float = 0.0,
) -> WeightedKDLoss:
    """The loss of ``timm.task.LogitDistillationTask``, called ``(student, teacher, target)``.

    ``task_loss_weight * CE + distill_loss_weight * T**2 * KL``, each a mean over rows. The task
    itself also runs both models; the converter takes their logits.

    Args:
        task_loss_weight: Weight of the cross entropy. None: 1.
        distill_loss_weight: Weight of the distillation term. None: 1 less the other weight, or 1
            where that is None too.
        temperature: ``T``, what both logits of the distillation term are divided by. Positive.
        smoothing: Label smoothing of the task's criterion.

    Raises:
        ValueError: A weight is negative, or both are 0.

    Source: timm 1.0.31, ``timm/task/distillation.py``.
    """
    label, distil = _timm_weights(task_loss_weight, distill_loss_weight)
    return WeightedKDLoss(distil, label, temperature=temperature, label_smoothing=smoothing)


def timm_token_distillation(
    distill_type: str = "soft",
    task_loss_weight: float | None = None,
    distill_loss_weight: float | None = None,
    temperature: float = 1.0,
    *,
    criterion: Callable[[Tensor, Any], Tensor] | None = None,
) -> TokenDistillationLoss:
    """The loss of ``timm.task.TokenDistillationTask``, called ``(outputs, teacher, target)``.

    ``outputs`` is the student's pair, logits of the class token and of the distillation token. The
    mean of ``"soft"`` is one over rows, other than DeiT's own (:func:`deit_distillation`).

    Args:
        distill_type: ``"soft"`` (KL times ``T**2``) or ``"hard"`` (the teacher's first class).
        task_loss_weight: As in :func:`timm_logit_distillation`.
        distill_loss_weight: As in :func:`timm_logit_distillation`.
        temperature: ``T`` of ``"soft"``. Positive.
        criterion: Loss of the class token, called ``(logits, target)``. None: cross entropy.

    Raises:
        ValueError: Another ``distill_type``; a weight is negative, or both are 0.

    Source: timm 1.0.31, ``timm/task/token_distillation.py``.
    """
    label, distil = _timm_weights(task_loss_weight, distill_loss_weight)
    return TokenDistillationLoss(
        distil, label, kind=distill_type, temperature=temperature, criterion=criterion
    )


def _timm_weights(label: float | None, distil: float | None) -> tuple[float, float]:
    if distil is not None:
        return 1.0 if label is None else label, distil
    return (1.0, 1.0) if label is None else (label, 1.0 - label)


def torchdistill_kd(
    student_module_path: str,
    student_module_io: str,
    teacher_module_path: str,
    teacher_module_io: str,
    temperature: float,
    alpha: float | None = None,
    beta: float | None = None,
    reduction: str = "batchmean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> nn.Module:
    """``torchdistill.losses.mid_level.KDLoss``, called with its two dictionaries and the targets.

    ``alpha * CE + beta * T**2 * KL``. As there, the result is the bare KL, without ``beta`` and
    without ``T**2``, where ``alpha`` is None or 0 or no targets are given.

    Args:
        student_module_path: Key of the student's logits in the first dictionary.
        student_module_io: Key in what that holds, ``"input"`` or ``"output"``.
        teacher_module_path: Key of the teacher's logits in the second dictionary.
        teacher_module_io: Key in what that holds.
        temperature: ``T``. Positive.
        alpha: Weight of the **cross entropy**; :func:`fastscarce.ops.kd_loss` counts the other way.
        beta: Weight of the distillation term. None: ``1 - alpha``.
        reduction: ``"batchmean"`` (both terms a mean over rows), ``"sum"``, or ``"mean"``, which
            divides the distillation term by rows and classes.
        weight: Class weights of the cross entropy, ``(classes,)``.
        ignore_index: A row with this target has no label term.
        label_smoothing: Share of the label spread evenly over all classes, in 0 to 1.

    Raises:
        ValueError: ``reduction`` is another, or a weight is negative.

    Source: torchdistill 1.1.5, ``torchdistill/losses/mid_level.py``.
    """
    paths = ((student_module_path, student_module_io), (teacher_module_path, teacher_module_io))
    return _Torchdistill(
        paths,
        alpha,
        beta,
        reduction,
        loss="kl",
        temperature=temperature,
        class_weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


def torchdistill_logit_std_kd(
    student_module_path: str,
    student_module_io: str,
    teacher_module_path: str,
    teacher_module_io: str,
    temperature: float,
    eps: float = 1e-7,
    alpha: float | None = None,
    beta: float | None = None,
    reduction: str = "batchmean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> nn.Module:
    """``torchdistill.losses.mid_level.LogitStdKDLoss``, called like :func:`torchdistill_kd`.

    Args:
        student_module_path: As in :func:`torchdistill_kd`, and so are the others.
        student_module_io: See there.
        teacher_module_path: See there.
        teacher_module_io: See there.
        temperature: ``T``. Positive.
        eps: What is added to the standard deviation: 1e-7.
        alpha: Weight of the cross entropy.
        beta: Weight of the distillation term. None: ``1 - alpha``.
        reduction: ``"batchmean"``, ``"sum"`` or ``"mean"``.
        weight: See there.
        ignore_index: See there.
        label_smoothing: See there.

    Raises:
        ValueError: As in :func:`torchdistill_kd`, or ``eps`` is another.

    Source: torchdistill 1.1.5, ``torchdistill/losses/mid_level.py``.
    """
    if eps != 1e-7:
        raise ValueError(f"torchdistill_logit_std_kd needs eps 1e-7, got {eps}.")
    paths = ((student_module_path, student_module_io), (teacher_module_path, teacher_module_io))
    return _Torchdistill(
        paths,
        alpha,
        beta,
        reduction,
        loss="logit_standard",
        temperature=temperature,
        class_weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


def mdistiller_kd(
    temperature: float = 4.0, ce_weight: float = 0.1, kd_weight: float = 0.9
) -> WeightedKDLoss:
    """The sum of mdistiller's two KD losses, called ``(student, teacher, target)``.

    ``ce_weight * CE + kd_weight * T**2 * KL``, each a mean over rows.

    Args:
        temperature: ``KD.TEMPERATURE``. Positive.
        ce_weight: ``KD.LOSS.CE_WEIGHT``.
        kd_weight: ``KD.LOSS.KD_WEIGHT``. ``mdistiller_kd(T, 0.0, 1.0)`` is its function
            ``kd_loss(student, teacher, T)``.

    Raises:
        ValueError: A weight is negative, or both are 0.

    Source: mdistiller, ``mdistiller/distillers/KD.py``.
    """
    return WeightedKDLoss(kd_weight, ce_weight, temperature=temperature)


def mdistiller_dkd(
    ce_weight: float = 1.0, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> WeightedKDLoss:
    """The sum of mdistiller's two DKD losses, called ``(student, teacher, target)``.

    ``ce_weight * CE + T**2 * (alpha * TCKD + beta * NCKD)``, each a mean over rows. Its warm-up is
    a weight that is set before each epoch: ``module.distil_weight = min(epoch / warmup, 1.0)``.

    Args:
        ce_weight: ``DKD.CE_WEIGHT``. ``mdistiller_dkd(0.0, alpha, beta, T)`` is its function
            ``dkd_loss(student, teacher, target, alpha, beta, T)``.
        alpha: ``DKD.ALPHA``, weight of TCKD.
        beta: ``DKD.BETA``, weight of NCKD.
        temperature: ``DKD.T``. Positive.

    Raises:
        ValueError: ``ce_weight`` is negative; when called, ``alpha`` or ``beta`` is.

    Source: mdistiller, ``mdistiller/distillers/DKD.py``; Zhao et al., CVPR 2022.
    """
    return WeightedKDLoss(
        1.0, ce_weight, loss="dkd", temperature=temperature, dkd_alpha=alpha, dkd_beta=beta
    )


def deit_distillation(
    base_criterion: Callable[[Tensor, Any], Tensor],
    teacher_model: Callable[[Tensor], Tensor],
    distillation_type: str,
    alpha: float,
    tau: float,
) -> nn.Module:
    """DeiT's ``DistillationLoss``, called ``(inputs, outputs, labels)``.

    ``(1 - alpha) * base_criterion + alpha * distillation``. The mean of ``"soft"`` divides by rows
    **and classes**, so that ``alpha`` weighs the distillation less than it says by the number of
    classes; that is kept. ``outputs`` is the pair of class and distillation logits.

    Args:
        base_criterion: Loss of the class token, called ``(logits, labels)``;
            :func:`timm_label_smoothing_cross_entropy` and its neighbour are fused ones.
        teacher_model: Called with ``inputs``, without gradient; gives the teacher's logits.
            ``torch.nn.Identity()`` where ``inputs`` are these logits already.
        distillation_type: ``"none"``, ``"soft"`` or ``"hard"``.
        alpha: Weight of the distillation, in 0 to 1.
        tau: Temperature of ``"soft"``. Positive.

    Raises:
        ValueError: ``distillation_type`` is another, ``alpha`` is not in 0 to 1, or, when called,
            ``outputs`` is no pair.

    Source: Touvron et al., "Training data-efficient image transformers" (ICML 2021); DeiT,
    ``losses.py``.
    """
    return _DeiT(base_criterion, teacher_model, distillation_type, alpha, tau)


def liger_kl_div(reduction: str = "mean", log_target: bool = False) -> nn.Module:
    """Liger-Kernel's ``LigerKLDIVLoss``, called ``(y_pred, y_true)``.

    ``y_pred`` holds log-probabilities, ``y_true`` probabilities, or with ``log_target``
    log-probabilities; rows must sum to 1 (others are normalised). The gradient is the one through
    a softmax, ``q - p`` where Liger's is ``-p``: the same once it has passed the ``log_softmax``
    that made ``y_pred``. Best is no ``log_softmax`` at all: with ``log_target`` both may be raw
    logits, divided by the temperature.

    Args:
        reduction: ``"batchmean"``, ``"sum"``, or ``"mean"``, which divides by rows and classes.
        log_target: Whether ``y_true`` holds logarithms.

    Raises:
        ValueError: ``reduction`` is another: ``"none"`` is a loss an element there.

    Source: Liger-Kernel 0.8.5, ``liger_kernel/transformers/kl_div.py``. Its ``eps``, a floor under
    ``y_true`` inside the logarithm, is not needed: probability 0 contributes 0.
    """
    return _LigerKLDiv(reduction, log_target)


def liger_jsd(beta: float = 0.5, ignore_index: int = -100) -> nn.Module:
    """Liger-Kernel's ``LigerJSD``, called ``(log_q, log_p, shift_labels=None)``.

    ``beta * KL(p || m) + (1 - beta) * KL(q || m)`` with ``m = beta * p + (1 - beta) * q``, as in
    :func:`fastscarce.ops.kd_loss`, but with ``KL(p || q)`` at 0 and ``KL(q || p)`` at 1; ``q`` is
    the student. A mean over the rows whose label is not ``ignore_index``. Both arguments may be
    logits; the gradient differs as in :func:`liger_kl_div`.

    Args:
        beta: Share of the teacher in the mixture, in 0 to 1.
        ignore_index: A row with this label is left out.

    Raises:
        ValueError: ``beta`` is not in 0 to 1.

    Source: Liger-Kernel 0.8.5, ``liger_kernel/transformers/jsd.py``.
    """
    return _LigerJSD(beta, ignore_index)


class _Torchdistill(nn.Module):
    """Finds the logits as torchdistill does and weighs the terms by its rules."""

    def __init__(
        self,
        paths: tuple[tuple[str, str], tuple[str, str]],
        alpha: float | None,
        beta: float | None,
        reduction: str,
        **options: Any,
    ) -> None:
        super().__init__()
        if reduction not in ("batchmean", "sum", "mean"):
            raise ValueError(
                "torchdistill's KD losses can be mapped with reduction 'batchmean', 'sum' or "
                f"'mean', got {reduction!r}."
            )
        if not 0.0 < options["temperature"] < float("inf"):
            raise ValueError(
                "torchdistill's KD losses need a positive, finite temperature, got "
                f"{options['temperature']}."
            )
        self.student_path, self.teacher_path = paths
        options["reduction"] = "sum" if reduction == "sum" else "mean"
        options["over_classes"] = reduction == "mean"
        # Without targets torchdistill leaves both beta and T**2 out.
        self.alone = WeightedKDLoss(1.0, 0.0, t_squared=False, **options)
        self.both = None
        if alpha:
            self.both = WeightedKDLoss(1.0 - alpha if beta is None else beta, alpha, **options)

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Tensor]],
        teacher_io_dict: Mapping[str, Mapping[str, Tensor]],
        targets: Tensor | MixedTarget | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """The loss of a batch."""
        student = student_io_dict[self.student_path[0]][self.student_path[1]]
        teacher = teacher_io_dict[self.teacher_path[0]][self.teacher_path[1]]
        loss: Tensor
        if self.both is None or targets is None:
            loss = self.alone(student, teacher)
        else:
            loss = self.both(student, teacher, targets)
        return loss


class _DeiT(nn.Module):
    """Runs the teacher without gradient, then the two losses of the pair."""

    def __init__(
        self,
        base_criterion: Callable[[Tensor, Any], Tensor],
        teacher_model: Callable[[Tensor], Tensor],
        distillation_type: str,
        alpha: float,
        tau: float,
    ) -> None:
        super().__init__()
        if distillation_type not in ("none", "soft", "hard"):
            raise ValueError(
                "deit_distillation needs distillation_type 'none', 'soft' or 'hard', got "
                f"{distillation_type!r}."
            )
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"deit_distillation needs alpha in 0 to 1, got {alpha}.")
        self.teacher_model = teacher_model
        self.distillation_type = distillation_type
        self.pair = TokenDistillationLoss(
            alpha,
            1.0 - alpha,
            kind="hard" if distillation_type == "hard" else "soft",
            temperature=tau,
            over_classes=True,
            criterion=base_criterion,
        )

    def forward(
        self, inputs: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Any
    ) -> Tensor:
        """The loss of a batch."""
        loss: Tensor
        if self.distillation_type == "none":
            loss = self.pair.criterion(
                outputs if isinstance(outputs, Tensor) else outputs[0], labels
            )
            return loss
        if isinstance(outputs, Tensor):
            raise ValueError(
                "deit_distillation needs outputs of a pair, class and distillation logits, got "
                f"one tensor of shape {tuple(outputs.shape)}."
            )
        with torch.no_grad():
            teacher = self.teacher_model(inputs)
        loss = self.pair(outputs, teacher, labels)
        return loss


class _LigerKLDiv(nn.Module):
    """Takes log-probabilities for logits: a softmax gives the probabilities back."""

    def __init__(self, reduction: str, log_target: bool) -> None:
        super().__init__()
        if reduction not in ("batchmean", "sum", "mean"):
            raise ValueError(
                "liger_kl_div needs reduction 'batchmean', 'sum' or 'mean', got "
                f"{reduction!r}; kd_loss(reduction='none') gives a loss a row."
            )
        self.reduction = reduction
        self.log_target = log_target

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss of a batch."""
        teacher = y_true if self.log_target else y_true.log()
        loss = kd_loss(y_pred, teacher, reduction="sum" if self.reduction == "sum" else "mean")
        return loss / y_pred.shape[1] if self.reduction == "mean" else loss


class _LigerJSD(nn.Module):
    """Forward and reverse KL at the ends of ``beta``; ignored rows get weight 0."""

    def __init__(self, beta: float, ignore_index: int) -> None:
        super().__init__()
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"liger_jsd needs beta in 0 to 1, got {beta}.")
        self.loss = {0.0: "kl", 1.0: "reverse_kl"}.get(beta, "jsd")
        self.beta = beta if self.loss == "jsd" else 0.5
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """The loss of a batch."""
        weight = None
        if shift_labels is not None:
            weight = (shift_labels != self.ignore_index).to(torch.float32)
        return kd_loss(log_q, log_p, loss=self.loss, beta=self.beta, weight=weight)
