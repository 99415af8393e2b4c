from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from fastscarce.data import Failure, load, open_source
from fastscarce.errors import DataError


def members(scans: list[Any], folder: str = "set") -> list[tuple[str, bytes]]:
    found = []
    for name, content, label in scans:
        stem = f"{folder}/{name.removesuffix('.png')}"
        found += [
            (f"{stem}.png", content),
            (f"{stem}.cls", b"%d\n" % label),
            (f"{stem}.json", json.dumps({"about": {"kind": f"k{label}"}}).encode()),
            (f"{stem}.mask.png", b"another picture"),
        ]
    return found


def test_shards(tmp_path: Path, scans: list[Any], levels: np.ndarray, write_tar: Any) -> None:
    write_tar(tmp_path / "a-000.tar", members(scans[:5]))
    write_tar(tmp_path / "a-001.tar", members(scans[5:]))
    (tmp_path / "a-000.tar.txt").write_text("no shard", encoding="utf-8")
    pool = load(f"webdataset:{tmp_path}/a-{{000..001}}.tar")
    assert pool.classes == ("0", "1", "2")
    assert pool.labels.tolist() == [label for *_, label in scans]
    assert pool.images[:, 0, 0, 0].tolist() == levels.tolist()
    source = pickle.loads(pickle.dumps(open_source(f"webdataset:{tmp_path}")))
    assert source.name_of(6) == "set/6"
    assert source.read([6, 1]) == [scans[6][1], scans[1][1]]
    again = open_source(f"webdataset:{tmp_path}", label_key="JSON.about.kind", image_key="PNG")
    assert again.classes == ("k0", "k1", "k2")
    assert again.ids.tolist() == source.ids.tolist()


def test_ids_stay_where_samples_move(tmp_path: Path, scans: list[Any], write_tar: Any) -> None:
    write_tar(tmp_path / "one" / "a.tar", members(scans))
    write_tar(tmp_path / "two" / "b.tar", members(scans[7:]))
    write_tar(tmp_path / "two" / "c.tar", members(scans[:7]))
    first, second = (open_source(f"webdataset:{tmp_path / name}") for name in ("one", "two"))
    assert first.fingerprint() == second.fingerprint()


def test_url(scans: list[Any], write_tar: Any, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    shard = write_tar(tmp_path / "a.tar", members(scans)).read_bytes()
    system.pipe("/shards/a-0.tar", shard)
    source = open_source("webdataset:memory://shards/a-*.tar")
    assert source.read([3, 0]) == [scans[3][1], scans[0][1]]
    assert source.labels.tolist() == [label for *_, label in scans]
    system.pipe("/shards/a-0.tar", shard[:1000])
    assert isinstance(source.read_each([3])[0], Failure)
    with pytest.raises(DataError, match="names no file"):
        open_source("webdataset:memory://nowhere/*.tar")
    with pytest.raises(DataError, match="can't be opened"):
        open_source("webdataset:memory://nowhere/a.tar")
    with pytest.raises(DataError, match="can't be opened: Protocol not known"):
        open_source("webdataset:nothing://a.tar")


def test_test_shards_names_and_no_labels(tmp_path: Path, scans: list[Any], write_tar: Any) -> None:
    write_tar(tmp_path / "train" / "0.tar", members(scans[:6], "train"))
    write_tar(tmp_path / "test" / "0.tar", members(scans[6:], "test"))
    bare = [member for member in members(scans, "more") if member[0].endswith(".png")]
    write_tar(tmp_path / "train" / "1.tar", bare)
    (tmp_path / "test" / "classes.txt").write_text("x\ny\nz\n", encoding="utf-8")
    source = open_source(f"webdataset:{tmp_path}")
    assert source.is_test.tolist() == [True] * 6 + [False] * 18
    assert source.labels.tolist()[6:] == [0, 1, 2] * 2 + [-1] * 12
    assert source.classes == ("x", "y", "z")


def test_shortened_shard(tmp_path: Path, scans: list[Any], write_tar: Any) -> None:
    path = write_tar(tmp_path / "a.tar", members(scans))
    source = open_source(f"webdataset:{path}")
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DataError, match=r"a\.tar is no plain tar file"):
        open_source(f"webdataset:{path}")
    last = source.read_each([0, 11])[1]
    assert isinstance(last, Failure)
    assert "ends before the sample does: 0 of" in last.reason


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (lambda tar: gzip.compress(tar), {}, "is no plain tar file .* unpack what is compressed"),
        (lambda tar: b"", {}, "no plain tar file"),
        (lambda tar: tar, {"image_key": "jpg"}, "has no images \\(jpg\\)"),
        (lambda tar: tar, {"label_key": "txt"}, "no labels in members 'txt'"),
        (lambda tar: tar, {"label_key": "json.kind"}, "no labels in members 'json.kind'"),
        (lambda tar: tar, {"label_key": "mask.png"}, None),
        (lambda tar: tar, {"label_key": "cls.x"}, "no labels in members 'cls.x'"),
    ],
)
def test_broken(
    tmp_path: Path, scans: list[Any], write_tar: Any, content: Any, options: Any, message: Any
) -> None:
    path = write_tar(tmp_path / "a.tar", members(scans))
    path.write_bytes(content(path.read_bytes()))
    if message is None:  # a name with a dot in it is an extension too
        assert open_source(f"webdataset:{path}", **options).classes == ("another picture",)
        return
    with pytest.raises(DataError, match=message):
        open_source(f"webdataset:{path}", **options)


def test_one_key_twice(tmp_path: Path, scans: list[Any], write_tar: Any) -> None:
    write_tar(tmp_path / "a.tar", members(scans[:2]) + members(scans[:1]))
    with pytest.raises(DataError, match="two images with one id, set/0 and set/0"):
        open_source(f"webdataset:{tmp_path / 'a.tar'}")
