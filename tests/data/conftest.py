"""A few tiny images, and the same in every kind of file; folders of small photographs."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
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
