"""kd_loss beside eager PyTorch, torch.compile and other libraries: forward and backward.

``python bench/bench_kd_loss.py`` measures float32 on a CPU with two threads: memory warm (glibc
kept from returning freed memory to the system; every method profits) and as it comes. With
``--device cuda`` it measures float32 and bfloat16 on a GPU, and a replayed CUDA graph of ours.

The methods take turns on the same tensors; tables hold medians and the ratio of medians. GB/s
counts the bytes that have to move: student and teacher read, gradient written. Beside it stands
its share of the bandwidth of a copy, ``b.copy_(a)`` on 256 MiB each (bytes read and written),
timed before and after the turns of each shape; a step whose tensors fit the caches can be above 1.
A peak is the most memory during a step above student and teacher: the process's resident memory,
or the caching allocator's on a GPU. The gradient is part of it, unless it goes over the teacher's
logits (``reuse_teacher_buffer``).

The record is ``bench/results/kd_loss-PLACE.json``, PLACE being the instruction set or the compute
capability (cpu-avx2, cuda-sm90); ``python bench/plot_kd_loss.py`` draws it. The peers come with
``pip install -e .[bench]``; one that is missing is left out. ``pytest bench`` runs the same cases
under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import peers
import pytest
import torch
from harness import ALPHA, SHAPES, TEMPERATURE, THREADS, Loss, Row
from torch import Tensor

from fastscarce.ops import kd_loss

OURS, REUSED, REPLAYED = "fastscarce", "fastscarce, reused teacher", "fastscarce, graph"


@dataclass(frozen=True)
class Table:
    """What is measured in a process of its own."""

    title: str
    dtype: torch.dtype
    warm: bool
    peaks: bool


TABLES = {
    "cpu": [
        Table("float32, memory warm", torch.float32, warm=True, peaks=False),
        Table("float32, memory as it comes", torch.float32, warm=False, peaks=True),
    ],
    "cuda": [
        Table("float32", torch.float32, warm=False, peaks=True),
        Table("bfloat16", torch.bfloat16, warm=False, peaks=True),
    ],
}


def ours(student: Tensor, teacher: Tensor, target: Tensor, **options: Any) -> Tensor:
    loss: Tensor = kd_loss(
        student, teacher, target, temperature=TEMPERATURE, alpha=ALPHA, **options
    )
    return loss


def losses(device: str) -> dict[str, Loss]:
    torch._dynamo.reset()
    eager = peers.EAGER["kl"]
    others = peers.liger("kl") if device == "cuda" else peers.torchdistill()
    return {OURS: ours, "torch.compile": torch.compile(eager), "eager": eager, **others}


def measure(size: tuple[int, int], table: Table, device: str, seconds: float) -> Row:
    rows, classes = size
    student, teacher, target = harness.tensors(rows, classes, device, table.dtype)
    compared = losses(device)
    harness.check_agreement(
        {name: loss for name, loss in compared.items() if name != "torch.compile"},
        (student, teacher, target),
    )
    candidates = {
        name: harness.gradient_step(loss, student, teacher, target)
        for name, loss in compared.items()
    }
    if device == "cuda":
        candidates[REPLAYED] = harness.replay(candidates[OURS])
    copies = harness.copy_times(device)
    found = harness.turns(candidates, seconds, device)
    copies += harness.copy_times(device)
    counted = 3 * student.numel() * student.element_size()
    speed, copy = 1e-6 * counted / found["milliseconds"][OURS], statistics.median(copies)
    found = {
        "rows": rows,
        "classes": classes,
        **found,
        "gigabytes_per_second": speed,
        "copy_gigabytes_per_second": copy,
        "share_of_copy": speed / copy,
    }
    if table.peaks:
        peaks = {
            name: harness.peak_of(candidates[name], device)
            for name in found["milliseconds"]
            if name != REPLAYED  # its memory is its own, held between the steps
        }
        lost = teacher.clone()
        reused = harness.gradient_step(ours, student, lost, target, reuse_teacher_buffer=True)
        reused()
        peaks[REUSED] = harness.peak_of(reused, device)
        found["peak_mebibytes"] = peaks
        found["gradient_mebibytes"] = counted / 3 / 2**20
    return found


def times_table(rows: list[Row]) -> str:
    """Milliseconds, ratios, bandwidth."""
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    others = [name for name in names if name not in (OURS, REPLAYED)]
    head = ["N x C", *(f"{name} ms" for name in names), *(f"x {name}" for name in others)]
    lines = []
    for row in rows:
        ms, ratio = row["milliseconds"], row["ratio"]
        line = [f"{row['rows']} x {row['classes']}"]
        line += [harness.short(ms.get(name)) for name in names]
        line += [f"{ratio[name]:.1f}" if name in ratio else "" for name in others]
        line += [f"{row['gigabytes_per_second']:.1f}", f"{row['share_of_copy']:.2f}"]
        lines.append(line)
    return harness.markdown([*head, "GB/s", "of a copy"], lines)


def peaks_table(rows: list[Row]) -> str:
    """MiB above student and teacher."""
    names = list(dict.fromkeys(name for row in rows for name in row["peak_mebibytes"]))
    lines = [
        [
            f"{row['rows']} x {row['classes']}",
            harness.short(row["gradient_mebibytes"]),
            *(harness.short(row["peak_mebibytes"].get(name)) for name in names),
        ]
        for row in rows
    ]
    return harness.markdown(["N x C", "gradient", *names], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=list(TABLES), default="cpu")
    parser.add_argument("--seconds", type=float, default=15.0, help="per shape and table")
    parser.add_argument("--threads", type=int, default=THREADS, help="of the CPU")
    parser.add_argument("--shapes", nargs="+", type=harness.shape, help="ROWSxCLASSES ...")
    parser.add_argument("--out", type=Path, help="JSON record instead of that of this machine")
    parser.add_argument("--table", type=int, help="this one alone, in this process, JSON to stdout")
    arguments = parser.parse_args()
    device, tables = arguments.device, TABLES[arguments.device]
    shapes = arguments.shapes or SHAPES[device]
    torch.set_num_threads(arguments.threads)
    if arguments.table is not None:
        table = tables[arguments.table]
        print(json.dumps([measure(size, table, device, arguments.seconds) for size in shapes]))
        return
    words = ["--device", device, "--seconds", str(arguments.seconds)]
    words += ["--threads", str(arguments.threads)]
    words += ["--shapes", *(f"{rows}x{classes}" for rows, classes in shapes)]
    record = {**harness.environment(device, arguments.threads), "tables": []}
    for number, table in enumerate(tables):
        rows = harness.in_fresh_process(__file__, [*words, "--table", str(number)], warm=table.warm)
        print(f"\n{table.title}\n\n{times_table(rows)}")
        if table.peaks:
            print(f"\npeak above student and teacher, MiB\n\n{peaks_table(rows)}")
        record["tables"].append({"title": table.title, "measurements": rows})
    harness.write_record(
        arguments.out or harness.RESULTS / f"kd_loss-{harness.place(device)}.json", record
    )


CASES = [
    pytest.param(device, dtype, *size, id=f"{device}-{str(dtype)[6:]}-{size[0]}x{size[1]}")
    for device in TABLES
    if device == "cpu" or torch.cuda.is_available()
    for dtype in dict.fromkeys(table.dtype for table in TABLES[device])
    for size in SHAPES[device]
]


@pytest.mark.parametrize("method", [OURS, "torch.compile", "eager", "torchdistill", "Liger"])
@pytest.mark.parametrize(("device", "dtype", "rows", "classes"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_kd_loss(
    benchmark: Any, device: str, dtype: torch.dtype, rows: int, classes: int, method: str
) -> None:
    torch.set_num_threads(THREADS)
    data, loss = harness.tensors(rows, classes, device, dtype), losses(device).get(method)
    if loss is None:
        pytest.skip(f"{method} is no peer on this device, or not installed")
    benchmark.extra_info["counted_bytes"] = 3 * data[0].numel() * data[0].element_size()
    run = harness.gradient_step(loss, *data)
    benchmark.pedantic(harness.milliseconds, (run, device), rounds=5, warmup_rounds=2)


if __name__ == "__main__":
    main()
