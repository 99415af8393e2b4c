"""Labels of rows, in the forms that the losses take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MixedTarget"]


@dataclass(frozen=True, eq=False)
class MixedTarget:
    """Two-hot labels of mixed images: ``lam`` of class ``a`` and ``1 - lam`` of class ``b``.

    Takes 20 bytes a row where a dense label takes four a class. A half whose index is the loss's
    ``ignore_index`` is left out.

    Args:
        a: First classes, int64, shape ``(rows,)``.
        b: Second classes, int64, shape ``(rows,)``.
        lam: Weights of ``a``, in 0 to 1, float32, shape ``(rows,)``.

    Raises:
        ValueError: Dtypes, shapes or devices are others.

    Source: Zhang et al., "mixup" (ICLR 2018); Yun et al., "CutMix" (ICCV 2019).
    """

    a: Tensor
    b: Tensor
    lam: Tensor

    def __post_init__(self) -> None:
        a, b, lam = self.a, self.b, self.lam
        if a.dtype != torch.int64 or b.dtype != torch.int64 or lam.dtype != torch.float32:
            raise ValueError(
                "MixedTarget needs a and b in int64 and lam in float32, got "
                f"{a.dtype}, {b.dtype} and {lam.dtype}."
            )
        if a.dim() != 1 or a.shape != b.shape or a.shape != lam.shape:
            raise ValueError(
                "MixedTarget needs a, b and lam of one shape, (rows,), got "
                f"{tuple(a.shape)}, {tuple(b.shape)} and {tuple(lam.shape)}."
            )
        if a.device != b.device or a.device != lam.device:
            raise ValueError(
                "MixedTarget needs a, b and lam on one device, got "
                f"{a.device}, {b.device} and {lam.device}."
            )

    def __len__(self) -> int:
        return self.a.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MixedTarget:
        """The same labels on ``device``."""
        return MixedTarget(
            self.a.to(device, non_blocking=non_blocking),
            self.b.to(device, non_blocking=non_blocking),
            self.lam.to(device, non_blocking=non_blocking),
        )

    def dense(self, classes: int) -> Tensor:
        """The labels as float32 ``(rows, classes)``; a half with a negative index is left out."""
        out = self.lam.new_zeros((len(self), classes))
        for index, share in ((self.a, self.lam), (self.b, 1 - self.lam)):
            valid = index >= 0
            part = torch.where(valid, share, torch.zeros_like(share))
            out.scatter_add_(1, index.clamp(min=0)[:, None], part[:, None])
        return out
