"""What is on the disk: damage is seen, versions are refused, nothing is lost."""

from __future__ import annotations

import itertools
import json
import os
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastscarce.cache import Layout, TeacherTable, compact, gc, verify
from fastscarce.cache.checksum import seal, unseal
from fastscarce.cache.journal import journals, read_journal, rewrite_journal
from fastscarce.cache.lookup import Lookup
from fastscarce.cache.manifest import locked
from fastscarce.cache.pipeline import Piece, Pipeline, shard_rows
from fastscarce.cache.shard import ShardWriter
from fastscarce.errors import CacheError, ResultsError


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_every_flipped_bit_is_reported(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path).folder
    assert verify(folder).sound
    draw = np.random.default_rng(0)
    seen = set()
    for path in [*files(folder)[:4], folder / "manifest.json", folder / "rank000.journal"]:
        size = 8 * path.stat().st_size
        # The length and the text of a shard's header, and anywhere in the file.
        for bit in {*draw.integers(0, 8 * 200, 8), *draw.integers(0, size, 8)}:
            flip(path, int(bit))
            if path.name == "manifest.json":  # without it nothing can be said of the rest
                with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
                    verify(folder)
            else:
                assert not verify(folder).sound, (path, bit)
            seen.add(path.suffix)
            flip(path, int(bit))
    assert seen == {".safetensors", ".json", ".journal"}
    assert verify(folder).sound


def test_reading_verifies_a_shard_on_first_use(make: Any, tmp_path: Path, samples: Any) -> None:
    folder = make(tmp_path).folder
    shard = files(folder / "view-00001")[1]
    flip(shard, 8 * shard.stat().st_size - 9)
    for residency in ("device", "mmap"):
        with TeacherTable.open(folder, residency=residency) as table:
            table.rows(samples.ids, 0)
            with pytest.raises(CacheError, match=rf"{shard.name} is damaged: its checksum"):
                table.rows(samples.ids, 1)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut, "bytes where .* were written: it was cut short"),
    "missing": (Path.unlink, "can't be read .No such file"),
    "longer": (lengthen, "cut short or added to"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_said_dropped_and_made_again(
    make: Any, tmp_path: Path, samples: Any, kind: str
) -> None:
    folder = make(tmp_path).folder
    whole = TeacherTable.open(folder).rows(samples.ids, 0)
    damage, message = DAMAGE[kind]
    damage(files(folder / "view-00000")[0])
    with pytest.raises(CacheError, match=message):
        TeacherTable.open(folder).rows(samples.ids, 0)
    assert len(verify(folder).problems) == 1
    if kind == "missing":  # by hand; otherwise the next build drops it on its own
        assert len(gc(folder)) == 1
        assert TeacherTable.open(folder).missing() == 64
        with pytest.raises(CacheError, match="lacks 64 of the 150 rows asked for"):
            TeacherTable.open(folder).rows(samples.ids, 0)
    again = make(tmp_path)
    assert (again.written, again.missing) == (64, 0)
    mended = TeacherTable.open(folder).rows(samples.ids, 0)
    assert torch.equal(mended.log_probs, whole.log_probs)
    assert verify(folder).sound


def test_a_newer_version_is_refused(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path).folder
    path = folder / "manifest.json"
    content = {**unseal(path.read_text()), "version": 99}
    path.write_text(seal(content))
    for use in (TeacherTable.open, verify, gc, compact):
        with pytest.raises(CacheError, match=r"newer fastscarce .layout 99.*update fastscarce"):
            use(folder)


def test_a_folder_without_a_table(make: Any, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="holds no teacher's table; make one with"):
        TeacherTable.open(tmp_path / "nothing")
    make(tmp_path)
    make(tmp_path, k=3)
    with pytest.raises(CacheError, match="holds 2 tables; name one of"):
        TeacherTable.open(tmp_path)


def test_half_a_line_counts_for_nothing(make: Any, tmp_path: Path, samples: Any) -> None:
    folder = make(tmp_path).folder
    path = journals(folder)[0]
    whole, last = path.read_bytes(), read_journal(path)[-1]
    path.write_bytes(whole[:-20])
    assert len(read_journal(path)) == whole.count(b"\n") - 1
    assert verify(folder).problems == [f"{path} ends in half a line"]
    assert TeacherTable.open(folder).missing() == last.rows > 0
    assert make(tmp_path).written == 0  # the shard is there, and is whole
    assert path.read_bytes() == whole
    assert verify(folder).sound
    assert len(TeacherTable.open(folder).rows(samples.ids, 1)) == 150


def without_line(folder: Path, number: int) -> Path:
    """Take a line out of a journal, as if the process had died before it; returns its shard."""
    path = journals(folder)[0]
    lines = read_journal(path)
    lost = lines.pop(number)
    rewrite_journal(path, lines)
    return folder / lost.shard


def test_a_whole_shard_without_a_line_is_adopted(make: Any, tmp_path: Path, network: Any) -> None:
    folder = make(tmp_path).folder
    before = {line.shard: line for line in read_journal(journals(folder)[0])}
    for number in (5, 0):
        without_line(folder, number)
    with locked(folder, "table", shared=True):  # others are writing: one's own are adopted still
        assert make(tmp_path, network).written == 0
    assert network.asked == 0
    assert {line.shard: line for line in read_journal(journals(folder)[0])} == before
    shard = without_line(folder, 3)
    assert gc(folder) == [f"adopted {shard}"]
    assert verify(folder).sound
    # Of other processes than this one, as soon as nobody writes.
    (folder / "rank000.journal").rename(folder / "rank007.journal")
    for path in folder.glob("view-*/*"):
        path.rename(path.with_name(path.name.replace("rank000", "rank007")))
    journals(folder)[0].unlink()
    assert make(tmp_path, network).written == 0
    assert {line.checksum for line in read_journal(folder / "rank007.journal")} == {
        line.checksum for line in before.values()
    }


def test_a_shard_without_a_line_that_is_not_whole_is_dropped(
    make: Any, tmp_path: Path, samples: Any
) -> None:
    folder = make(tmp_path).folder
    expected = TeacherTable.open(folder).records(samples.ids, 0)[0]
    draw = np.random.default_rng(0)
    shard = without_line(folder, 0)
    content = shard.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for bit in [
        *draw.integers(0, 8 * header, 20),
        *draw.integers(8 * header, 8 * len(content), 20),
    ]:
        shard.write_bytes(content)
        flip(shard, int(bit))
        said = gc(folder)
        # A header may change in ways that change nothing it says: blanks, say.
        if said == [f"adopted {shard}"]:
            assert bit < 8 * header
            got = TeacherTable.open(folder).records(samples.ids, 0)[0]
            assert torch.equal(got, expected)
            without_line(folder, len(read_journal(journals(folder)[0])) - 1)
        else:
            assert said == [f"removed {shard}"]
    for changed in (content[:-1], content + b"x", b""):
        shard.write_bytes(changed)
        assert gc(folder) == [f"removed {shard}"]
    # Rows that are there already need no second shard.
    assert make(tmp_path).written == 64
    shard.with_name("rank000-00077.safetensors").write_bytes(content)
    assert len(gc(folder)) == 1
    assert verify(folder).sound


def test_rows_on_their_way_are_no_more_than_a_shard(tmp_path: Path, samples: Any) -> None:
    """The writer is held up: then the teacher waits."""
    layout, most = Layout(10, 5), 64
    rows = samples.sorted()
    writer = ShardWriter(
        tmp_path, layout, fingerprint="f", writer="rank000", rows=shard_rows(most, 16)
    )
    pieces = Pipeline(layout, rows, writer, most)
    add, held, asked = writer.add, threading.Event(), 0

    def slowly(*arguments: Any) -> None:
        held.wait(10)
        add(*arguments)

    writer.add = slowly  # type: ignore[method-assign]

    def ask() -> None:
        nonlocal asked
        for start in range(0, 144, 16):
            pieces.reserve(16)
            asked += 16
            ids = rows.ids[start : start + 16]
            records = torch.zeros((16, layout.stride), dtype=torch.uint8)
            pieces.put(Piece(0, np.arange(16), ids, records, {}, None))

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(0.3)
    assert asked == most
    held.set()
    asking.join(10)
    pieces.close()
    assert (asked, writer.written) == (144, 144)
    # Closed early, and not because room was wanted while there were rows to wait for.
    assert [line.rows for line in read_journal(journals(tmp_path)[0])] == [48, 48, 48]


def test_parts_of_batches_do_not_block_the_way(tmp_path: Path, samples: Any) -> None:
    """After a resume a batch has few new rows: then a file is closed to make room."""
    layout, rows = Layout(10, 5), samples.sorted()
    writer = ShardWriter(
        tmp_path, layout, fingerprint="f", writer="rank000", rows=shard_rows(32, 32)
    )
    pieces, start = Pipeline(layout, rows, writer, 32), 0
    for count in (20, 32, 5, 32, 27):
        pieces.reserve(count)
        records = torch.zeros((count, layout.stride), dtype=torch.uint8)
        ids = rows.ids[start : start + count]
        pieces.put(Piece(0, np.arange(count), ids, records, {}, None))
        start += count
    pieces.close()
    lines = read_journal(journals(tmp_path)[0])
    assert [line.rows for line in lines] == [20, 32, 5, 32, 27]


def test_two_writers_of_one_number(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path, views=1).folder
    with (
        locked(folder, "rank000"),
        pytest.raises(CacheError, match="is being written by another process as rank000"),
    ):
        make(tmp_path, views=1)
    with locked(folder, "table", shared=True):
        for use in (gc, compact):
            with pytest.raises(CacheError, match="is being written by another process"):
                use(folder)
    assert verify(folder).sound


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk on which no file can grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path, views=1).folder
    # The journal is what grows beyond: the shard before it is there, and its line is not.
    limit = (folder / "rank000.journal").stat().st_size + 100
    before = {path: path.read_bytes() for path in files(folder)}
    with largest_file(max(limit, 2600)), pytest.raises((CacheError, ResultsError), match="written"):
        make(tmp_path, views=2, allow_mismatch=("cache.views",))
    for path, content in before.items():
        if path.name not in ("manifest.json", "rank000.journal"):
            assert path.read_bytes() == content
    done = make(tmp_path, views=2, allow_mismatch=("cache.views",))
    assert done.missing == 0
    found = verify(folder)
    assert (found.rows, found.problems) == (300, [])


def test_a_folder_that_can_only_be_read(make: Any, samples: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        folder = make(place).folder
        paths = [place, *place.rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        root = os.geteuid() == 0
        if root:  # whom no permission stops
            os.seteuid(65534)
        try:
            with TeacherTable.open(folder) as table:
                assert len(table.rows(samples.ids, 1)) == 150
            assert verify(folder).sound
            with pytest.raises(CacheError, match=r"can't be written .Permission denied"):
                make(place)
            with pytest.raises((CacheError, ResultsError), match=r"Permission denied"):
                make(place, k=3)
        finally:
            if root:
                os.seteuid(0)
            for path in paths:
                path.chmod(0o755)


def test_a_shard_of_another_table_is_refused(make: Any, tmp_path: Path) -> None:
    folder, other = make(tmp_path / "a").folder, make(tmp_path / "b", seed=6).folder
    for path in files(other / "view-00000"):
        path.replace(folder / "view-00000" / path.name)
    (other / "rank000.journal").replace(folder / "rank000.journal")
    found = verify(folder)
    assert found.rows == 0 or not found.sound
    assert any("is a shard of another table: its fingerprint is" in x for x in found.problems)


def test_a_writer_takes_no_more_than_a_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, Layout(10, 4), fingerprint="f", writer="rank000", rows=8)
    with pytest.raises(ValueError, match="at most 8 rows at a time, got 9"):
        writer.add(0, np.arange(9), np.zeros((9, 18), dtype=np.uint8))
    writer.add(0, np.arange(6), np.zeros((6, 18), dtype=np.uint8))
    assert journals(tmp_path) == []  # nothing is written before a shard is full
    writer.add(0, np.arange(6, 11), np.zeros((5, 18), dtype=np.uint8))
    writer.flush()
    assert [line.rows for line in read_journal(journals(tmp_path)[0])] == [6, 5]


@pytest.mark.parametrize(
    "ids",
    [
        np.zeros(0, dtype=np.int64),
        np.array([7]),
        np.arange(-5, 400),
        np.array([-(2**63), -1, 0, 1, 2, 2**63 - 1]),
        np.unique(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 3000)),
        np.concatenate([np.arange(1000), [2**40]]),  # all but one in one bucket
    ],
    ids=len,
)
def test_lookup_finds_what_is_there(ids: Any) -> None:
    near = np.concatenate([ids, ids[1:] - 1, ids[:-1] + 1, [-(2**63), 0, 3, 2**63 - 1]])
    near = np.random.default_rng(1).permutation(near.astype(np.int64))
    there = np.isin(near, ids)
    lookup, wanted = Lookup.of(ids), torch.from_numpy(near)
    places, missing = lookup.places(wanted)
    assert missing == (~there).sum()
    assert np.array_equal(places.numpy() >= 0, there)
    assert np.array_equal(ids[places.numpy()[there]], near[there])
    # Rows of one shard in the ids' order, and of several in another, with an empty one and gaps.
    memory = torch.arange(len(ids) * 7).to(torch.uint8).view(len(ids), 7)
    expected = memory[places] if len(ids) else torch.zeros((len(near), 7), dtype=torch.uint8)
    expected[places < 0] = 0
    order = torch.from_numpy(np.random.default_rng(2).permutation(len(ids)))
    turned = torch.zeros((len(ids), 9), dtype=torch.uint8)[:, 1:8]
    turned[order] = memory
    cuts = [0, 0, len(ids) // 3, len(ids)]
    shards = [turned[a:b] for a, b in itertools.pairwise(cuts)]
    for rows, counted in (lookup.rows(wanted, [memory]), lookup.rows(wanted, shards, order)):
        assert counted == missing
        assert torch.equal(rows, expected)


def test_lookup_refuses_what_would_be_read_past() -> None:
    lookup, wanted = Lookup.of(np.arange(5)), torch.arange(5)
    rows = torch.zeros((5, 20), dtype=torch.uint8)
    assert lookup.rows(wanted, [rows])[1] == 0
    for refused, message in (
        (lambda: lookup.rows(wanted, [rows[:4]]), "shards of as many rows as ids"),
        (lambda: lookup.rows(wanted, [rows], torch.arange(5) + 1), "shards of as many rows as ids"),
        (lambda: lookup.rows(wanted, [rows], torch.arange(4)), "an order of all ids"),
        (lambda: lookup.rows(wanted, []), "one shard or more"),
        (lambda: lookup.rows(wanted, [rows, rows[:, 1:]]), "of as many bytes"),
        (lambda: lookup.rows(wanted.int(), [rows]), "int64 wanted"),
        (lambda: lookup.places(torch.arange(10)[::2]), "without gaps"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            refused()
    wild = Lookup(lookup.ids, torch.tensor([-7, 99, 3, -(2**31)], dtype=torch.int32), 1)
    places, _ = wild.places(wanted)
    assert bool((places < 5).all())


def test_sealed_text_is_refused_after_a_change() -> None:
    text = seal({"a": 1, "b": [1.5, "x"]})
    assert unseal(text) == {"a": 1, "b": [1.5, "x"]}
    changed = json.dumps({**json.loads(text), "a": 2})
    for broken in (changed, "{}", "[]", text[:-1]):
        with pytest.raises(ValueError, match=r"."):
            unseal(broken)


def test_the_next_view_is_loaded_before_it_is_asked_for(
    make: Any, samples: Any, tmp_path: Path
) -> None:
    folder = make(tmp_path).folder
    with TeacherTable.open(folder) as table:
        table.set_view(0)
        ahead = table._coming[1].result()
        expected = table.rows(samples.ids, 1)
        assert table._view(1) is ahead
        assert not table._coming  # the one after the last is the first, which is there
    with TeacherTable.open(folder) as table:
        got = table.rows(samples.ids, 1)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.log_probs, expected.log_probs)
