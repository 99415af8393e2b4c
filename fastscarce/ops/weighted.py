"""Losses of two terms whose weights are free: what other libraries' conventions come down to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastscarce.ops.kd import kd_loss
from fastscarce.ops.modules import KDLoss
from fastscarce.ops.statistics import RowStatistics
from fastscarce.ops.targets import MixedTarget, MixedTopK, TopK

__all__ = ["CrossEntropyLoss", "TokenDistillationLoss", "WeightedKDLoss"]


class CrossEntropyLoss(nn.Module):
    """Cross entropy alone, called ``(logits, target)``; a mean over labelled rows.

    Args:
        label_smoothing: Share of the label spread evenly over all classes, in 0 to 1.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, student: Tensor, target: Tensor | MixedTarget) -> Tensor:
        """The loss of a batch; shapes, dtypes and errors as in :func:`fastscarce.ops.kd_loss`."""
        return kd_loss(student, None, target, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"label_smoothing={self.label_smoothing}"


class WeightedKDLoss(KDLoss):
    """``distil_weight * T**2 * D(p, q) + label_weight * CE``: :class:`KDLoss`, weights by name.

    Without ``target`` or ``teacher`` the other term is left, with its weight. The weights are
    attributes too and may be changed between calls (a warm-up).

    Args:
        distil_weight: Weight of the distillation term, not negative.
        label_weight: Weight of the cross entropy, not negative.
        over_classes: The distillation term is divided by the number of classes, as
            ``torch.nn.KLDivLoss(reduction="mean")`` does.
        options: Those of :class:`KDLoss`, without ``alpha``.

    Raises:
        ValueError: A weight is negative or not finite, or both are 0.
    """

    def __init__(
        self,
        distil_weight: float,
        label_weight: float,
        *,
        over_classes: bool = False,
        **options: Any,
    ) -> None:
        _check_weights(distil_weight, label_weight)
        super().__init__(**options)
        self.distil_weight = distil_weight
        self.label_weight = label_weight
        self.over_classes = over_classes

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | TopK | MixedTopK | None,
        target: Tensor | MixedTarget | None = None,
        weight: Tensor | None = None,
        **memory: Any,
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of a batch; shapes, dtypes and errors as in :func:`fastscarce.ops.kd_loss`."""
        distil, label = self.distil_weight, self.label_weight
        _check_weights(distil, label)
        self.alpha = (distil / student.shape[-1] if self.over_classes else distil, label)
        # A term of weight 0 is not computed; DKD needs the target all the same.
        if target is not None and label == 0 and teacher is not None and self.loss != "dkd":
            target = None
        elif target is not None and distil == 0 and not self._asks_teacher(memory):
            teacher = None
        return super().forward(student, teacher, target, weight, **memory)

    def _asks_teacher(self, memory: dict[str, Any]) -> bool:
        """Whether a teacher is wanted for more than its term."""
        return bool(self.statistics or memory.get("reuse_teacher_buffer"))

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"{self.loss!r}, distil_weight={self.distil_weight}, "
            f"label_weight={self.label_weight}, temperature={self.temperature}"
        )


class TokenDistillationLoss(nn.Module):
    """Label loss of a class token and distillation of a distillation token.

    Called ``((class_logits, distillation_logits), teacher, target)``, each ``(rows, classes)``.

    Args:
        distil_weight: Weight of the distillation, not negative.
        label_weight: Weight of the label loss, not negative.
        kind: ``"soft"`` (``T**2 * KL``, a mean over rows) or ``"hard"`` (cross entropy with the
            teacher's first class).
        temperature: ``T`` of ``"soft"``. Positive.
        over_classes: ``"soft"`` is divided by the number of classes too, as in DeiT.
        criterion: Label loss, called ``(class_logits, target)``. None: cross entropy.

    Raises:
        ValueError: Another ``kind``; a weight is negative, or both are 0.
    """

    def __init__(
        self,
        distil_weight: float,
        label_weight: float,
        *,
        kind: str = "soft",
        temperature: float = 1.0,
        over_classes: bool = False,
        criterion: Callable[[Tensor, Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        _check_weights(distil_weight, label_weight)
        if kind not in ("soft", "hard"):
            raise ValueError(f"TokenDistillationLoss needs kind 'soft' or 'hard', got {kind!r}.")
        self.distil_weight = distil_weight
        self.label_weight = label_weight
        self.kind = kind
        self.temperature = temperature
        self.over_classes = over_classes
        self.criterion = CrossEntropyLoss() if criterion is None else criterion

    def forward(self, outputs: tuple[Tensor, Tensor], teacher: Tensor, target: Any) -> Tensor:
        """The loss of a batch."""
        class_logits, distillation_logits = outputs
        weight = self.distil_weight
        if self.kind == "hard":
            distillation = kd_loss(distillation_logits, None, teacher.argmax(1))
        else:
            distillation = kd_loss(distillation_logits, teacher, temperature=self.temperature)
            if self.over_classes:
                weight = weight / distillation_logits.shape[1]
        label: Tensor = self.criterion(class_logits, target)
        return self.label_weight * label + weight * distillation


def _check_weights(distil: float, label: float) -> None:
    if not (0.0 <= distil < float("inf") and 0.0 <= label < float("inf") and distil + label > 0.0):
        raise ValueError(
            "A weighted distillation loss needs finite weights of 0 or more, one above 0, got "
            f"{distil} for the distillation and {label} for the label."
        )
