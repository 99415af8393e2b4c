from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastscarce.data import folder as folder_module
from fastscarce.data import open_source
from fastscarce.data import table as table_module
from fastscarce.data.index import Index, keep

LONG_AGO = int(time.time()) - 3600


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTSCARCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def age(*paths: Path) -> None:
    """Give files and folders a time of an hour ago, as if they had been there for long."""
    for path in paths:
        os.utime(path, (LONG_AGO, LONG_AGO))


class Counted:
    """Calls a function, and knows how often and with what."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0
        self.positions: list[Any] = []

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        self.positions += arguments[:1]
        return self.function(*arguments)


@dataclasses.dataclass
class Watching:
    """A reader whose reads are counted."""

    inner: Any
    read: Counted

    def stamps(self) -> np.ndarray:
        found: np.ndarray = self.inner.stamps()
        return found


def test_built_once_until_something_changes(tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.write_text("a", encoding="utf-8")
    build = Counted(lambda: Index({"file": np.arange(3)}, {"x": [1]}, [str(watched)]))
    keep("key", build)
    keep("key", build)
    assert build.calls == 2  # too young to be trusted
    age(watched)
    for _ in range(3):
        index = keep("key", build)
        assert index.arrays["file"].tolist() == [0, 1, 2]
        assert index.facts == {"x": [1]}
    assert build.calls == 3
    keep("other key", build)
    watched.write_text("ab", encoding="utf-8")
    age(watched)
    keep("key", build)
    assert build.calls == 5
    watched.unlink()
    keep("key", build)
    assert build.calls == 6


def test_processes_that_open_at_once_build_once(tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.write_text("a", encoding="utf-8")
    age(watched)

    def slow() -> Index:
        time.sleep(0.3)
        return Index({"a": np.zeros(1)}, {}, [str(watched), str(tmp_path / "not there")])

    build = Counted(slow)
    threads = [threading.Thread(target=keep, args=("key", build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.calls == 1
    (tmp_path / "not there").write_text("now it is", encoding="utf-8")
    keep("key", build)
    assert build.calls == 2


def test_a_broken_or_an_unwritable_index_is_built_anew(tmp_path: Path, cache: Path) -> None:
    build = Counted(lambda: Index({"a": np.zeros(1)}, {}, []))
    keep("key", build)
    (kept,) = (cache / "index").glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:-30])
    keep("key", build)
    keep("key", build)
    assert build.calls == 2
    shutil.rmtree(cache / "index")
    (cache / "index").write_text("no folder", encoding="utf-8")
    keep("key", build)
    assert build.calls == 3


def test_a_folder_is_listed_again_when_its_names_change(
    tmp_path: Path, scans: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "set"
    for label in "ab":
        (root / label / "deep").mkdir(parents=True)
        (root / label / "deep" / "0.png").write_bytes(scans[0][1])
    folders = [root, root / "a", root / "b", root / "a" / "deep", root / "b" / "deep"]
    listing = Counted(folder_module._list)
    monkeypatch.setattr(folder_module, "_list", listing)
    age(*folders)
    first = open_source(f"folder:{root}")
    second = open_source(f"folder:{root}")
    assert listing.calls == 1
    assert second.fingerprint() == first.fingerprint()
    assert second.names is not None
    assert list(second.names) == ["a/deep/0.png", "b/deep/0.png"]
    (root / "a" / "deep" / "1.png").write_bytes(scans[1][1])
    age(*folders)
    assert len(open_source(f"folder:{root}")) == 2  # the folder's time was set back
    os.utime(root / "a" / "deep", (LONG_AGO, LONG_AGO + 1))
    assert len(open_source(f"folder:{root}")) == 3
    (root / "b" / "deep" / "0.png").rename(root / "a" / "deep" / "2.png")
    with pytest.raises(folder_module.DataError, match="set/b has no images"):
        open_source(f"folder:{root}")


def test_only_what_changed_is_read_again(tmp_path: Path, scans: list[Any]) -> None:
    root = tmp_path / "set"
    for name, content, label in scans:
        (root / "ab"[label % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[label % 2] / name).write_bytes(content)
        age(root / "ab"[label % 2] / name)
    source = open_source(f"folder:{root}")
    read = Counted(source.reader.read)
    watched = dataclasses.replace(source, reader=Watching(source.reader, read))
    first = watched.fingerprint()
    assert read.calls == 1
    assert watched.fingerprint() == source.fingerprint() == first
    assert read.calls == 1
    path = root / source.name_of(4)
    path.write_bytes(scans[0][1] + b"more")
    second = watched.fingerprint()
    assert second != first
    assert read.positions[-1].tolist() == [4]
    assert watched.fingerprint() == second
    assert len(read.positions) == 3  # too young to be trusted
    age(path)
    assert watched.fingerprint() == watched.fingerprint() == second
    assert len(read.positions) == 4


def test_images_of_a_table_are_unpacked_once(
    tmp_path: Path, scans: list[Any], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    table = pa.table({"image": [content for _, content, _ in scans], "label": [0, 1] * 6})
    pq.write_table(table, tmp_path / "t.parquet")
    age(tmp_path / "t.parquet")
    unpack = Counted(table_module._unpack)
    monkeypatch.setattr(table_module, "_unpack", unpack)
    first = open_source(f"table:{tmp_path / 't.parquet'}")
    assert open_source(f"table:{tmp_path / 't.parquet'}").fingerprint() == first.fingerprint()
    assert unpack.calls == 1
    (blob,) = (cache / "index").glob("*.bin")
    blob.unlink()
    assert open_source(f"table:{tmp_path / 't.parquet'}").fingerprint() == first.fingerprint()
    assert unpack.calls == 2
