"""What the benchmarks share: steps in turns, peaks of memory, a copy's bandwidth, records."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastscarce import _ops

TEMPERATURE, ALPHA, THREADS = 4.0, 0.5, 2
SHAPES = {
    "cpu": [(65536, 10), (4096, 1000), (1024, 21841), (512, 128256)],
    "cuda": [(256, 1000), (4096, 1000), (8192, 1000), (4096, 21841), (8192, 128256)],
}
RESULTS = Path(__file__).parent / "results"
# Blocks of any size come from the heap, and the heap is not trimmed.
WARM = {"MALLOC_MMAP_THRESHOLD_": "8000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}
COPIED = 256  # MiB, far more than a last-level cache holds
LEAST_TURNS = 5

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], Any]
Row = dict[str, Any]


def tensors(
    rows: int, classes: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, which wants a gradient, teacher and labels."""
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(rows, classes, generator=generator, device=device, dtype=dtype)

    student, teacher = normal().requires_grad_(), normal()
    return student, teacher, torch.randint(classes, (rows,), generator=generator, device=device)


def gradient_step(of: Callable[..., Tensor], student: Any, /, *others: Any, **options: Any) -> Step:
    """Forward and backward of ``of(student, *others, **options)``.

    ``student`` is the tensor whose gradient is made, or a tuple of several.
    """
    leaves = student if isinstance(student, tuple) else (student,)
    return lambda: torch.autograd.grad(of(*leaves, *others, **options), leaves)


def check_agreement(losses: dict[str, Loss], data: tuple[Tensor, Tensor, Tensor]) -> None:
    """What is compared has one value, in float32; the first is what the others are held to."""
    if data[0].dtype != torch.float32:
        return
    with torch.no_grad():
        first, *others = (loss(*data) for loss in losses.values())
    for value in others:
        torch.testing.assert_close(value, first, rtol=1e-3, atol=1e-4)


def replay(run: Step) -> Step:
    """The step captured in a CUDA graph and replayed on the same tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def play() -> Any:
        graph.replay()
        return result

    return play


def milliseconds(run: Step, device: str) -> float:
    """Of one step. On a GPU from the launch on an idle device to the end of its last kernel."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    result = run()
    spent = 1e3 * (time.perf_counter() - start)
    del result
    return spent


def that_fit(steps: dict[str, Step]) -> dict[str, Step]:
    """Steps that have run twice; one that a GPU's memory is too small for is named and left out."""
    found = {}
    for name, run in steps.items():
        try:
            run()
            run()
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory, left out.", file=sys.stderr)
            torch.cuda.empty_cache()
            continue
        found[name] = run
    return found


def turns(steps: dict[str, Step], seconds: float, device: str = "cpu") -> Row:
    """Times of steps that take turns (A B C A B C ...) for `seconds`, at least 5 turns.

    A busy moment of the machine falls on all of them. Each timed step follows an untimed one of the
    same method, so that it finds code and caches as it left them itself, and pays for writing back
    nothing that another method left. Medians and least, in milliseconds, and the ratio of the
    medians to that of the first.
    """
    steps = that_fit(steps)
    times: dict[str, list[float]] = {name: [] for name in steps}
    first = next(iter(times))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[first]) < LEAST_TURNS:
        for name, run in steps.items():
            run()
            times[name].append(milliseconds(run, device))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "turns": len(times[first]),
        "milliseconds": median,
        "fastest_milliseconds": {name: min(values) for name, values in times.items()},
        "ratio": {name: value / median[first] for name, value in median.items()},
    }


def copy_times(device: str, mebibytes: int = COPIED, times: int = 7) -> list[float]:
    """GB/s of ``b.copy_(a)`` in memory that was written before: bytes read plus bytes written."""
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.zeros_like(source)
    read_and_written = 2 * source.numel() * source.element_size()
    target.copy_(source)
    spent = [milliseconds(lambda: target.copy_(source), device) for _ in range(times)]
    return [1e-6 * read_and_written / one for one in spent]


def peak_of(run: Step, device: str = "cpu") -> float | None:
    """Most memory during a step, above that before it, in MiB. Run the step once before.

    Of the caching allocator on a GPU; on Linux the process's resident memory, after everything
    that was freed has gone back; None elsewhere.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return float(torch.cuda.max_memory_allocated() - before) / 2**20
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the high-water mark falls to what is resident
    resident = _status("VmRSS")
    result = run()
    most = _status("VmHWM")
    del result
    return most - resident


def _status(field: str) -> float:
    """A line of the process's status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return float(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def in_fresh_process(script: str, words: Sequence[str], *, warm: bool = False) -> Any:
    """What ``script words`` prints last, as JSON; `warm`: freed memory stays in the process."""
    clean = {k: v for k, v in os.environ.items() if k not in WARM}
    done = subprocess.run(
        [sys.executable, script, *words],
        env={**clean, **(WARM if warm else {})},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def processor() -> str:
    """Name, family and model: the name alone says little."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    fields: dict[str, str] = {}
    for line in info.read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    name = fields.get("model name", platform.machine())
    if "cpu family" not in fields:
        return name
    return f"{name} (family {fields['cpu family']}, model {fields['model']})"


def place(device: str) -> str:
    """Names the machine's records: ``cpu-avx2``, ``cpu-avx512``, ``cuda-sm90``."""
    if device == "cuda":
        return "cuda-sm{}{}".format(*torch.cuda.get_device_capability())
    return f"cpu-{_ops.isa()}"


def environment(device: str, threads: int) -> Row:
    """What figures hold for: command, date, machine, versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchdistill", "liger-kernel", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found: Row = {
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "threads": threads,
        "instruction_set": _ops.isa(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["compute_capability"] = torch.cuda.get_device_capability()
        versions["cuda"] = str(torch.version.cuda)
    return {**found, "versions": versions, "temperature": TEMPERATURE, "alpha": ALPHA}


def write_record(path: Path, record: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{path}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as it stands in a README."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def short(number: float | None) -> str:
    """Three digits or the whole part; nothing for what was not measured."""
    if number is None:
        return ""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def shape(text: str) -> tuple[int, int]:
    """``4096x1000`` as rows and classes."""
    rows, classes = text.split("x")
    return int(rows), int(classes)
