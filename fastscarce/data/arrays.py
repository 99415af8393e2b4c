"""Images that are arrays already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastscarce.data.source import Positions

__all__ = ["ArrayReader"]


@dataclass(frozen=True)
class ArrayReader:
    """Gives rows of an array.

    Attributes:
        images: uint8 ``(n, height, width, channels)``.
    """

    images: npt.NDArray[np.uint8]

    def read(self, positions: Positions) -> npt.NDArray[np.uint8]:
        """The rows, copied."""
        return self.images[positions]
