"""Means over a data set that several processes share out: each sample counts once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Tally"]


class Tally:
    """Adds up numbers of rows, padding left out, and gives their mean over all processes.

    Args:
        device: Where the sums are kept; that of the process group's backend.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, values: Tensor, mask: Tensor) -> None:
        """Count rows.

        Args:
            values: A number a row, ``(rows,)``: whether it was right, its loss.
            mask: Whether a row counts, bool ``(rows,)``, as a batch of `Loader` has it.

        Raises:
            ValueError: There isn't one value and one mask a row.
        """
        if values.ndim != 1 or mask.shape != values.shape or mask.dtype != torch.bool:
            raise ValueError(
                "Tally needs a value and a bool mask a row, (rows,), got"
                f" {tuple(values.shape)} and {mask.dtype} {tuple(mask.shape)}."
            )
        counted = values.detach().to(self._sums)[mask.to(self._sums.device)]
        self._sums += torch.stack((counted.sum(), counted.new_tensor(float(counted.numel()))))

    def total(self) -> tuple[float, int]:
        """Sum and number of the rows of all processes, the same in each; all must call it."""
        sums = self._sums.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return float(sums[0]), int(sums[1])

    def mean(self) -> float:
        """Mean over the rows of all processes; not a number where there are none."""
        total, count = self.total()
        return total / count if count else float("nan")
