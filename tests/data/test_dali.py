"""The DALI loader gives the PyTorch loader's batches, of good images and of odd and broken ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastscarce.data import Loader, LoaderBatch, Sampler, Source, open_source
from fastscarce.errors import ConfigError, DataError

pytest.importorskip("nvidia.dali")


def loaders(source: Source, **options: Any) -> list[Loader]:
    result = []
    for backend in ("torch", "dali"):
        sampler = Sampler(source.ids, seed=4, batch_size=8, pairs=True)
        settings: dict[str, Any] = {"image_size": 32, "workers": 0, "policy": "standard+cutmix"}
        result.append(Loader(source, sampler, backend=backend, **{**settings, **options}))  # type: ignore[arg-type]
    return result


def compare(one: LoaderBatch, other: LoaderBatch) -> None:
    assert one.ids.tolist() == other.ids.tolist()
    assert one.mask.tolist() == other.mask.tolist()
    assert one.labels.tolist() == other.labels.tolist()
    assert one.failures == other.failures
    assert one.plan is not None
    assert other.plan is not None
    assert np.array_equal(one.plan.table, other.plan.table)
    difference = (one.images.float() - other.images.float()).abs()
    assert float(difference.mean()) < 0.5
    assert float(difference.max()) <= 8


def test_the_same_batches_over_epochs_and_after_a_resume(source: Source) -> None:
    one, other = loaders(source)
    for _ in range(2):
        pairs = list(zip(one, other, strict=True))
        assert len(pairs) == 3
        for batches in pairs:
            compare(*batches)
    for loader in (one, other):
        loader.load_state_dict({"seed": 4, "epoch": 0, "position": 8})
    for batches in zip(one, other, strict=True):
        compare(*batches)
    assert one.state_dict() == other.state_dict() == {"seed": 4, "epoch": 1, "position": 0}


def test_grey_images(source: Source) -> None:
    for batches in zip(*loaders(source, channels=1), strict=True):
        assert batches[1].images.shape == (8, 32, 32, 1)
        compare(*batches)


@pytest.fixture
def odd(broken: Callable[[], Source], tmp_path: Path) -> Source:
    """A JPEG cut short, one whose data is nonsense, CMYK, turned, a PNG with alpha, a text."""
    root = tmp_path / "broken"
    path = root / "beach" / "0.jpg"
    content = path.read_bytes()
    start = content.index(b"\xff\xda") + 14
    path.write_bytes(content[:start] + b"\xff\xc4" + content[start + 2 :])
    path = root / "beach" / "2.jpg"
    content = path.read_bytes()
    table = content.index(b"\xff\xc4") + 5  # how many codes of each length: too many
    path.write_bytes(content[:table] + b"\xff" * 16 + content[table + 16 :])
    with Image.open(root / "beach" / "1.jpg") as image:
        image.load()
    image.convert("CMYK").save(root / "forest" / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(root / "forest" / "turned.jpg", exif=exif)
    image.save(root / "forest" / "progressive.jpg", progressive=True)
    image.convert("RGBA").save(root / "forest" / "alpha.png")
    image.save(root / "forest" / "plain.png")
    (root / "forest" / "text.jpg").write_text("no image")
    return open_source(f"folder:{root}")


@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_odd_and_broken_images(odd: Source, on_error: str) -> None:
    one, other = loaders(odd, on_error=on_error)
    for batches in zip(one, other, strict=True):
        compare(*batches)
    assert one.failures == other.failures
    names = {failure.name for failure in one.failures.values()}
    assert names == {"beach/0.jpg", "beach/2.jpg", "city/3.jpg", "forest/text.jpg"}


def test_a_broken_image_is_named(odd: Source) -> None:
    messages = []
    for loader in loaders(odd):
        with pytest.raises(DataError, match="can't be decoded") as caught:
            list(loader)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_arrays_need_no_decoder() -> None:
    digits = open_source("digits")
    for batches in zip(*loaders(digits, image_size=8, channels=1), strict=True):
        compare(*batches)


def test_without_dali_the_extra_is_named(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match=r"pip install fastscarce\[dali\]"):
        loaders(source)


def test_large_jpegs_that_are_shrunk_much(tmp_path: Path) -> None:
    from sklearn.datasets import load_sample_images

    for number, photo in enumerate(load_sample_images().images):
        for kind in ("one", "two"):
            path = tmp_path / kind / f"{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(photo[:400, : 600 - 7 * number]).save(path, quality=90)
    source = open_source(f"folder:{tmp_path}")
    for side in (16, 32, 64):
        one, other = loaders(source, image_size=side)
        for left, right in zip(one, other, strict=True):
            assert left.ids.tolist() == right.ids.tolist()
            difference = (left.images.float() - right.images.float()).abs()
            assert float(difference.mean()) < 1.0
            assert float(difference.max()) <= 16
