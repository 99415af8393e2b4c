"""The table on the disk: what is written is read, and what is damaged is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fastscarce.errors import DataError, ResultsError
from fastscarce.pseudo import PseudoLabels, from_logits, read_parquet, select, write_parquet
from fastscarce.pseudo.table import soft_path

NAMES = ["cat", "dog", "élan"]


def sample(rows: int = 50, seed: int = 0) -> PseudoLabels:
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(2, rows, 3, generator=generator)
    ids = np.random.default_rng(seed).permutation(1000)[:rows]
    return select(from_logits(ids, logits), threshold=0.7, keep_per_class=12)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rows", [0, 50])
def test_round_trip(tmp_path: Path, rows: int, half: bool) -> None:
    labels = sample(rows)
    paths = [f"a/{i}.png" for i in labels.ids]
    place = write_parquet(
        tmp_path / "new" / "pseudo_labels.parquet",
        labels,
        class_names=NAMES,
        paths=paths,
        half=half,
    )
    found = read_parquet(place)
    order = np.argsort(labels.ids)
    assert found.class_names == tuple(NAMES)
    assert found.paths == tuple(paths[i] for i in order)
    for name, value in vars(labels.take(order)).items():
        got = getattr(found.labels, name)
        assert got.dtype == value.dtype
        if half and name == "log_probs":
            np.testing.assert_allclose(got, value, rtol=1e-3, atol=1e-6)
        else:
            np.testing.assert_array_equal(got, value, err_msg=name)
    written = [p.relative_to(place.parent).as_posix() for p in place.parent.rglob("*.*")]
    assert sorted(written) == ["pseudo_labels.parquet", "pseudo_labels/log_probs.safetensors"]


def test_columns_for_other_readers(tmp_path: Path) -> None:
    labels = sample()
    place = write_parquet(tmp_path / "pseudo_labels.parquet", labels, class_names=NAMES)
    table = pq.read_table(place)
    assert table.column_names == [
        "id",
        "path",
        "label",
        "class_name",
        "confidence",
        "margin",
        "entropy",
        "agreement",
        "chosen",
        "repeats",
    ]
    for row in table.to_pylist():
        assert row["class_name"] == NAMES[row["label"]]
        assert row["path"] is None
    assert read_parquet(place).paths is None
    soft = load_file(soft_path(place))
    assert soft["log_probs"].dtype == np.float32
    np.testing.assert_array_equal(soft["id"], np.sort(labels.ids))


def test_the_same_labels_give_the_same_bytes(tmp_path: Path) -> None:
    labels = sample()
    shuffled = labels.take(np.random.default_rng(3).permutation(len(labels)))
    one = write_parquet(tmp_path / "one.parquet", labels, class_names=NAMES)
    two = write_parquet(tmp_path / "two.parquet", shuffled, class_names=NAMES)
    assert one.read_bytes() == two.read_bytes()
    softs = [soft_path(path).read_bytes() for path in (one, two)]
    assert softs[0] == softs[1]


def test_missing_files(tmp_path: Path) -> None:
    place = tmp_path / "pseudo_labels.parquet"
    with pytest.raises(DataError, match=r"\.parquet is needed .* missing"):
        read_parquet(place)
    write_parquet(place, sample(), class_names=NAMES)
    soft_path(place).unlink()
    with pytest.raises(DataError, match=r"\.safetensors is needed .* missing"):
        read_parquet(place)


def test_any_flipped_byte_of_the_values_is_refused_or_harmless(tmp_path: Path) -> None:
    """Either the reader refuses, or what it returns is what was written."""
    place = write_parquet(tmp_path / "pseudo_labels.parquet", sample(), class_names=NAMES)
    whole = read_parquet(place)
    refused = 0
    for file in (place, soft_path(place)):
        good = file.read_bytes()
        for position in range(0, len(good), 23):
            damaged = bytearray(good)
            damaged[position] ^= 0x10
            file.write_bytes(damaged)
            try:
                found = read_parquet(place)
            except DataError:
                refused += 1
            else:
                for name, value in vars(whole.labels).items():
                    np.testing.assert_array_equal(getattr(found.labels, name), value)
                assert found.class_names == whole.class_names
        file.write_bytes(good)
    assert refused > 50


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_file_cut_short(tmp_path: Path, size: int) -> None:
    place = write_parquet(tmp_path / "pseudo_labels.parquet", sample(), class_names=NAMES)
    for file in (place, soft_path(place)):
        good = file.read_bytes()
        file.write_bytes(good[:size])
        with pytest.raises(DataError, match="damaged"):
            read_parquet(place)
        file.write_bytes(good)


def test_soft_rows_of_another_run(tmp_path: Path) -> None:
    one = write_parquet(tmp_path / "one.parquet", sample(seed=1), class_names=NAMES)
    two = write_parquet(tmp_path / "two.parquet", sample(seed=2), class_names=NAMES)
    soft_path(two).replace(soft_path(one))
    with pytest.raises(DataError, match="of another run"):
        read_parquet(one)


def test_soft_rows_without_their_tensors(tmp_path: Path) -> None:
    place = write_parquet(tmp_path / "pseudo_labels.parquet", sample(), class_names=NAMES)
    save_file({"other": np.zeros(3)}, soft_path(place))
    with pytest.raises(DataError, match="damaged"):
        read_parquet(place)


def rewrite(place: Path, **changes: object) -> None:
    """The table again, with some of its header changed."""
    table = pq.read_table(place)
    head = json.loads(table.schema.metadata[b"fastscarce"]) | changes
    pq.write_table(table.replace_schema_metadata({b"fastscarce": json.dumps(head)}), place)


def test_newer_and_foreign_tables(tmp_path: Path) -> None:
    place = write_parquet(tmp_path / "pseudo_labels.parquet", sample(), class_names=NAMES)
    rewrite(place, version=2)
    with pytest.raises(DataError, match="version 2 and this fastscarce reads up to 1"):
        read_parquet(place)
    rewrite(place, version="one")
    with pytest.raises(DataError, match="no table of fastscarce"):
        read_parquet(place)
    rewrite(place, version=1)
    read_parquet(place)
    table = pq.read_table(place)
    pq.write_table(table.drop_columns(["margin"]), place)
    with pytest.raises(DataError, match="other columns"):
        read_parquet(place)
    pq.write_table(table.replace_schema_metadata(None), place)
    with pytest.raises(DataError, match="no table of fastscarce"):
        read_parquet(place)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files makes the write fail for real, in a process of its own."""
    place = write_parquet(tmp_path / "pseudo_labels.parquet", sample(), class_names=NAMES)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    program = """
import resource, signal, sys
import numpy as np, torch
from fastscarce.errors import ResultsError
from fastscarce.pseudo import from_logits, write_parquet
labels = from_logits(np.arange(9000), torch.randn(1, 9000, 3))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    write_parquet(sys.argv[1], labels, class_names=["a", "b", "c"])
except ResultsError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, str(place)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert "could not be written" in ran.stdout
    assert "free space" in ran.stdout
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="could not be written"):
        write_parquet(tmp_path / "file" / "labels.parquet", sample(), class_names=NAMES)


def test_a_folder_that_takes_no_files() -> None:
    # A folder without write permission takes files from root all the same; this one takes none.
    with pytest.raises(ResultsError, match="could not be written"):
        write_parquet("/proc/self/labels.parquet", sample(), class_names=NAMES)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 class names, got 2"):
        write_parquet(tmp_path / "a.parquet", sample(), class_names=["a", "b"])
    with pytest.raises(ValueError, match="50 paths, got 1"):
        write_parquet(tmp_path / "a.parquet", sample(), class_names=NAMES, paths=["a"])
    with pytest.raises(ValueError, match=r"ends in \.parquet"):
        write_parquet(tmp_path / "a.csv", sample(), class_names=NAMES)
