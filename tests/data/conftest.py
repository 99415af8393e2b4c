"""Folders of small photographs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastscarce.data import Source, open_source

CLASSES = ("beach", "city", "forest")


def write_photographs(root: Path, count: int) -> None:
    """JPEGs that are smooth, as photographs are, and all different: ``count`` a class."""
    draw = np.random.Generator(np.random.Philox(count))
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for number in range(count):
            small = draw.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize((60, 45 + number), Image.Resampling.BICUBIC)
            image.save(root / name / f"{number}.jpg", quality=95)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-one JPEGs of three classes, 60 wide and 45 to 51 high."""
    root = tmp_path_factory.mktemp("data") / "photographs"
    write_photographs(root, 7)
    return root


@pytest.fixture(scope="session")
def source(photographs: Path) -> Source:
    return open_source(f"folder:{photographs}")


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[], Source]:
    """The same, but for one image of the second class that is cut short."""
    root = tmp_path / "broken"
    write_photographs(root, 7)
    path = root / CLASSES[1] / "3.jpg"
    path.write_bytes(path.read_bytes()[:400])
    return lambda: open_source(f"folder:{root}")
