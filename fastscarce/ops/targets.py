"""Labels and teachers of rows, in the forms that the losses take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastscarce.ops.tensors import require_tensor

__all__ = ["MixedTarget", "MixedTopK", "TopK"]


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
        for name, value in (("a", a), ("b", b), ("lam", lam)):
            require_tensor("MixedTarget", name, value)
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


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher's ``k`` largest probabilities a row, at T = 1, and one number for all the others.

    Args:
        indices: Classes, int32, shape ``(rows, k)``, each once in a row.
        log_probs: Their log-probabilities, floating point, ``(rows, k)``; -inf for a probability
            of 0.
        log_tail: Logarithm of the mean probability of the other classes, floating point,
            ``(rows,)``; -inf where they have none, or where there are none.

    Raises:
        ValueError: Dtypes, shapes or devices are others.
    """

    indices: Tensor
    log_probs: Tensor
    log_tail: Tensor

    def __post_init__(self) -> None:
        indices, log_probs, log_tail = self.indices, self.log_probs, self.log_tail
        for name, value in (
            ("indices", indices), ("log_probs", log_probs), ("log_tail", log_tail)
        ):  # fmt: skip
            require_tensor("TopK", name, value)
        floats = log_probs.is_floating_point() and log_tail.is_floating_point()
        if indices.dtype != torch.int32 or not floats:
            raise ValueError(
                "TopK needs indices in int32, log_probs and log_tail in floating point, got "
                f"{indices.dtype}, {log_probs.dtype} and {log_tail.dtype}."
            )
        if (
            indices.dim() != 2
            or indices.shape[1] == 0
            or indices.shape != log_probs.shape
            or log_tail.shape != indices.shape[:1]
        ):
            raise ValueError(
                "TopK needs indices and log_probs of shape (rows, k), k at least 1, and log_tail "
                f"of shape (rows,), got {tuple(indices.shape)}, {tuple(log_probs.shape)} and "
                f"{tuple(log_tail.shape)}."
            )
        if indices.device != log_probs.device or indices.device != log_tail.device:
            raise ValueError(
                "TopK needs indices, log_probs and log_tail on one device, got "
                f"{indices.device}, {log_probs.device} and {log_tail.device}."
            )

    def __len__(self) -> int:
        return self.indices.shape[0]

    @property
    def k(self) -> int:
        """Classes kept a row."""
        return self.indices.shape[1]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TopK:
        """The same teacher on ``device``."""
        return TopK(
            self.indices.to(device, non_blocking=non_blocking),
            self.log_probs.to(device, non_blocking=non_blocking),
            self.log_tail.to(device, non_blocking=non_blocking),
        )

    def dense(self, classes: int) -> Tensor:
        """Log-probabilities of all classes, ``(rows, classes)``; the others share their mean.

        For looking at; the losses take the :class:`TopK` as it is.
        """
        out = self.log_tail[:, None].expand(-1, classes).to(self.log_probs.dtype)
        return out.scatter(1, self.indices.long(), self.log_probs)


@dataclass(frozen=True, eq=False)
class MixedTopK:
    """Teachers of mixed images: ``lam`` of what ``a`` says and ``1 - lam`` of what ``b`` says.

    The loss is then the cross entropy with the mixture (its entropy is left out; the gradient is
    that of the divergence), and no union of their classes is made.

    Args:
        a: Teacher of the first images.
        b: Teacher of the second images, as many rows; ``k`` may differ.
        lam: Weights of ``a``, in 0 to 1, float32, shape ``(rows,)``.

    Raises:
        ValueError: Rows, dtypes or devices do not fit.
    """

    a: TopK
    b: TopK
    lam: Tensor

    def __post_init__(self) -> None:
        a, b, lam = self.a, self.b, self.lam
        require_tensor("MixedTopK", "lam", lam)
        for name, one in (("a", a), ("b", b)):
            if not isinstance(one, TopK):
                raise ValueError(f"MixedTopK needs {name} as a TopK, got {type(one).__name__}.")
        if len(a) != len(b) or lam.shape != a.log_tail.shape or lam.dtype != torch.float32:
            raise ValueError(
                f"MixedTopK needs two TopK of as many rows and float32 lam of shape ({len(a)},), "
                f"got {len(a)} and {len(b)} rows and lam {lam.dtype} {tuple(lam.shape)}."
            )
        if a.indices.device != b.indices.device or a.indices.device != lam.device:
            raise ValueError(
                "MixedTopK needs a, b and lam on one device, got "
                f"{a.indices.device}, {b.indices.device} and {lam.device}."
            )

    def __len__(self) -> int:
        return len(self.a)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MixedTopK:
        """The same teachers on ``device``."""
        return MixedTopK(
            self.a.to(device, non_blocking=non_blocking),
            self.b.to(device, non_blocking=non_blocking),
            self.lam.to(device, non_blocking=non_blocking),
        )
