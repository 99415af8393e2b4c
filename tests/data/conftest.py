"""A few tiny images, and the same in every kind of file."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Scan = tuple[str, bytes, int]
Member = tuple[str, bytes]


def encode(level: int, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), level).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def scans() -> list[Scan]:
    """Name, encoded image and label: level 20 i, label i modulo 3."""
    return [(f"{number}.png", encode(20 * number), number % 3) for number in range(12)]


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Sequence[Member]], Path]:
    def write(path: Path, members: Sequence[Member]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as shard:
            for name, content in members:
                facts = tarfile.TarInfo(name)
                facts.size = len(content)
                shard.addfile(facts, io.BytesIO(content))
        return path

    return write


@pytest.fixture(scope="session")
def levels() -> np.ndarray:
    """What `scans` decode to, a level an image."""
    return np.arange(12) * 20
