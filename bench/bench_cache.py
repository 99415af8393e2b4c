"""The teacher's table: bytes, rates, latencies, and what an epoch from it costs.

Run ``python bench/bench_cache.py`` (all parts, and a record in results/) or name parts: ``files``,
``build``, ``epoch``.

- files: k = 16 of 1,000 classes in 20 shards of 65,536 rows. Rows a second written with checksum,
  fsync and rename; read and verified; 256 random rows found by id, as bytes and as a `TopK`.
- build: all batches of `fastscarce.cache.build` over the teacher's passes within them. What the
  writing thread does is added, as if it were done in between; what is done once a table, however
  large (its fingerprint), is given beside.
- epoch: steps of a small student on 60,000 images of 28x28 pixels, plain supervised, from the
  table, and beside the living teacher (a timm ResNet), in turns; and the memory that a step takes.

Images are Fashion-MNIST's where it is installed, else noise: a time does not depend on them.
Rates depend on the disk and on the machine's other work; ratios are of medians of turns.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import numpy as np
import timm
import torch
from torch import nn

from fastscarce.cache import Layout, Samples, Teacher, TeacherTable, build, pack
from fastscarce.cache.build import _run
from fastscarce.cache.fingerprint import digest
from fastscarce.cache.manifest import Manifest, write_manifest, write_samples
from fastscarce.cache.pipeline import Pipeline
from fastscarce.cache.shard import ROWS, ShardWriter
from fastscarce.config import DataConfig, ModelConfig, RunConfig, StageConfig, StudentConfig
from fastscarce.train.objectives import SelfTraining, Supervised
from fastscarce.train.run import open_run
from fastscarce.train.tables import samples_of
from fastscarce.train.task import Task, prepare
from fastscarce.train.teaching import Teaching

FASHION = Path("/usr/share/datasets/fashion-mnist")
SHARDS, CLASSES, K, BATCH = 20, 1000, 16, 256
TEACHER = "resnet18"


def median(run: Callable[[], Any], turns: int) -> float:
    """Seconds of the median call."""
    spent = []
    for _ in range(turns):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def median_over(of: Callable[[Any], Any], batches: Any) -> float:
    """Seconds of the median call, each of another batch; once before the clock."""
    for batch in batches:
        of(batch)
    turns = iter(batches)
    return median(lambda: of(next(turns)), len(batches))


def of_codec(place: Path, codec: Any) -> dict[str, float]:
    """Figures of the files of one codec."""
    layout = Layout(CLASSES, K, codec)
    generator = torch.Generator().manual_seed(0)
    records = pack(4 * torch.randn(ROWS, CLASSES, generator=generator), layout).numpy()
    ids = np.random.default_rng(0).choice(1 << 40, SHARDS * ROWS, replace=False)
    ids.sort()
    folder = place / codec
    folder.mkdir()
    content: dict[str, Any] = {"cache": codec}
    name = digest(content)
    names = tuple(map(str, range(CLASSES)))
    samples = write_samples(folder, ids)
    write_manifest(folder, Manifest(name, content, layout, 1, len(ids), samples, names, {}))
    writer = ShardWriter(folder, layout, fingerprint=name, writer="rank000", rows=ROWS)
    start = time.perf_counter()
    for shard in range(SHARDS):
        writer.add(0, ids[shard * ROWS : (shard + 1) * ROWS], records)
    written = time.perf_counter() - start
    shards = [path.stat().st_size for path in folder.rglob("view-*/*.safetensors")]
    figures = {
        "bytes_per_row": layout.stride,
        "bytes_per_row_and_id": sum(shards) / len(ids),
        "million_rows_written_per_s": len(ids) / written / 1e6,
    }
    chosen = np.random.default_rng(1).choice(ids, (300, 256))
    for residency in ("device", "mmap"):
        with TeacherTable.open(folder, residency=residency) as table:
            start = time.perf_counter()
            table.set_view(0)
            loaded = time.perf_counter() - start
            figures[f"million_rows_verified_per_s_{residency}"] = len(ids) / loaded / 1e6
            for name, spent in latencies(table, chosen).items():
                figures[f"us_256_rows_{name}_{residency}"] = 1e6 * spent
    return figures


def latencies(table: TeacherTable, chosen: Any) -> dict[str, float]:
    """Seconds of the median batch of ids: found and gathered, and decoded."""
    return {
        "by_id": median_over(lambda batch: table.records(batch, 0), chosen),
        "as_topk": median_over(lambda batch: table.rows(batch, 0), chosen),
    }


def files(seconds: float) -> dict[str, float]:
    """Bytes, rates and latencies of both codecs."""
    with tempfile.TemporaryDirectory() as name:
        return {
            f"{codec}: {key}": value
            for codec in ("float16", "uint8")
            for key, value in of_codec(Path(name), codec).items()
        }


def network() -> nn.Module:
    """The teacher: what it says does not matter here."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(TEACHER, num_classes=10, in_chans=1).eval()
    return model.to(memory_format=torch.channels_last)


def fashion(rows: int) -> Samples:
    """The first images of Fashion-MNIST, or noise of their shape."""
    positions = np.arange(rows, dtype=np.int64)
    names = tuple(map(str, range(10)))
    if FASHION.is_dir():
        from fastscarce.data import load

        images = torch.from_numpy(load(f"idx:{FASHION}").images[:rows])
    else:
        images = torch.randint(0, 256, (rows, 28, 28, 1), dtype=torch.uint8)
    return Samples(images, positions, positions, np.full(rows, -1), names)


class Clock:
    """Seconds spent in functions; one that another calls is not counted twice."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.inside = False

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            if self.inside:
                return function(*arguments)
            self.inside, start = True, time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - start
                self.inside = False

        return run


def building(seconds: float) -> dict[str, float]:
    """`build` over the teacher's passes within it."""
    teacher = Teacher.of(network())

    def built(batches: int) -> tuple[float, float, float, float]:
        """Seconds once, of all batches, of the passes, and of the thread that writes."""
        run, passes, writing = Clock(), Clock(), Clock()
        samples = fashion(BATCH * batches)
        with (
            mock.patch("fastscarce.cache.build._run", run(_run)),
            mock.patch.object(Teacher, "logits", passes(Teacher.logits)),
            mock.patch.object(Pipeline, "_write", writing(Pipeline._write)),
            mock.patch.object(ShardWriter, "flush", writing(ShardWriter.flush)),
            tempfile.TemporaryDirectory() as name,
        ):
            start = time.perf_counter()
            build(teacher, samples, name, policy="standard", views=1, seed=0, batch_size=BATCH)
            whole = time.perf_counter() - start
            return whole - run.seconds, run.seconds, passes.seconds, writing.seconds

    built(4)
    batches = int(min(60_000 / BATCH, max(4, 4 * seconds / built(4)[2])))
    once, run, passes, writing = built(batches)
    return {
        "batches": batches,
        "teacher_images_per_s": BATCH * batches / passes,
        "ms_a_batch_passes": 1e3 * passes / batches,
        "ms_a_batch_writing": 1e3 * writing / batches,
        "ms_once": 1e3 * once,
        "build_x_passes": (run + writing) / passes,
    }


def steps_of(task: Task, table: TeacherTable | None, live: Teacher | None) -> Callable[[int], None]:
    """A training step of the student; its teacher is the table, the living one, or labels."""
    torch.manual_seed(0)
    model = task.network(ModelConfig(name="small_cnn"), "student")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
    settings = StudentConfig(
        batch_size=BATCH,
        unlabelled_batch_size=BATCH,
        alpha=1.0,
        augmentation="standard",
        cutmix_probability=0.0,
    )
    objective: Any
    if table is None and live is None:
        plain = StageConfig(batch_size=BATCH, augmentation="standard", cutmix_probability=0.0)
        objective = Supervised(task.run, task.pool, task.split.labelled, plain)
    else:
        policy = task.pool.policy("standard")
        teaching = Teaching(
            task.pool,
            task.split.labelled,
            policy=policy,
            mixing=policy,
            source=table,
            live=live,
            layout=Layout(10, 10),
            views=1,
        )
        objective = SelfTraining(task.run, task.pool, task.split.labelled, teaching, settings)

    def step(number: int) -> None:
        objective(model, number, 0, 1).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def epochs(seconds: float) -> dict[str, float]:
    """An epoch plain, from the table and beside the teacher."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        run = open_run(RunConfig(out=f"{name}/run", tensorboard=False, cpu=True), "distill")
        data = f"idx:{FASHION}" if FASHION.is_dir() else "digits"
        task = prepare(run, DataConfig(data=data, labels_per_class=None, holdout_per_class=0))
        samples = samples_of(task.images, task.split, task.pool)
        teacher = Teacher.of(network())

        class Quick(nn.Module):
            """Rows of any teacher cost the same to read; this one is quickly asked."""

            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(samples.size[0] * samples.size[1], 10)

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = self.layer(images.flatten(1))
                return logits

        policy = task.pool.policy("standard")
        build(Quick(), samples, f"{name}/table", policy=policy, views=1, seed=task.pool.seed)
        with TeacherTable.open(f"{name}/table") as table:
            kinds = {
                "supervised": steps_of(task, None, None),
                "table": steps_of(task, table, None),
                "live": steps_of(task, None, teacher),
            }
            spent: dict[str, list[float]] = {kind: [] for kind in kinds}
            started, number = time.perf_counter(), 0
            while time.perf_counter() - started < seconds or number < 25:
                # All kinds, and each after each other one: what a step leaves in a cache is shared.
                order = list(itertools.permutations(kinds))
                for kind in order[number % len(order)]:
                    begin = time.perf_counter()
                    kinds[kind](number)
                    if number >= 5:
                        spent[kind].append(time.perf_counter() - begin)
                number += 1
            peaks = {
                f"peak_mebibytes_{kind}": harness.peak_of(functools.partial(step, 0))
                for kind, step in kinds.items()
            }
        run.close()
    middle = {kind: statistics.median(times) for kind, times in spent.items()}
    count = len(samples.ids) / BATCH
    return {
        **{f"s_per_epoch_{kind}": count * value for kind, value in middle.items()},
        "table_x_supervised": middle["table"] / middle["supervised"],
        "live_x_supervised": middle["live"] / middle["supervised"],
        **{kind: peak for kind, peak in peaks.items() if peak is not None},
    }


PARTS = {"files": files, "build": building, "epoch": epochs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="files, build, epoch; all where none is named")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a part that takes turns")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--out", type=Path, help="JSON file of results, also of a few parts")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"parts are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    record = harness.environment("cpu", arguments.threads)
    print(f"{harness.processor()}, {arguments.threads} threads, torch {torch.__version__}")
    for name in arguments.parts or PARTS:
        record[name] = PARTS[name](arguments.seconds)
        for key, value in record[name].items():
            print(f"{name}: {key} {value:.4g}")
    if arguments.out or not arguments.parts:
        harness.write_record(
            arguments.out or harness.RESULTS / f"cache-{harness.place('cpu')}.json", record
        )


if __name__ == "__main__":
    main()
