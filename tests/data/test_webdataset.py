from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from fastscarce.data import Failure, Loader, Sampler, load, open_source
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
    source, late = (open_source(f"webdataset:{path}") for _ in range(2))
    source.read_each([0])
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DataError, match=r"a\.tar is no plain tar file"):
        open_source(f"webdataset:{path}")
    last = source.read_each([0, 11])[1]
    assert isinstance(last, Failure)
    assert "ends before the sample does: 0 of" in last.reason
    first = late.read_each([0])[0]
    assert isinstance(first, Failure)
    assert "has changed since the data was opened; open it again" in first.reason


@pytest.mark.parametrize("workers", [0, 2])
def test_more_shards_than_files_are_kept_open(
    tmp_path: Path, scans: list[Any], write_tar: Any, workers: int
) -> None:
    for number in range(600):
        inside = [(f"{number}.png", scans[number % 3][1]), (f"{number}.cls", b"a")]
        write_tar(tmp_path / f"{number:03}.tar", inside)
    source = open_source(f"webdataset:{tmp_path}")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 500, limits[1]))
    try:
        sampler = Sampler(source.ids, seed=0, batch_size=20)
        with Loader(source, sampler, image_size=8, channels=1, workers=workers) as loader:
            for _ in range(2):
                ids = torch.cat([batch.ids for batch in loader])
                assert sorted(ids.tolist()) == sorted(source.ids.tolist())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_shard_without_its_end_or_with_more_after_it(
    tmp_path: Path, scans: list[Any], write_tar: Any
) -> None:
    """Where tarfile stops in silence, samples would be missing in silence."""
    path = write_tar(tmp_path / "a.tar", members(scans))
    whole = path.read_bytes()
    with tarfile.open(path) as shard:
        headers = [member.offset for member in shard.getmembers()]
    damaged = bytearray(whole)
    damaged[headers[7] + 20] ^= 1
    for content, message in (
        (bytes(damaged), f"is cut short or damaged at byte {headers[7]}"),
        (whole[: headers[9]], f"is cut short or damaged at byte {headers[9]}"),
        (whole + whole, r"goes on after its end, as tar files do that were joined"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_source(f"webdataset:{path}")


def test_what_is_no_range_of_bytes_is_refused(tmp_path: Path, scans: list[Any]) -> None:
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        with tarfile.open(tmp_path / "a.tar", "w") as shard:
            for name in ("1.png", "2.png"):
                facts = tarfile.TarInfo(name)
                facts.size = len(scans[0][1])
                shard.addfile(facts, io.BytesIO(scans[0][1]))
            link = tarfile.TarInfo("3.png")
            link.type, link.linkname = kind, "1.png"
            shard.addfile(link)
        with pytest.raises(DataError, match=r"a\.tar, 3\.png is a link or a device.*--dereference"):
            open_source(f"webdataset:{tmp_path / 'a.tar'}")


def test_labels_that_are_none(tmp_path: Path, scans: list[Any], write_tar: Any) -> None:
    for content, message in (
        (b'{"kind": [1, 2]}', "kind has several values"),
        (b'{"kind": ' + b"[" * 100_000, "is no label"),
    ):
        path = write_tar(tmp_path / "a.tar", [("1.png", scans[0][1]), ("1.json", content)])
        with pytest.raises(DataError, match=message):
            open_source(f"webdataset:{path}", label_key="json.kind")


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
