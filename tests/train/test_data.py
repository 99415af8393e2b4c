"""Commands on every kind of data, and what they write down of it."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastscarce.data import load


def test_a_written_split_gives_the_same_run(
    command: Any, same_weights: Any, tmp_path: Path
) -> None:
    first = command("finetune", tmp_path / "first", seed=3)
    assert first.code == 0, first.err
    table = first.folder / "split.csv"
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1797
    assert sum(row["part"] == "labelled" for row in rows) == 40
    assert all((row["label"] == "") == (row["part"] == "unlabelled") for row in rows)
    again = command(
        "finetune", tmp_path / "again", seed=3, labels_file=table, labels_per_class=None
    )
    assert again.code == 0, again.err
    assert same_weights(first, again)
    assert again.result["accuracy"] == first.result["accuracy"]
    assert (again.folder / "split.csv").read_bytes() == table.read_bytes()


SMALL: dict[str, Any] = {"labels_per_class": 4, "test_fraction": 0.3}


def pictures() -> Iterator[tuple[str, bytes, int, np.ndarray]]:
    """Digits of three classes: name, PNG, label and pixels."""
    digits = load("digits")
    for place in np.flatnonzero(digits.labels < 3)[:90].tolist():
        file = io.BytesIO()
        Image.fromarray(digits.images[place, ..., 0]).save(file, "PNG")
        yield f"{place}.png", file.getvalue(), int(digits.labels[place]), digits.images[place]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same pictures as every kind of data."""
    root = tmp_path_factory.mktemp("sources")
    rows = list(pictures())
    with tarfile.open(root / "shard-0.tar", "w") as shard:
        for name, content, label, _ in rows:
            for member, data in ((name, content), (f"{name[:-4]}.cls", b"%d" % label)):
                facts = tarfile.TarInfo(member)
                facts.size = len(data)
                shard.addfile(facts, io.BytesIO(data))
    for name, content, label, _ in rows:
        (root / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        (root / "folder" / str(label) / name).write_bytes(content)
    lines = [f"folder/{label}/{name},{label}" for name, _, label, _ in rows]
    (root / "scans.csv").write_text("path,label\n" + "\n".join(lines), encoding="utf-8")
    images = [{"bytes": content, "path": name} for name, content, *_ in rows]
    labels = [label for _, _, label, _ in rows]
    pq.write_table(pa.table({"image": images, "label": labels}), root / "scans.parquet")
    np.savez(root / "scans.npz", images=np.stack([row[3] for row in rows]), labels=labels)
    return {
        "folder": f"folder:{root / 'folder'}",
        "csv": f"table:{root / 'scans.csv'}",
        "parquet": f"table:{root / 'scans.parquet'}",
        "webdataset": f"webdataset:{root}/shard-*.tar",
        "arrays": f"arrays:{root / 'scans.npz'}",
    }


@pytest.mark.parametrize("kind", ["folder", "csv", "parquet", "webdataset", "arrays"])
def test_every_source_trains(
    command: Any, sources: dict[str, str], kind: str, tmp_path: Path
) -> None:
    done = command("finetune", tmp_path / "run", data=sources[kind], training__steps=40, **SMALL)
    assert done.code == 0, done.err
    assert "3 classes, 12 labelled, 0 held out, 51 unlabelled, 27 test images of 8x8" in done.out
    assert done.result["accuracy"] > 0.6  # of three digits; by chance a third
    assert not (done.folder / "quarantine.csv").exists()


def test_label_and_distill_from_parquet_and_a_table(
    command: Any, sources: dict[str, str], tmp_path: Path
) -> None:
    settings = {"data": sources["parquet"], **SMALL}
    teacher = command("finetune", tmp_path / "teacher", training__steps=40, **settings)
    table = command("label", tmp_path / "labels", teacher=teacher.folder, **settings)
    assert table.code == 0, table.err
    student = command("distill", tmp_path / "student", labels=table.folder, **settings)
    assert student.code == 0, student.err
    # Names are the ids' origin: labels of one kind of data are of no use for another's paths.
    other = {**settings, "data": sources["csv"]}
    refused = command("distill", tmp_path / "other", labels=table.folder, **other)
    assert refused.code == 2
    assert "images labelled in" in refused.err


def test_two_processes_train_from_shards(
    command: Any, in_two_processes: Any, sources: dict[str, str], tmp_path: Path
) -> None:
    settings = {"data": sources["webdataset"], "model__name": "small_cnn_gn", **SMALL}
    alone = command("finetune", tmp_path / "one", **settings)
    assert alone.code == 0, alone.err
    both = in_two_processes("finetune", tmp_path / "two", **settings)
    assert both.code == 0, both.err
    two = both.folder
    assert (two / "split.csv").read_bytes() == (alone.folder / "split.csv").read_bytes()
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (two, alone.folder)]
    assert manifests[0]["data"] == manifests[1]["data"]
    assert [manifest["processes"] for manifest in manifests] == [2, 1]


@pytest.mark.parametrize("on_error", ["raise", "skip", "replace"])
def test_broken_images_are_listed(
    command: Any, sources: dict[str, str], tmp_path: Path, on_error: str
) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(sources["folder"].removeprefix("folder:"), root)
    names = []
    for label, content in zip("012", (b"", b"no image", None), strict=True):
        path = min((root / label).iterdir())
        path.write_bytes(path.read_bytes()[:80] if content is None else content)
        names.append(f"{label}/{path.name}")
    done = command("finetune", tmp_path / "run", data=f"folder:{root}", on_error=on_error, **SMALL)
    if on_error == "raise":
        assert done.code == 2
        assert "set on_error to skip or replace" in done.err
        return
    assert done.code == 0, done.err
    with (done.folder / "quarantine.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["name"] for row in rows) == names
    assert {row["reason"] for row in rows} >= {"it is empty", "it is no image of a known format"}
    kept = len((done.folder / "split.csv").read_text(encoding="utf-8").splitlines()) - 1
    assert kept == (87 if on_error == "skip" else 90)
    assert done.out.count("skipped" if on_error == "skip" else "replaced") == 3
