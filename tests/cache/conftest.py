"""A small teacher and the digits, for every test of the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastscarce.cache import Built, Samples, Teacher, build
from fastscarce.data import load

SETTINGS: dict[str, Any] = {
    "policy": "standard",
    "views": 2,
    "seed": 5,
    "k": 5,
    "batch_size": 32,
    "rows_per_shard": 74,  # a file is closed after 64
}
Make = Callable[..., Built]


class Linear(nn.Module):
    """Ten logits of an 8x8 image; counts the rows that it was asked about."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer = nn.Linear(64, 10)
            nn.init.normal_(self.layer.weight)
        self.asked = 0

    def forward(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        logits: Tensor = self.layer(images.flatten(1))
        return logits


@pytest.fixture(scope="session")
def samples() -> Samples:
    """150 digits, not in the order of their ids."""
    images = load("digits")
    positions = np.arange(0, 300, 2)[::-1].copy()
    return Samples(
        torch.from_numpy(images.images),
        images.ids[positions],
        positions,
        images.labels[positions],
        images.classes,
    )


@pytest.fixture
def network() -> Linear:
    return Linear()


@pytest.fixture
def make(samples: Samples) -> Make:
    """``make(folder, k=3)`` builds a table of two views of the 150 digits."""

    def made(folder: Path, teacher: Any = None, of: Samples = samples, **changed: Any) -> Built:
        asked = Teacher.of(Linear() if teacher is None else teacher)
        return build(asked, of, folder, **{**SETTINGS, **changed})

    return made
