"""Joining shards, comparing tables, rows for other programs, and the teacher asked again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fastscarce.cache import (
    Samples,
    Teacher,
    TeacherTable,
    compact,
    diff,
    export_parquet,
    gc,
    info,
    verify,
)
from fastscarce.cache.journal import read_journal, rewrite_journal
from fastscarce.errors import CacheError


def test_compact_keeps_every_row(make: Any, samples: Samples, tmp_path: Path) -> None:
    for rank in range(3):
        folder = make(tmp_path, rank=rank, world_size=3).folder
    with TeacherTable.open(folder) as table:
        before = [table.records(samples.ids, view)[0] for view in range(2)]
        sentinels = {tuple(entry) for entry in table.sentinels(1)}
    shards = info(folder)["shards"]
    assert compact(folder, rows_per_shard=100) == (shards, 4)
    with TeacherTable.open(folder) as table:
        for view in range(2):
            assert torch.equal(table.records(samples.ids, view)[0], before[view])
        assert {tuple(entry) for entry in table.sentinels(1)} == sentinels
        assert table.missing() == 0
    assert verify(folder).sound
    assert compact(folder) == (4, 2)  # and again
    assert gc(folder) == []
    assert make(tmp_path).written == 0
    assert len(list(folder.rglob("view-*/*"))) == 2
    with pytest.raises(ValueError, match="rows_per_shard of at least 1, got 0"):
        compact(folder, rows_per_shard=0)


def test_compact_loses_nothing_that_is_damaged(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path).folder
    shard = sorted((folder / "view-00001").iterdir())[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-3])
    with pytest.raises(CacheError, match=rf"{shard.name} has {len(content) - 3} bytes where"):
        compact(folder)
    shard.write_bytes(content)  # from a copy, say
    assert verify(folder).rows == 300
    assert compact(folder)[1] == 2
    assert verify(folder).sound


def test_shards_of_a_newer_version_are_kept(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path, views=1).folder
    with monkeypatch.context() as newer:
        newer.setattr("fastscarce.cache.shard.VERSION", 99)
        make(tmp_path, allow_mismatch=["cache.views"])
    before = sorted(folder.rglob("*.safetensors"))
    for _ in range(2):
        with pytest.raises(CacheError, match=r"newer fastscarce .layout 99.*; update fastscarce"):
            gc(folder)
        with pytest.raises(CacheError, match=r"newer fastscarce .layout 99.*; update fastscarce"):
            make(tmp_path, allow_mismatch=["cache.views"])
        assert sorted(folder.rglob("*.safetensors")) == before
        # And those that no line names.
        lines = read_journal(folder / "rank000.journal")
        rewrite_journal(folder / "rank000.journal", [x for x in lines if x.view == 0])


def test_gc_removes_what_no_journal_names(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path).folder
    lost = folder / "view-00000" / "rank000-00099.safetensors"
    half = folder / "view-00000" / ".rank000-00100.safetensors.17.tmp"
    for path in (lost, half):
        path.write_bytes(b"half")
    assert sorted(gc(folder)) == sorted([f"removed {half}", f"removed {lost}"])
    assert verify(folder).sound


def test_diff_says_what_differs_and_by_how_much(make: Any, tmp_path: Path) -> None:
    one, other = make(tmp_path / "a").folder, make(tmp_path / "b", codec="uint8").folder
    same = diff(one, make(tmp_path / "c").folder)
    assert (same.keys, same.shared, same.equal, same.flips) == ([], 300, 300, 0)
    assert same.kl == pytest.approx(0.0, abs=1e-9)
    found = diff(one, other)
    assert (found.keys, found.shared, found.equal) == (["cache.codec"], 300, 0)
    assert found.kl is not None
    assert 0.0 < abs(found.kl) < 0.01


def test_parquet_holds_the_rows(make: Any, samples: Samples, tmp_path: Path) -> None:
    folder = make(tmp_path).folder
    out = tmp_path / "rows.parquet"
    assert export_parquet(folder, out) == 300
    content = pq.read_table(out)
    assert content.column_names == ["sample_id", "view", "indices", "log_probs", "log_tail"]
    view = content.filter(content["view"].to_numpy() == 1)
    with TeacherTable.open(folder) as table:
        rows = table.rows(view["sample_id"].to_numpy(), 1)
    assert np.array_equal(np.stack(view["indices"].to_numpy()), rows.indices.numpy())
    assert np.array_equal(np.stack(view["log_probs"].to_numpy()), rows.log_probs.float().numpy())
    assert np.array_equal(view["log_tail"].to_numpy(), rows.log_tail.float().numpy())


def test_deep_asks_the_teacher_again(
    make: Any, samples: Samples, tmp_path: Path, network: Any
) -> None:
    folder = make(tmp_path, network, k=10).folder
    found = verify(folder, deep=50, teacher=Teacher.of(network), samples=samples)
    assert found.deep is not None
    assert (found.deep.rows, found.deep.flips, found.deep.control_flips) == (50, 0, 0)
    assert abs(found.deep.kl) < 1e-3
    assert abs(found.deep.control_kl) < 1e-6
    with torch.no_grad():
        network.layer.weight += 0.3 * torch.randn_like(network.layer.weight)
    with pytest.raises(CacheError, match=r"something else: teacher.tensors.layer.weight differs"):
        verify(folder, deep=50, teacher=Teacher.of(network), samples=samples)
    allow = ("teacher.tensors.layer.weight",)
    changed = verify(
        folder, deep=50, teacher=Teacher.of(network), samples=samples, allow_mismatch=allow
    ).deep
    assert changed is not None
    assert changed.kl > 0.05
    assert changed.flips > 0
    with pytest.raises(ValueError, match="needs a teacher and samples to go deep"):
        verify(folder, deep=1)


def test_a_reader_outlives_the_joining_of_its_shards(
    make: Any, samples: Any, tmp_path: Path
) -> None:
    folder = make(tmp_path).folder
    with TeacherTable.open(folder) as expected, TeacherTable.open(folder) as table:
        rows = expected.records(samples.ids, 1)[0]
        assert compact(folder)[1] == 2
        assert torch.equal(table.records(samples.ids, 1)[0], rows)
        for path in folder.glob("view-*/*.safetensors"):
            path.unlink()
    with TeacherTable.open(folder) as table, pytest.raises(CacheError, match="can't be read"):
        table.records(samples.ids, 1)


def test_the_list_of_samples_is_written_again(make: Any, samples: Any, tmp_path: Path) -> None:
    folder = make(tmp_path).folder
    path = folder / "samples.safetensors"
    for damage in (path.unlink, lambda: path.write_bytes(path.read_bytes() + b"x")):
        content = path.read_bytes()
        damage()
        with TeacherTable.open(folder) as table, pytest.raises(CacheError, match="writes it again"):
            _ = table.ids
        said: list[str] = []
        again = make(tmp_path, say=said.append)
        assert (again.written, again.missing) == (0, 0)
        assert "lost or damaged, and is written again" in said[0]
        assert path.read_bytes() == content


def test_files_of_others_are_let_be(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path).folder
    shards = sorted(folder.glob("view-00000/*.safetensors"))
    shards[0].with_name(f"{shards[0].name}.bak").write_bytes(b"")
    shards[-1].unlink()
    gc(folder)
    assert make(tmp_path).missing == 0
    with (folder / "rank000.journal").open("ab") as journal:
        journal.write(b"[" * 100_000 + b"\n")
    assert any("dropped" in line for line in gc(folder))
    assert make(tmp_path).missing == 0
