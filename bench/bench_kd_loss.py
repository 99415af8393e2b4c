"""kd_loss beside eager PyTorch, torch.compile and torchdistill: forward and backward, float32.

Run ``python bench/bench_kd_loss.py`` for both tables, two threads each: memory warm (glibc kept
from returning freed memory to the system; every method profits) and as it comes. The methods take
turns on the same tensors (A B C A B C ...), so that a busy moment of the machine falls on all of
them; the table holds medians and the ratio of medians. GB/s counts the bytes that have to move:
student and teacher read, gradient written, 12 a logit. ``python bench/plot_kd_loss.py`` draws the
figure. torchdistill comes with ``pip install -e .[bench]``.

``pytest bench/bench_kd_loss.py`` runs the same cases under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchdistill.losses.mid_level import KDLoss as TorchdistillKDLoss

from fastscarce import _ops
from fastscarce.ops import kd_loss

SHAPES = [(65536, 10), (4096, 1000), (1024, 21841), (512, 128256)]
TEMPERATURE, ALPHA, THREADS = 4.0, 0.5, 2
RESULTS = Path(__file__).parent / "results" / "kd_loss.json"
# Blocks of any size come from the heap, and the heap is not trimmed.
WARM = {"MALLOC_MMAP_THRESHOLD_": "8000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return kd_loss(student, teacher, target, temperature=TEMPERATURE, alpha=ALPHA)


def eager(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    distil = F.kl_div(
        F.log_softmax(student / TEMPERATURE, 1),
        F.softmax(teacher / TEMPERATURE, 1),
        reduction="batchmean",
    )
    return ALPHA * TEMPERATURE**2 * distil + (1 - ALPHA) * F.cross_entropy(student, target)


# Its alpha weighs the cross entropy.
_torchdistill = TorchdistillKDLoss("", "output", "", "output", TEMPERATURE, alpha=1 - ALPHA)


def torchdistill(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = _torchdistill({"": {"output": student}}, {"": {"output": teacher}}, target)
    return loss


def methods() -> dict[str, Loss]:
    torch._dynamo.reset()
    return {
        "fastscarce": ours,
        "torch.compile": torch.compile(eager),
        "eager": eager,
        "torchdistill": torchdistill,
    }


def tensors(rows: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows, classes, generator=generator).requires_grad_()
    teacher = torch.randn(rows, classes, generator=generator)
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


def step(loss: Loss, student: Tensor, teacher: Tensor, target: Tensor) -> None:
    student.grad = None
    loss(student, teacher, target).backward()  # type: ignore[no-untyped-call]


def measure(rows: int, classes: int, seconds: float) -> dict[str, Any]:
    """Medians in milliseconds of methods that take turns for `seconds`, at least 5 turns."""
    data = tensors(rows, classes)
    candidates = methods()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for loss in candidates.values():
        step(loss, *data)
        step(loss, *data)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["eager"]) < 5:
        for name, loss in candidates.items():
            begin = time.perf_counter()
            step(loss, *data)
            times[name].append(1e3 * (time.perf_counter() - begin))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rows": rows,
        "classes": classes,
        "turns": len(times["eager"]),
        "milliseconds": median,
        "fastest_milliseconds": {name: min(values) for name, values in times.items()},
        "ratio": {name: median[name] / median["fastscarce"] for name in median},
        "gigabytes_per_second": 12e-6 * rows * classes / median["fastscarce"],
    }


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    others = [name for name in rows[0]["milliseconds"] if name != "fastscarce"]
    head = ["N x C", "fastscarce ms", "GB/s", *(f"{name} ms" for name in others)]
    head += [f"x {name}" for name in others]
    print(f"\n{title}\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        ms, ratio = row["milliseconds"], row["ratio"]
        cells = [f"{row['rows']} x {row['classes']}", f"{ms['fastscarce']:.2f}"]
        cells.append(f"{row['gigabytes_per_second']:.1f}")
        cells += [f"{ms[name]:.2f}" for name in others]
        cells += [f"{ratio[name]:.1f}" for name in others]
        print(f"| {' | '.join(cells)} |")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def environment() -> dict[str, Any]:
    """What figures hold for: command, date, machine, versions."""
    return {
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "threads": THREADS,
        "instruction_set": _ops.isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchdistill": version("torchdistill"),
        "dtype": "float32",
        "temperature": TEMPERATURE,
        "alpha": ALPHA,
    }


def shape(text: str) -> tuple[int, int]:
    rows, classes = text.split("x")
    return int(rows), int(classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="per shape")
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, help="ROWSxCLASSES ...")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of results")
    parser.add_argument("--measure", action="store_true", help="this process only, JSON to stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if arguments.measure:
        print(json.dumps([measure(*size, arguments.seconds) for size in arguments.shapes]))
        return
    tables = {}
    for name, variables in (("warm", WARM), ("as_it_comes", {})):
        clean = {k: v for k, v in os.environ.items() if k not in WARM}
        command = [sys.executable, __file__, "--measure", "--seconds", str(arguments.seconds)]
        command += ["--shapes", *(f"{rows}x{classes}" for rows, classes in arguments.shapes)]
        done = subprocess.run(
            command, env={**clean, **variables}, stdout=subprocess.PIPE, check=True, text=True
        )
        tables[name] = json.loads(done.stdout.splitlines()[-1])
        print_table(
            {"warm": "Memory warm", "as_it_comes": "Memory as it comes"}[name], tables[name]
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record = {**environment(), **tables}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


@pytest.mark.parametrize("method", ["fastscarce", "torch.compile", "eager", "torchdistill"])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
@pytest.mark.filterwarnings("ignore")
def test_kd_loss(benchmark: Any, rows: int, classes: int, method: str) -> None:
    torch.set_num_threads(THREADS)
    data, loss = tensors(rows, classes), methods()[method]
    benchmark.extra_info["counted_bytes"] = 12 * rows * classes
    benchmark.pedantic(step, (loss, *data), rounds=5, warmup_rounds=2)


if __name__ == "__main__":
    main()
