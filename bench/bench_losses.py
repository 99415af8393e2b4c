"""The other losses and the fused head beside their peers: forward and backward.

JSD, DKD and DIST beside eager PyTorch and torch.compile (and Liger-Kernel's JSD on a GPU), as their
papers' code computes them; TopK teachers beside a dense teacher; the fused head beside the layer
and its loss one after the other (and Liger-Kernel's fused head).

``python bench/bench_losses.py`` measures float32 on a CPU with two threads, ``--device cuda``
float32 and bfloat16 on a GPU. Methods take turns on the same tensors; memory is warm, as in
bench_kd_loss.py, but for the head. Its peak is the memory during the step above that before it, the
gradients of features, weight and bias (the same for all) in it.

The record is ``bench/results/losses-PLACE.json``, PLACE as in bench_kd_loss.py. ``pytest bench``
runs the same cases under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import peers
import pytest
import torch
import torch.nn.functional as F
from harness import ALPHA, SHAPES, TEMPERATURE, THREADS, Row, Step
from torch import Tensor

from fastscarce.ops import kd_loss, linear_kd_loss, topk

DTYPES = {"cpu": ["float32"], "cuda": ["float32", "bfloat16"]}
HEADS = {
    "cpu": [(2048, 512, 21841)],  # rows, width, classes
    "cuda": [(2048, 512, 21841), (8192, 2048, 128256)],
}
DIVERGENCES = ["jsd", "dkd", "dist"]
KEPT = 32
HeadSteps = Callable[[str, torch.dtype, int, int, int], tuple[dict[str, Step], float]]
OURS, TOPK = "fastscarce", f"kl, TopK of {KEPT}"


def loss_steps(
    name: str, device: str, dtype: torch.dtype, rows: int, classes: int
) -> dict[str, Step]:
    """Ours first, then its peers."""
    student, teacher, target = harness.tensors(rows, classes, device, dtype)
    ours: dict[str, Any] = {"temperature": TEMPERATURE, "alpha": ALPHA}
    if name == TOPK:
        record = topk(teacher, KEPT)
        return {
            OURS: harness.gradient_step(kd_loss, student, record, target, **ours),
            "dense teacher": harness.gradient_step(kd_loss, student, teacher, target, **ours),
        }
    torch._dynamo.reset()
    eager = peers.EAGER[name]
    found = {"torch.compile": torch.compile(eager), "eager": eager}
    if name == "jsd" and device == "cuda":
        found.update(peers.liger("jsd"))
    options = {**ours, "loss": name}
    harness.check_agreement(
        {
            OURS: partial(kd_loss, **options),
            **{key: peer for key, peer in found.items() if key != "torch.compile"},
        },
        (student, teacher, target),
    )
    return {
        OURS: harness.gradient_step(kd_loss, student, teacher, target, **options),
        **{k: harness.gradient_step(peer, student, teacher, target) for k, peer in found.items()},
    }


def head_steps(
    device: str, dtype: torch.dtype, rows: int, width: int, classes: int
) -> tuple[dict[str, Step], float]:
    """The fused head and the layer before its loss; MiB of the gradients, which both make."""
    layer, _ = _layer(device, dtype, rows, width, classes)
    _, teacher, target = harness.tensors(rows, classes, device, dtype)
    options: dict[str, Any] = {"temperature": TEMPERATURE, "alpha": ALPHA}

    def unfused(*parts: Tensor) -> Tensor:
        loss: Tensor = kd_loss(F.linear(*parts), teacher, target, **options)
        return loss

    gradients = sum(x.numel() * x.element_size() for x in layer) / 2**20
    return {
        OURS: harness.gradient_step(linear_kd_loss, layer, teacher, target, **options),
        "unfused": harness.gradient_step(unfused, layer),
    }, gradients


def two_heads_steps(
    device: str, dtype: torch.dtype, rows: int, width: int, classes: int
) -> tuple[dict[str, Step], float]:
    """Both last layers, JSD alone and no bias: what Liger-Kernel's fused head computes."""
    (features, weight, _), teacher = _layer(device, dtype, rows, width, classes)

    def ours(features: Tensor, weight: Tensor) -> Tensor:
        return linear_kd_loss(
            features,
            weight,
            None,
            teacher,
            loss="jsd",
            temperature=TEMPERATURE,
            alpha=1.0,
            t_squared=False,
        )

    def unfused(features: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(features, weight)
        return kd_loss(
            logits, F.linear(*teacher), loss="jsd", temperature=TEMPERATURE, t_squared=False
        )

    found: dict[str, Callable[..., Tensor]] = {OURS: ours, "unfused": unfused}
    if device == "cuda":
        found.update({k: partial(peer, teacher=teacher) for k, peer in peers.liger_head().items()})
    leaves = (features, weight)
    gradients = sum(x.numel() * x.element_size() for x in leaves) / 2**20
    return {k: harness.gradient_step(of, leaves) for k, of in found.items()}, gradients


HEAD_STEPS: dict[str, HeadSteps] = {"dense teacher": head_steps, "both heads, JSD": two_heads_steps}


def _layer(
    device: str, dtype: torch.dtype, rows: int, width: int, classes: int
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Features, weight and bias of a student; features and weight of a teacher."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        made = torch.randn(*size, generator=generator, device=device, dtype=dtype)
        return made / width**0.5 if size[0] == classes else made

    features, weight = normal(rows, width), normal(classes, width)
    bias = torch.zeros(classes, device=device, dtype=dtype)
    teacher = normal(rows, width), normal(classes, width)
    return (features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()), teacher


def names_for(classes: int) -> list[str]:
    return [*DIVERGENCES, TOPK] if classes > KEPT else DIVERGENCES


def measure_losses(device: str, shapes: list[tuple[int, int]], seconds: float) -> list[Row]:
    found = []
    for dtype in DTYPES[device]:
        for rows, classes in shapes:
            for name in names_for(classes):
                candidates = loss_steps(name, device, getattr(torch, dtype), rows, classes)
                row: Row = {"loss": name, "dtype": dtype, "rows": rows, "classes": classes}
                found.append({**row, **harness.turns(candidates, seconds, device)})
    return found


def measure_heads(device: str, heads: list[tuple[int, int, int]], seconds: float) -> list[Row]:
    found = []
    for dtype in DTYPES[device]:
        for rows, width, classes in heads:
            for name, make in HEAD_STEPS.items():
                candidates, gradients = make(device, getattr(torch, dtype), rows, width, classes)
                row: Row = {"head": name, "dtype": dtype, "rows": rows, "width": width}
                row["classes"] = classes
                row |= harness.turns(candidates, 4 * seconds, device)
                row["gradients_mebibytes"] = gradients
                row["peak_mebibytes"] = {
                    k: harness.peak_of(candidates[k], device) for k in row["milliseconds"]
                }
                found.append(row)
    return found


def losses_table(rows: list[Row]) -> str:
    head = ["N x C", "dtype", "loss", "fastscarce ms", "others ms", "times"]
    lines = []
    for row in rows:
        others = {k: v for k, v in row["milliseconds"].items() if k != OURS}
        line = [f"{row['rows']} x {row['classes']}", row["dtype"], row["loss"]]
        line.append(harness.short(row["milliseconds"][OURS]))
        line.append(", ".join(f"{k} {harness.short(v)}" for k, v in others.items()))
        line.append(", ".join(f"{row['ratio'][k]:.1f}" for k in others))
        lines.append(line)
    return harness.markdown(head, lines)


def heads_table(rows: list[Row]) -> str:
    head = ["N x width to C", "dtype", "teacher", "method", "ms", "times", "peak MiB"]
    lines = []
    for row in rows:
        size = f"{row['rows']} x {row['width']} to {row['classes']}"
        line = [size, row["dtype"], row["head"]]
        for name, ms in row["milliseconds"].items():
            figures = [harness.short(ms), f"{row['ratio'][name]:.2f}"]
            lines.append([*line, name, *figures, harness.short(row["peak_mebibytes"][name])])
        lines.append([*line, "gradients alone", "", "", harness.short(row["gradients_mebibytes"])])
    return harness.markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=list(DTYPES), default="cpu")
    parser.add_argument("--seconds", type=float, default=8.0, help="per loss and shape")
    parser.add_argument("--threads", type=int, default=THREADS, help="of the CPU")
    parser.add_argument("--shapes", nargs="+", type=harness.shape, help="ROWSxCLASSES ...")
    parser.add_argument("--heads", nargs="+", type=_head, help="ROWSxWIDTHxCLASSES ...")
    parser.add_argument("--out", type=Path, help="JSON record instead of that of this machine")
    parser.add_argument(
        "--part", choices=["losses", "heads"], help="this one alone, in this process, JSON"
    )
    arguments = parser.parse_args()
    device = arguments.device
    shapes, heads = arguments.shapes or SHAPES[device], arguments.heads or HEADS[device]
    torch.set_num_threads(arguments.threads)
    if arguments.part:
        measured = (
            measure_losses(device, shapes, arguments.seconds)
            if arguments.part == "losses"
            else measure_heads(device, heads, arguments.seconds)
        )
        print(json.dumps(measured))
        return
    words = ["--device", device, "--seconds", str(arguments.seconds)]
    words += ["--threads", str(arguments.threads)]
    words += ["--shapes", *("x".join(map(str, size)) for size in shapes)]
    words += ["--heads", *("x".join(map(str, size)) for size in heads)]
    record = harness.environment(device, arguments.threads)
    for part, table in (("losses", losses_table), ("heads", heads_table)):
        # Of the head the peak is measured: what is freed has to go back.
        record[part] = harness.in_fresh_process(
            __file__, [*words, "--part", part], warm=part == "losses"
        )
        print(f"\n{table(record[part])}")
    harness.write_record(
        arguments.out or harness.RESULTS / f"losses-{harness.place(device)}.json", record
    )


def _head(text: str) -> tuple[int, int, int]:
    rows, width, classes = text.split("x")
    return int(rows), int(width), int(classes)


DEVICES = [device for device in DTYPES if device == "cpu" or torch.cuda.is_available()]


@pytest.mark.parametrize("method", [OURS, "torch.compile", "eager", "dense teacher", "Liger"])
@pytest.mark.parametrize(
    ("device", "dtype", "rows", "classes", "name"),
    [
        (device, dtype, *size, name)
        for device in DEVICES
        for dtype in DTYPES[device]
        for size in SHAPES[device]
        for name in names_for(size[1])
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_loss(
    benchmark: Any, device: str, dtype: str, rows: int, classes: int, name: str, method: str
) -> None:
    torch.set_num_threads(THREADS)
    run = loss_steps(name, device, getattr(torch, dtype), rows, classes).get(method)
    _benchmark(benchmark, run, device, method)


@pytest.mark.parametrize("method", [OURS, "unfused", "Liger"])
@pytest.mark.parametrize("name", list(HEAD_STEPS))
@pytest.mark.parametrize(
    ("device", "dtype", "rows", "width", "classes"),
    [
        (device, dtype, *size)
        for device in DEVICES
        for dtype in DTYPES[device]
        for size in HEADS[device]
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_head(
    benchmark: Any,
    device: str,
    dtype: str,
    rows: int,
    width: int,
    classes: int,
    name: str,
    method: str,
) -> None:
    torch.set_num_threads(THREADS)
    candidates, _ = HEAD_STEPS[name](device, getattr(torch, dtype), rows, width, classes)
    _benchmark(benchmark, candidates.get(method), device, method)


def _benchmark(benchmark: Any, run: Step | None, device: str, method: str) -> None:
    if run is None:
        pytest.skip(f"{method} is no peer here, or not installed")
    benchmark.pedantic(harness.milliseconds, (run, device), rounds=5, warmup_rounds=2)


if __name__ == "__main__":
    main()
