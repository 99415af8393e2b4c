"""Which images a table is of, and the parts of its fingerprint that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastscarce.augment import Policy, get_policy
from fastscarce.cache.fingerprint import Content, of_data, of_transform

__all__ = ["Samples", "expectation"]

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """Which images a table is of.

    Args:
        images: The pool they are in, uint8 ``(n, height, width, channels)``, on the teacher's
            device.
        ids: Of the samples, int64 ``(rows,)``, each once.
        positions: Place of each in the pool, int64 ``(rows,)``.
        labels: int64 ``(rows,)``, negative where there is none; for the quality alone.
        class_names: In the order of the classes.
    """

    images: Tensor
    ids: Ids
    positions: Ids
    labels: Ids
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("ids", "positions", "labels"):
            given = np.asarray(getattr(self, name))
            if given.dtype.kind not in "iu":
                raise ValueError(f"Samples needs {name} as whole numbers, got {given.dtype}.")
            object.__setattr__(self, name, given.astype(np.int64, copy=False))
        rows = len(self.ids)
        if not rows or len(np.unique(self.ids)) != rows:
            raise ValueError(f"Samples needs one id or more, each once, got {rows} ids.")
        if len(self.positions) != rows or len(self.labels) != rows:
            raise ValueError(
                f"Samples needs {rows} positions and labels, got {len(self.positions)} and "
                f"{len(self.labels)}."
            )
        if self.positions.min() < 0 or self.positions.max() >= len(self.images):
            raise ValueError(
                f"Samples needs positions from 0 to {len(self.images) - 1} in the pool of images, "
                f"got {self.positions.min()} to {self.positions.max()}."
            )

    def sorted(self) -> Samples:
        """The same, lowest id first."""
        order = np.argsort(self.ids)
        return replace(
            self, ids=self.ids[order], positions=self.positions[order], labels=self.labels[order]
        )

    def without_labels(self) -> Samples:
        """The same, nobody knowing what they show."""
        return replace(self, labels=np.full_like(self.labels, -1))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return int(self.images.shape[1]), int(self.images.shape[2])


def expectation(samples: Samples, policy: str | Policy, seed: int) -> Content:
    """The parts of a fingerprint that a student knows: ``transform`` and ``data``."""
    chosen = samples.sorted()
    return {
        "transform": of_transform(get_policy(policy), seed, samples.size, chosen.ids),
        "data": of_data(chosen.ids, samples.images, chosen.positions, samples.class_names),
    }
