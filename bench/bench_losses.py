"""The other losses beside their peers: forward and backward, float32, two threads.

JSD, DKD and DIST beside eager PyTorch and torch.compile; TopK teachers beside a dense teacher; the
fused head beside the layer and its loss one after the other.

Run ``python bench/bench_losses.py``. Methods take turns on the same tensors, memory is warm, as in
bench_kd_loss.py. The peak of the head is the resident memory above what was there before the step,
watched by a thread, with the gradients of features, weight and bias (the same for both) in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_kd_loss import ALPHA, SHAPES, TEMPERATURE, THREADS, WARM, environment, tensors
from torch import Tensor

from fastscarce.ops import kd_loss, linear_kd_loss, topk

RESULTS = Path(__file__).parent / "results" / "losses.json"
HEAD = (2048, 512, 21841)  # rows, width, classes
KEPT = 32

Step = Callable[[], Any]


def eager_jsd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    log_q = F.log_softmax(student / TEMPERATURE, 1)
    p = F.softmax(teacher / TEMPERATURE, 1)
    log_m = (0.5 * (p + log_q.exp())).log()
    distil = 0.5 * F.kl_div(log_m, p, reduction="batchmean")
    distil = distil + 0.5 * F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return ALPHA * TEMPERATURE**2 * distil + (1 - ALPHA) * F.cross_entropy(student, target)


def eager_dkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    label = F.one_hot(target, student.shape[1]).to(student.dtype)
    q, p = (F.softmax(x / TEMPERATURE, 1) for x in (student, teacher))
    q_label, p_label = (q * label).sum(1), (p * label).sum(1)
    binary_q = torch.stack([q_label, (q * (1 - label)).sum(1)], 1)
    binary_p = torch.stack([p_label, (p * (1 - label)).sum(1)], 1)
    tckd = F.kl_div(binary_q.log(), binary_p, reduction="batchmean")
    nckd = F.kl_div(
        F.log_softmax(student / TEMPERATURE - 1000 * label, 1),
        F.softmax(teacher / TEMPERATURE - 1000 * label, 1),
        reduction="batchmean",
    )
    distil = TEMPERATURE**2 * (tckd + 8 * nckd)
    return ALPHA * distil + (1 - ALPHA) * F.cross_entropy(student, target)


def eager_dist(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    q, p = (F.softmax(x / TEMPERATURE, 1) for x in (student, teacher))

    def apart(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - F.cosine_similarity(a, b, dim=1, eps=1e-8).mean()

    distil = TEMPERATURE**2 * (apart(q, p) + apart(q.T, p.T))
    return ALPHA * distil + (1 - ALPHA) * F.cross_entropy(student, target)


def turns(steps: dict[str, Step], seconds: float) -> dict[str, float]:
    """Medians in milliseconds of steps that take turns, at least 5 of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in steps.values():
        run()
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in steps.items():
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def losses(rows: int, classes: int, seconds: float) -> list[dict[str, Any]]:
    student, teacher, target = tensors(rows, classes)
    found = []

    def gradient_of(of: Callable[..., Tensor], *arguments: Any, **options: Any) -> Step:
        return lambda: torch.autograd.grad(of(student, *arguments, **options), student)

    ours: dict[str, Any] = {"temperature": TEMPERATURE, "alpha": ALPHA}
    for name, eager in (("jsd", eager_jsd), ("dkd", eager_dkd), ("dist", eager_dist)):
        with torch.no_grad():
            same = kd_loss(student, teacher, target, loss=name, **ours)
            torch.testing.assert_close(same, eager(student, teacher, target), rtol=1e-3, atol=1e-4)
        torch._dynamo.reset()
        steps = {
            "fastscarce": gradient_of(kd_loss, teacher, target, loss=name, **ours),
            "torch.compile": gradient_of(torch.compile(eager), teacher, target),
            "eager": gradient_of(eager, teacher, target),
        }
        found.append({"loss": name, "milliseconds": turns(steps, seconds)})
    if classes > KEPT:
        record = topk(teacher, KEPT)
        steps = {
            "fastscarce": gradient_of(kd_loss, record, target, **ours),
            "dense teacher": gradient_of(kd_loss, teacher, target, **ours),
        }
        found.append({"loss": f"kl, TopK of {KEPT}", "milliseconds": turns(steps, seconds)})
    return [{"rows": rows, "classes": classes, **one} for one in found]


def resident() -> float:
    """Resident memory of the process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_of(run: Step) -> float:
    """Most resident memory during a step, above that before it, in MiB."""
    before, most, done = resident(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, resident() - before)
            time.sleep(5e-4)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = run()
    done.set()
    watcher.join()
    del result
    return most


def head(seconds: float) -> dict[str, Any]:
    rows, width, classes = HEAD
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = (torch.randn(classes, width, generator=generator) / width**0.5).requires_grad_()
    bias = torch.zeros(classes, requires_grad=True)
    _, teacher, target = tensors(rows, classes)
    layer = (features, weight, bias)

    def fused() -> Any:
        loss = linear_kd_loss(*layer, teacher, target, temperature=TEMPERATURE, alpha=ALPHA)
        return torch.autograd.grad(loss, layer)

    def unfused() -> Any:
        logits = F.linear(*layer)
        loss = kd_loss(logits, teacher, target, temperature=TEMPERATURE, alpha=ALPHA)
        return torch.autograd.grad(loss, layer)

    fused()
    # The allocator gives back what it freed, in this process: the peak of each counts for itself.
    peaks = {"fastscarce": peak_of(fused), "unfused": peak_of(unfused)}
    results = 4 * (features.numel() + weight.numel() + bias.numel()) / 2**20
    return {
        "rows": rows,
        "width": width,
        "classes": classes,
        "milliseconds": turns({"fastscarce": fused, "unfused": unfused}, seconds),
        "peak_mebibytes": peaks,
        "gradients_mebibytes": results,
    }


def measure(part: str, seconds: float) -> str:
    torch.set_num_threads(THREADS)
    if part == "head":
        return json.dumps(head(4 * seconds))
    return json.dumps([one for size in SHAPES for one in losses(*size, seconds)])


def main() -> None:
    parser = argparse.ArgumentParser(description="The other losses beside their peers.")
    parser.add_argument("--seconds", type=float, default=8.0, help="per loss and shape")
    parser.add_argument("--measure", choices=["losses", "head"], help="this process only, JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(arguments.measure, arguments.seconds))
        return
    clean = {k: v for k, v in os.environ.items() if k not in WARM}
    found: dict[str, Any] = {}
    for part, variables in (("losses", WARM), ("head", {})):
        command = [sys.executable, __file__, "--measure", part, "--seconds", str(arguments.seconds)]
        done = subprocess.run(
            command, env={**clean, **variables}, stdout=subprocess.PIPE, check=True, text=True
        )
        found[part] = json.loads(done.stdout.splitlines()[-1])
    print("\n| N x C | loss | fastscarce ms | others ms | times |\n|---|---|---|---|---|")
    for row in found["losses"]:
        ms = row["milliseconds"]
        others = {name: value for name, value in ms.items() if name != "fastscarce"}
        cells = [f"{row['rows']} x {row['classes']}", row["loss"], f"{ms['fastscarce']:.2f}"]
        cells.append(", ".join(f"{name} {value:.2f}" for name, value in others.items()))
        cells.append(", ".join(f"{value / ms['fastscarce']:.1f}" for value in others.values()))
        print(f"| {' | '.join(cells)} |")
    print(f"\nfused head: {found['head']}")
    RESULTS.write_text(json.dumps({**environment(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
