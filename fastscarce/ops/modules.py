"""The losses as modules, for code that keeps a loss beside its model."""

from __future__ import annotations

from torch import Tensor, nn

from fastscarce.ops.dist import dist_loss
from fastscarce.ops.kd import kd_loss
from fastscarce.ops.statistics import RowStatistics
from fastscarce.ops.targets import MixedTarget, MixedTopK, TopK

__all__ = ["DistLoss", "KDLoss"]


class KDLoss(nn.Module):
    """:func:`fastscarce.ops.kd_loss` with its options kept; same names, defaults and errors.

    The options are attributes and may be changed between calls (a temperature that is annealed);
    ``class_weight`` is a buffer that no checkpoint holds. ``forward(student, teacher, target=None,
    weight=None, *, out=None, reuse_teacher_buffer=False)`` gives the loss, with ``statistics`` the
    loss and :class:`RowStatistics`. No parameters.
    """

    def __init__(
        self,
        loss: str = "kl",
        *,
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
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        gradient: str = "auto",
        statistics: bool = False,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.tail = tail
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.skew = skew
        self.dkd_alpha = dkd_alpha
        self.dkd_beta = dkd_beta
        self.inter = inter
        self.intra = intra
        self.threshold = threshold
        self.t_squared = t_squared
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.gradient = gradient
        self.statistics = statistics

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | TopK | MixedTopK | None,
        target: Tensor | MixedTarget | None = None,
        weight: Tensor | None = None,
        *,
        out: Tensor | None = None,
        reuse_teacher_buffer: bool = False,
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of a batch; shapes and dtypes as in :func:`fastscarce.ops.kd_loss`."""
        return kd_loss(
            student,
            teacher,
            target,
            weight=weight,
            loss=self.loss,
            tail=self.tail,
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
            skew=self.skew,
            dkd_alpha=self.dkd_alpha,
            dkd_beta=self.dkd_beta,
            inter=self.inter,
            intra=self.intra,
            threshold=self.threshold,
            t_squared=self.t_squared,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            gradient=self.gradient,
            out=out,
            reuse_teacher_buffer=reuse_teacher_buffer,
            statistics=self.statistics,
        )

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.loss!r}, temperature={self.temperature}, alpha={self.alpha}"


class DistLoss(nn.Module):
    """:func:`fastscarce.ops.dist_loss` with its options kept; same names, defaults and errors.

    ``forward(student, teacher)`` gives the loss. No parameters.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        inter: float = 1.0,
        intra: float = 1.0,
        t_squared: bool = True,
        gradient: str = "auto",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.inter = inter
        self.intra = intra
        self.t_squared = t_squared
        self.gradient = gradient

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of a batch; shapes and dtypes as in :func:`fastscarce.ops.dist_loss`."""
        return dist_loss(
            student,
            teacher,
            temperature=self.temperature,
            inter=self.inter,
            intra=self.intra,
            t_squared=self.t_squared,
            gradient=self.gradient,
        )

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"temperature={self.temperature}, inter={self.inter}, intra={self.intra}"
