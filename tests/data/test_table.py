from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastscarce.data import load, open_source, relabel
from fastscarce.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, scans: list[Any]) -> Path:
    (tmp_path / "img").mkdir()
    for name, content, _ in scans:
        (tmp_path / "img" / name).write_bytes(content)
    return tmp_path


def text(scans: list[Any], row: str = "img/{0},{1}\n", head: str = "path,label\n") -> str:
    return head + "".join(row.format(name, "abc"[label]) for name, _, label in scans)


def embedded(scans: list[Any], *, paths: bool = True, names: bool = False) -> pa.Table:
    rows = [{"bytes": content, "path": name if paths else None} for name, content, _ in scans]
    table = pa.table({"image": rows, "label": [label for *_, label in scans]})
    if not names:
        return table
    facts = {"info": {"features": {"label": {"names": ["cat", "dog", "eel", "fox"]}}}}
    return table.replace_schema_metadata({b"huggingface": json.dumps(facts).encode()})


def test_csv_of_paths(folder: Path, scans: list[Any], levels: np.ndarray) -> None:
    (folder / "t.csv").write_text(text(scans), encoding="utf-8-sig")
    pool = load(f"table:{folder / 't.csv'}")
    assert pool.classes == ("a", "b", "c")
    assert pool.labels.tolist() == [label for *_, label in scans]
    assert pool.images[:, 0, 0, 0].tolist() == levels.tolist()
    assert pool.paths is not None
    assert pool.paths[3] == "img/3.png"


def test_ids_belong_to_rows_and_not_to_their_order(folder: Path, scans: list[Any]) -> None:
    (folder / "t.csv").write_text(text(scans), encoding="utf-8")
    (folder / "u.tsv").write_text(
        text(scans[::-1], "{1}\t./img/{0}\n", "class\tfile_name\n"), encoding="utf-8"
    )
    pq.write_table(embedded(scans[5:] + scans[:5], paths=False), folder / "v.parquet")
    pq.write_table(embedded(scans, paths=False), folder / "w.parquet")
    first, second, third, fourth = (
        open_source(f"table:{folder / name}")
        for name in ("t.csv", "u.tsv", "v.parquet", "w.parquet")
    )
    assert second.ids.tolist() == first.ids[::-1].tolist()
    assert first.fingerprint() == second.fingerprint()
    assert third.ids.tolist() == np.roll(fourth.ids, -5).tolist()
    assert third.fingerprint() == fourth.fingerprint() != first.fingerprint()


@pytest.mark.parametrize("paths", [True, False])
def test_parquet_of_images(
    tmp_path: Path, scans: list[Any], levels: np.ndarray, paths: bool
) -> None:
    table = embedded(scans, paths=paths, names=True)
    pq.write_table(table.slice(0, 9), tmp_path / "train-00000-of-00001.parquet", row_group_size=4)
    pq.write_table(table.slice(9), tmp_path / "test-00000-of-00001.parquet")
    source = open_source(f"table:{tmp_path}")
    assert source.classes == ("cat", "dog", "eel", "fox")
    assert source.is_test.tolist() == [True] * 3 + [False] * 9  # files in the order of names
    order = np.roll(np.arange(12), 3)
    assert source.labels.tolist() == (order % 3).tolist()
    assert source.read([0, 11]) == [scans[9][1], scans[8][1]]
    assert (source.name_of(0) == "9.png") is paths
    assert load(f"table:{tmp_path}").images[:, 0, 0, 0].tolist() == levels[order].tolist()


def test_a_table_that_is_written_anew_gives_nobody_other_images(
    tmp_path: Path, scans: list[Any]
) -> None:
    pq.write_table(embedded(scans), tmp_path / "t.parquet")
    before = open_source(f"table:{tmp_path / 't.parquet'}")
    pq.write_table(embedded(scans), tmp_path / "t.parquet")  # the same again
    open_source(f"table:{tmp_path / 't.parquet'}")
    assert before.read([3]) == [scans[3][1]]
    before = open_source(f"table:{tmp_path / 't.parquet'}")
    pq.write_table(embedded(scans[::-1]), tmp_path / "t.parquet")
    after = open_source(f"table:{tmp_path / 't.parquet'}")
    assert after.read([3]) == [scans[8][1]]
    with pytest.raises(DataError, match="can't be read: No such file"):
        before.read([3])


def test_ids_and_labels_as_other_programs_write_them(folder: Path, scans: list[Any]) -> None:
    rows = ""
    for place, (name, _, label) in enumerate(scans):
        known, none = f"./img//{name},{label}.0,{label + 5 * place}\n", f"img/{name},,7{place}\n"
        rows += known if label else none
    (folder / "t.csv").write_text("path,label,key\n" + rows, encoding="utf-8")
    pool = load(f"table:{folder / 't.csv'}", id_key="key")
    assert pool.classes == ("1", "2")
    assert pool.labels.tolist() == [label - 1 for *_, label in scans]
    assert pool.ids.tolist() == [
        label + 5 * place if label else int(f"7{place}") for place, (*_, label) in enumerate(scans)
    ]
    assert pool.paths is not None
    assert pool.paths[1] == "img/1.png"
    (folder / "few.csv").write_text("id,label\n6,2\n", encoding="utf-8")
    source, _ = relabel(open_source(f"table:{folder / 't.csv'}", id_key="key"), folder / "few.csv")
    assert source.labels[1] == 1


def test_equal_images_without_a_name_get_ids_of_their_own(tmp_path: Path, scans: list[Any]) -> None:
    pq.write_table(embedded([scans[0], scans[1], scans[0]], paths=False), tmp_path / "t.parquet")
    source = open_source(f"table:{tmp_path / 't.parquet'}")
    assert len(set(source.ids.tolist())) == 3


def test_plain_bytes_and_chosen_columns(tmp_path: Path, scans: list[Any]) -> None:
    table = pa.table(
        {
            "scan": [content for _, content, _ in scans],
            "kind": pa.array([f"k{label}" for *_, label in scans]).dictionary_encode(),
            "number": list(range(100, 112)),
            "word": [name for name, *_ in scans],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    keys = {"image_key": "scan", "label_key": "kind"}
    source = open_source(f"table:{tmp_path / 't.parquet'}", id_key="number", **keys)
    assert source.ids.tolist() == list(range(100, 112))
    assert source.classes == ("k0", "k1", "k2")
    assert source.read([2]) == [scans[2][1]]
    words = open_source(f"table:{tmp_path / 't.parquet'}", id_key="word", **keys)
    assert len(set(words.ids.tolist())) == 12


def test_no_label_and_numbers_as_names(folder: Path) -> None:
    rows = "img/0.png,10\nimg/1.png,9\nimg/2.png,\nimg/3.png,-1\n"
    (folder / "t.csv").write_text("path,label\n" + rows, encoding="utf-8")
    source = open_source(f"table:{folder / 't.csv'}")
    assert source.classes == ("9", "10")
    assert source.labels.tolist() == [1, 0, -1, -1]
    (folder / "classes.txt").write_text("\n".join("abcdefghijk"), encoding="utf-8")
    source = open_source(f"table:{folder / 't.csv'}")
    assert source.classes[10] == "k"
    assert source.labels.tolist() == [10, 9, -1, -1]
    floats = pa.table({"path": ["img/0.png", "img/1.png"], "label": [1.0, None]})
    pq.write_table(floats, folder / "f.parquet")
    assert open_source(f"table:{folder / 'f.parquet'}").labels.tolist() == [1, -1]


def test_a_column_says_which_are_the_test(folder: Path) -> None:
    rows = ["img/0.png,a,train", "img/1.png,b,Test", "img/2.png,a,validation"]
    (folder / "t.csv").write_text("path,label,split\n" + "\n".join(rows), encoding="utf-8")
    assert open_source(f"table:{folder / 't.csv'}").is_test.tolist() == [False, True, False]
    (folder / "u.csv").write_text("path,label,split\n" + "\n".join(rows[::2]), encoding="utf-8")
    assert open_source(f"table:{folder / 'u.csv'}").is_test.tolist() == [False, True]


def test_tables_of_several_folders(tmp_path: Path, scans: list[Any]) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.png").write_bytes(scans[0][1])
        (tmp_path / split / "metadata.csv").write_text(
            "file_name,label\n0.png,a\n", encoding="utf-8"
        )
    source = open_source(f"table:{tmp_path}/*/metadata.csv")
    assert source.is_test.tolist() == [True, False]
    assert [source.name_of(place) for place in (0, 1)] == ["test/0.png", "train/0.png"]
    assert source.read([1]) == [scans[0][1]]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a,b\n1,2\n", {}, "needs a column of paths or images .* got a, b; name it by image_key"),
        ("path,label\nx,1\n", {"label_key": "kind"}, "no column 'kind'; it has path, label"),
        ("path,label\nx,1\n,2\n", {}, "needs a path in every row, got none in row 2"),
        ("path,label\nx,1\nx,2\n", {}, "two images with one id, x and x"),
        ("path,path\nx,1\n", {}, "has two columns 'path'"),
        ("path,label\nx\n", {}, "is no table that can be read"),
        ("", {}, "is no table that can be read"),
        ("path,l\xe4bel\nx,1\n", {"label_key": "label"}, "is no table that can be read"),
        ("path,label\nx,\xe4\n", {}, "invalid UTF8 data"),
        ("path,id\nx,\n", {"id_key": "id"}, "needs an id in every row"),
        ("path,label,split\nx,1,train\ny,,test\n", {}, "1 images of the test split have no label"),
    ],
)
def test_broken_text(tmp_path: Path, content: str, options: dict[str, str], message: str) -> None:
    (tmp_path / "t.csv").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        open_source(f"table:{tmp_path / 't.csv'}", **options)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [1, 2]}, "needs paths or encoded images in the column 'image', got int64"),
        ({"path": ["x", "y"], "label": [[1], [2]]}, "a word or a whole number in each row"),
        ({"path": ["x", "y"], "label": [0.5, 1.0]}, "a word or a whole number in each row"),
        ({"image": [{"bytes": None, "path": "x"}]}, "got only the path x; embed them"),
    ],
)
def test_broken_parquet(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    if "image" in columns and isinstance(columns["image"][0], dict):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {"image": pa.array(columns["image"], kind)}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=message):
        open_source(f"table:{tmp_path / 't.parquet'}")


def test_no_parquet_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="is no Parquet table"):
        open_source(f"table:{tmp_path / 't.parquet'}")
    (tmp_path / "t.txt").write_text("path,label\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.txt must be \.csv, \.tsv, \.parquet, \.pq"):
        open_source(f"table:{tmp_path / 't.txt'}")
    for name in ("none.csv", "*.csv"):
        with pytest.raises(DataError, match="names no file"):
            open_source(f"table:{tmp_path / name}")


def test_a_place_for_unpacked_images_is_needed(
    tmp_path: Path, scans: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FASTSCARCE_CACHE", str(tmp_path / "file" / "cache"))
    pq.write_table(embedded(scans), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"can't be unpacked .* by FASTSCARCE_CACHE"):
        open_source(f"table:{tmp_path / 't.parquet'}")
