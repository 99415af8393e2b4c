"""The same photographs read from files, tables, tar shards and arrays; and how long an index takes.

Run ``python bench/bench_sources.py``. JPEGs of 500x375 pixels are cut from scikit-learn's two
photographs and written as every kind of data. Batches of 256 are read in one keyed permutation, by
one process; the kinds take turns (A B C A B C ...), and the table holds medians of images a second
and their ratio to files. The files were just written, so that the system has them in memory: what
is timed is the way to a sample, not the disk. "Decoded" is reading, and decoding and scaling to
224x224 in the same process, of batches of 32.

The second table is of a folder of many empty files: listed for the first time, opened again with
the list that was kept, and opened after one file came in.

``pytest bench/bench_sources.py`` runs the same cases under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastscarce.augment.philox import keyed_order
from fastscarce.data import Source, decode_crop, open_source

IMAGES, HEIGHT, WIDTH, SIDE = 2000, 375, 500, 224
READ, DECODED = 256, 32  # images of a batch
FILES = 100_000
KINDS = ("folder", "csv", "parquet", "webdataset")
RESULTS = Path(__file__).parent / "results" / "sources.json"
LONG_AGO = 1_600_000_000  # seconds since 1970: a folder that is changing is not trusted

Step = Callable[[], Any]


@functools.cache
def folder() -> Path:
    """A place for this process's data and its cache, removed at the end."""
    place = tempfile.TemporaryDirectory(prefix="fastscarce-bench-")
    _KEPT.append(place)
    os.environ["FASTSCARCE_CACHE"] = str(Path(place.name) / "cache")
    return Path(place.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def photographs(count: int) -> list[bytes]:
    """JPEGs of different crops of scikit-learn's photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    draw = np.random.default_rng(0)
    found = []
    for number in range(count):
        picture = pictures[number % 2]
        left = int(draw.integers(0, picture.width - WIDTH + 1))
        top = int(draw.integers(0, picture.height - HEIGHT + 1))
        file = io.BytesIO()
        picture.crop((left, top, left + WIDTH, top + HEIGHT)).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


@functools.cache
def sources(count: int) -> dict[str, Source]:
    """The same photographs as every kind of data."""
    root = folder()
    contents = photographs(count)
    names = [f"{number % 10}/{number:05d}.jpg" for number in range(count)]
    for name, content in zip(names, contents, strict=True):
        (root / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "files" / name).write_bytes(content)
    lines = [f"files/{name},{name[0]}\n" for name in names]
    (root / "scans.csv").write_text("path,label\n" + "".join(lines), encoding="utf-8")
    rows = [{"bytes": c, "path": name} for name, c in zip(names, contents, strict=True)]
    table = pa.table({"image": rows, "label": [int(name[0]) for name in names]})
    pq.write_table(table, root / "scans.parquet", row_group_size=1000)
    for shard in range(4):
        with tarfile.open(root / f"shard-{shard}.tar", "w") as file:
            for name, content in list(zip(names, contents, strict=True))[shard::4]:
                for member, data in ((name, content), (f"{name[:-4]}.cls", name[:1].encode())):
                    facts = tarfile.TarInfo(member)
                    facts.size = len(data)
                    file.addfile(facts, io.BytesIO(data))
    return {
        "folder": open_source(f"folder:{root / 'files'}"),
        "csv": open_source(f"table:{root / 'scans.csv'}"),
        "parquet": open_source(f"table:{root / 'scans.parquet'}"),
        "webdataset": open_source(f"webdataset:{root}/shard-*.tar"),
    }


def step(source: Source, *, decoded: bool) -> Step:
    """Read, and perhaps decode, the next batch of an endless random order."""
    order = keyed_order(0, np.arange(len(source)), view=0, draw=0)
    rows = DECODED if decoded else READ
    place = 0

    def run() -> None:
        nonlocal place
        positions = np.take(order, range(place, place + rows), mode="wrap")
        place += rows
        for content in source.read(positions):
            if decoded:
                decode_crop(bytes(content), image_size=(SIDE, SIDE), channels=3)

    return run


def measure(count: int, seconds: float) -> list[harness.Row]:
    results = []
    for decoded in (False, True):
        steps = {kind: step(source, decoded=decoded) for kind, source in sources(count).items()}
        found = harness.turns(steps, seconds)
        rows = DECODED if decoded else READ
        speed = {kind: 1e3 * rows / ms for kind, ms in found["milliseconds"].items()}
        results.append({"decoded": decoded, "batch": rows, **found, "images_per_second": speed})
    return results


def measure_index(files: int) -> harness.Row:
    """Seconds to open a folder of many files for the first time, again, and after a change."""
    root = folder() / "many"
    for number in range(files):
        path = root / f"{number % 10}" / f"{number // 10 % 100}" / f"{number:07d}.png"
        if number < 1000:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for parent, *_ in os.walk(root):
        os.utime(parent, (LONG_AGO, LONG_AGO))

    def timed() -> float:
        start = time.perf_counter()
        open_source(f"folder:{root}")
        return time.perf_counter() - start

    first, again = timed(), timed()
    (root / "0" / "0" / "new.png").touch()
    return {"files": files, "first": first, "again": again, "changed": timed()}


def print_tables(results: list[harness.Row], index: harness.Row) -> None:
    rows = []
    for kind in KINDS:
        cells = [kind]
        for found in results:
            speed = found["images_per_second"]
            cells += [f"{speed[kind]:.0f}", f"{speed[kind] / speed['folder']:.2f}"]
        rows.append(cells)
    head = ["source", "read, images/s", "x files", "read and decoded, images/s", "x files"]
    print(harness.markdown(head, rows))
    print(
        f"\nA folder of {index['files']} files: {index['first']:.2f} s at first,"
        f" {index['again']:.3f} s again, {index['changed']:.2f} s after a change."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each table's column")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--files", type=int, default=FILES, help="of the folder that is listed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of results")
    arguments = parser.parse_args()
    results, index = measure(arguments.images, arguments.seconds), measure_index(arguments.files)
    print_tables(results, index)
    facts = harness.environment("cpu", 1)
    del facts["temperature"], facts["alpha"]
    harness.write_record(arguments.out, {**facts, "results": results, "index": index})


@pytest.mark.parametrize("kind", KINDS)
def test_read(benchmark: Any, kind: str) -> None:
    benchmark.pedantic(step(sources(IMAGES)[kind], decoded=False), rounds=20, warmup_rounds=5)


if __name__ == "__main__":
    main()
