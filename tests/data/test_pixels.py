"""Wherever a data set's pixels lie, they are the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from fastscarce.data import Decoder, ImageSet, OnDemand, Source, load_images, open_source
from fastscarce.data.pixels import map_file
from fastscarce.errors import DataError

STORAGES = ("memory", "disk", "off")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTSCARCE_CACHE", str(folder))
    return folder


def every(images: ImageSet) -> np.ndarray:
    return np.asarray(images.images[np.arange(len(images))])


@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_the_same_images_in_every_storage(broken: Callable[[], Source], on_error: str) -> None:
    source = broken()
    found = [load_images(source, on_error=on_error, storage=storage) for storage in STORAGES]
    found.append(load_images(source, on_error=on_error, storage="disk"))  # as it was kept
    first = found[0]
    assert first.images.shape == (20 if on_error == "skip" else 21, 51, 51, 3)
    for other in found[1:]:
        assert other.images.shape == first.images.shape
        assert np.array_equal(every(other), every(first))
        assert np.array_equal(other.images[3], first.images[3])
        assert np.array_equal(other.ids, first.ids)
        assert np.array_equal(other.labels, first.labels)
        assert other.failures == first.failures
        assert other.fingerprint() == first.fingerprint()
    assert [failure.name for failure in first.failures] == ["city/3.jpg"]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_broken_image_is_named(broken: Callable[[], Source], storage: str) -> None:
    with pytest.raises(DataError, match=r"city/3\.jpg can't be decoded"):
        every(load_images(broken(), storage=storage))  # type: ignore[arg-type]


def test_workers_change_nothing(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = load_images(source, image_size=24)
    monkeypatch.setattr(import_module("fastscarce.data.load"), "_MANY", 1)
    together = load_images(source, image_size=24, decoder=Decoder(workers=1))
    assert np.array_equal(every(alone), every(together))


def test_images_come_ahead_of_their_use(source: Source) -> None:
    images = load_images(source, storage="off", decoder=Decoder(workers=1))
    assert isinstance(images.images, OnDemand)
    whole = every(images)
    batches = [np.array([3, 0, 20]), np.array([5]), np.array([7, 7, 1])]
    coming = images.images.ahead(batches, rows=3, device=torch.device("cpu"))
    for places, found in zip(batches, coming, strict=True):
        assert np.array_equal(found.numpy(), whole[places])


def test_a_file_that_was_tampered_with_is_made_anew(source: Source, cache: Path) -> None:
    whole = every(load_images(source, storage="disk"))
    (file,) = (path for path in cache.rglob("*.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert np.array_equal(every(load_images(source, storage="disk")), whole)
    content[-1] ^= 1
    assert file.read_bytes() == content


def test_one_of_several_fills_a_file(cache: Path) -> None:
    filled: list[int] = []
    barrier = threading.Barrier(4)

    def fill(array: np.ndarray) -> dict[str, int]:
        filled.append(1)
        time.sleep(0.2)  # the others come in the meantime
        array[:] = 7
        return {"fact": 5}

    def look() -> tuple[np.ndarray, dict[str, object]]:
        barrier.wait()
        return map_file("a key", (3, 2, 2, 1), fill)

    with ThreadPoolExecutor(4) as pool:
        found = [one.result() for one in [pool.submit(look) for _ in range(4)]]
    assert filled == [1]
    for array, facts in found:
        assert facts["fact"] == 5
        assert (array == 7).all()


def test_a_change_of_an_image_is_seen(broken: Callable[[], Source], tmp_path: Path) -> None:
    before = load_images(broken(), on_error="skip", storage="disk")
    root = tmp_path / "broken"
    (root / "beach" / "0.jpg").write_bytes((root / "forest" / "6.jpg").read_bytes())
    after = load_images(open_source(f"folder:{root}"), on_error="skip", storage="disk")
    assert np.array_equal(before.ids, after.ids)
    assert not np.array_equal(every(before)[0], every(after)[0])
    assert np.array_equal(every(before)[1:], every(after)[1:])


def test_automatic_storage(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(**options: int) -> type:
        return type(load_images(source, storage="auto", **options).images)  # type: ignore[arg-type]

    assert kind() is np.ndarray
    needed = 21 * 51 * 51 * 3
    module = import_module("fastscarce.data.load")
    monkeypatch.setattr(module, "free_memory", lambda: 4 * needed)
    assert kind() is np.ndarray
    assert kind(processes=3) is np.memmap
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed}))
    assert kind(processes=3) is OnDemand


def test_memory_that_is_too_small_is_said(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("fastscarce.data.images"), "free_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"GiB of memory are free"):
        load_images(source)


def test_a_disk_that_is_too_small_is_said(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match="set pool to off"):
        load_images(source, storage="disk")
