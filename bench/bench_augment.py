"""Augmentation beside its peers: uint8 images in memory to normalised float32, two threads.

Run ``python bench/bench_augment.py``. Two jobs, at 64 x 3 x 224 x 224 and 256 x 3 x 32 x 32:

- randaugment: RandAugment(2, 9), CutMix of alpha 1 with its labels, normalisation.
- weak: flip, rotation to 8 degrees, scale to 5 %, translation to 1/16, bilinear; normalisation.

The methods take turns (A B C A B C ...), so that a busy moment of the machine falls on all of them;
the table holds medians and ratios of medians. Drawing is part of every method's time. Peers get
their images as they like them best (PIL images, or channels first), made before the clock starts;
those that work image by image get a pool of two Python threads. Per sample: torchvision's and
timm's RandAugment called on each image, DALI, and Kornia's flip and affine. Per batch, one draw for
all images: Kornia's and torchvision's RandAugment on a batch. All but fastscarce and timm draw one
CutMix box a batch; DALI has none, and is given torchvision's. Warps of RandAugment are nearest, as
torchvision's default is, but for Kornia and DALI, which have bilinear alone; fastscarce is timed
both ways. A peer that is not installed is left out, and said so.

A second table says what drawing plans takes of a loop of drawing and carrying out alone, summed
over the loop: a draw a batch, and `draw_batches` for 64 at once.

``pytest bench/bench_augment.py`` runs the same cases under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from torch import Tensor

from fastscarce.augment import apply, draw, draw_batches, get_policy

SIZES = [(64, 224), (256, 32)]
JOBS = ("randaugment", "weak")
THREADS = 2
DRAWN_AT_ONCE = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESULTS = Path(__file__).parent / "results" / "augment.json"

Step = Callable[[], Any]
_NEAREST = get_policy("randaugment(2, 9)+cutmix")
_POLICIES = {"randaugment": _NEAREST, "weak": get_policy("weak")}


@functools.cache
def pool_of_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS)


@functools.cache
def batch(rows: int, side: int) -> Tensor:
    """Crops of scikit-learn's photographs, uint8 ``(rows, side, side, 3)``."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    place = np.random.default_rng(0)
    images = np.empty((rows, side, side, 3), dtype=np.uint8)
    for row in range(rows):
        photograph = photographs[row % 2]
        step = 1 if side > 100 else 4
        top = place.integers(0, photograph.shape[0] - step * side + 1)
        left = place.integers(0, photograph.shape[1] - step * side + 1)
        images[row] = photograph[top : top + step * side : step, left : left + step * side : step]
    return torch.from_numpy(images)


def labels_of(rows: int) -> Tensor:
    return torch.arange(rows) % 10


# ---- the methods: (job, rows, side) to a step


def fastscarce(job: str, rows: int, side: int, **changes: Any) -> Step:
    from dataclasses import replace

    images, labels, ids = batch(rows, side), labels_of(rows), np.arange(rows)
    policy = replace(_POLICIES[job], **changes)
    views = iter(range(1 << 31))

    def step() -> Any:
        plan = draw(policy, ids, view=next(views), seed=0, image_size=side)
        return apply(plan, images, mean=MEAN, std=STD), plan.mixed_target(labels)

    return step


def fastscarce_bilinear(job: str, rows: int, side: int) -> Step:
    return fastscarce(job, rows, side, sampling="bilinear")


def _normalise(levels: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import normalize

    normalised: Tensor = normalize(levels.float().div_(255.0), MEAN, STD, inplace=True)
    return normalised


def _torchvision(job: str) -> Any:
    from torchvision.transforms import v2

    if job == "randaugment":
        return v2.RandAugment(2, 9)
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(
                8,
                translate=(0.0625, 0.0625),
                scale=(0.95, 1.05),
                interpolation=v2.InterpolationMode.BILINEAR,
            ),
        ]
    )


def _cutmix(job: str) -> Callable[[Tensor, Tensor], Any]:
    from torchvision.transforms import v2

    if job == "randaugment":
        mix: Callable[[Tensor, Tensor], Any] = v2.CutMix(num_classes=10)
        return mix
    return lambda images, labels: (images, labels)


def torchvision_per_image(job: str, rows: int, side: int) -> Step:
    images = batch(rows, side).permute(0, 3, 1, 2).contiguous()
    change, mix, labels = _torchvision(job), _cutmix(job), labels_of(rows)

    def step() -> Any:
        changed = torch.stack(list(pool_of_threads().map(change, images)))
        return mix(_normalise(changed), labels)

    return step


def torchvision_per_batch(job: str, rows: int, side: int) -> Step:
    images = batch(rows, side).permute(0, 3, 1, 2).contiguous()
    change, mix, labels = _torchvision(job), _cutmix(job), labels_of(rows)
    return lambda: mix(_normalise(change(images)), labels)


def timm_pil(job: str, rows: int, side: int) -> Step:
    from PIL import Image
    from timm.data import Mixup
    from timm.data.auto_augment import rand_augment_transform

    images = [Image.fromarray(image.numpy()) for image in batch(rows, side)]
    labels = labels_of(rows)
    if job == "randaugment":
        change = rand_augment_transform("rand-m9-n2", {"img_mean": (0, 0, 0)})
        mix = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, mode="elem", num_classes=10)
    else:
        change, mix = _torchvision(job), lambda images, labels: (images, labels)

    def one(image: Any) -> Tensor:
        return torch.from_numpy(np.array(change(image))).permute(2, 0, 1)

    def step() -> Any:
        changed = torch.stack(list(pool_of_threads().map(one, images)))
        return mix(_normalise(changed), labels)

    return step


def kornia_eager(job: str, rows: int, side: int) -> Step:
    import kornia.augmentation as k

    images = batch(rows, side).permute(0, 3, 1, 2).contiguous()
    labels = labels_of(rows)
    normalise = k.Normalize(MEAN, STD)
    if job == "weak":
        change = k.AugmentationSequential(
            k.RandomHorizontalFlip(),
            k.RandomAffine(8, (0.0625, 0.0625), (0.95, 1.05), p=1.0),
            normalise,
        )
        return lambda: change(images.float().div_(255.0))
    chosen = k.auto.RandAugment(2, 9)
    mix = k.RandomCutMixV2(data_keys=["input", "class"], p=1.0)

    def step() -> Any:
        return mix(normalise(chosen(images.float().div_(255.0))), labels)

    return step


def dali_cpu(job: str, rows: int, side: int) -> Step:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug.rand_augment import rand_augment

    images, mix, labels = batch(rows, side).numpy(), _cutmix(job), labels_of(rows)

    @pipeline_def(
        batch_size=rows,
        num_threads=THREADS,
        device_id=None,
        enable_conditionals=True,
        prefetch_queue_depth=1,
    )
    def pipeline() -> Any:
        levels = fn.external_source(source=lambda: images, batch=True, layout="HWC")
        if job == "randaugment":
            levels = rand_augment(levels, n=2, m=9, shape=(side, side))
        else:
            angle = fn.random.uniform(range=(-8.0, 8.0))
            scale = fn.random.uniform(range=(0.95, 1.05))
            offset = fn.random.uniform(range=(-0.0625 * side, 0.0625 * side), shape=2)
            centre = (side / 2, side / 2)
            matrix = fn.transforms.rotation(angle=angle, center=centre)
            matrix = fn.transforms.scale(matrix, scale=fn.stack(scale, scale), center=centre)
            matrix = fn.transforms.translation(matrix, offset=offset)
            levels = fn.warp_affine(levels, matrix, fill_value=0, interp_type=types.INTERP_LINEAR)
        return fn.crop_mirror_normalize(
            levels,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * x for x in MEAN],
            std=[255 * x for x in STD],
            mirror=fn.random.coin_flip() if job == "weak" else 0,
        )

    built = pipeline()
    built.build()

    def step() -> Any:
        (result,) = built.run()
        return mix(torch.from_numpy(result.as_array()), labels)

    return step


METHODS: dict[str, Callable[[str, int, int], Step]] = {
    "fastscarce": fastscarce,
    "fastscarce, bilinear": fastscarce_bilinear,
    "torchvision per image": torchvision_per_image,
    "timm (PIL)": timm_pil,
    "DALI CPU": dali_cpu,
    "Kornia": kornia_eager,
    "torchvision per batch": torchvision_per_batch,
}
_PER_BATCH = {("randaugment", "Kornia"), *((job, "torchvision per batch") for job in JOBS)}


def steps_of(job: str, rows: int, side: int) -> dict[str, Step]:
    """The methods of a job that are installed."""
    found = {}
    for name, method in METHODS.items():
        if job == "weak" and name == "fastscarce, bilinear":
            continue  # the weak view is bilinear already
        try:
            found[name] = method(job, rows, side)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return found


def measure(job: str, rows: int, side: int, seconds: float) -> dict[str, Any]:
    """Medians of interleaved turns in milliseconds."""
    steps = steps_of(job, rows, side)
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["fastscarce"]) < 7:
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"job": job, "rows": rows, "side": side, "turns": len(times["fastscarce"]),
            "milliseconds": medians}  # fmt: skip


def measure_drawing(job: str, rows: int, side: int, seconds: float) -> dict[str, Any]:
    """What drawing takes of a loop, for plans drawn one by one and many at once."""
    images, ids = batch(rows, side), np.arange(rows)
    found: dict[str, Any] = {"job": job, "rows": rows, "side": side}
    for at_once in (1, DRAWN_AT_ONCE):
        drawing = loop = 0.0
        batches, view, count = [ids] * at_once, 0, 0
        end = time.perf_counter() + seconds
        while (begin := time.perf_counter()) < end or count == 0:
            if at_once == 1:
                plans = [draw(_POLICIES[job], ids, view=view, seed=0, image_size=side)]
            else:
                views = np.arange(view, view + at_once)
                plans = draw_batches(_POLICIES[job], batches, view=views, seed=0, image_size=side)
            drawn = time.perf_counter()
            for plan in plans:
                apply(plan, images, mean=MEAN, std=STD)
            view += at_once
            if view > at_once:  # the first turn compiles and warms
                drawing += drawn - begin
                loop += time.perf_counter() - begin
                count += at_once
        found[str(at_once)] = {"microseconds": 1e6 * drawing / count, "share": drawing / loop}
    return found


def print_drawing(results: list[dict[str, Any]]) -> None:
    print(f"\n| job | batch | a draw a batch | % | {DRAWN_AT_ONCE} at once | % |")
    print("|---|---|---|---|---|---|")
    for result in results:
        cells = [
            f"{result[str(n)]['microseconds']:.0f} us | {100 * result[str(n)]['share']:.1f}"
            for n in (1, DRAWN_AT_ONCE)
        ]
        print(f"| {result['job']} | {result['rows']} x {result['side']} | {' | '.join(cells)} |")


def print_table(results: list[dict[str, Any]]) -> None:
    for result in results:
        ms = result["milliseconds"]
        print(f"\n{result['job']}, {result['rows']} x 3 x {result['side']} x {result['side']}")
        print("| method | draws a | ms | x fastscarce |\n|---|---|---|---|")
        for name, value in ms.items():
            draws = "batch" if (result["job"], name) in _PER_BATCH else "sample"
            print(f"| {name} | {draws} | {value:.2f} | {value / ms['fastscarce']:.2f} |")


def versions() -> dict[str, str]:
    found = {}
    for name in ("kornia", "torchvision", "timm", "nvidia-dali-cuda130", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="per job and size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of results")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    results = [measure(job, *size, arguments.seconds) for job in JOBS for size in SIZES]
    drawing = [measure_drawing(j, *size, arguments.seconds / 6) for j in JOBS for size in SIZES]
    print_table(results)
    print_drawing(drawing)
    facts = harness.environment("cpu", THREADS)
    del facts["temperature"], facts["alpha"]
    facts["versions"] |= versions()
    harness.write_record(arguments.out, {**facts, "results": results, "drawing": drawing})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "side"), SIZES)
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.filterwarnings("ignore")
def test_augment(benchmark: Any, job: str, rows: int, side: int, method: str) -> None:
    torch.set_num_threads(THREADS)
    try:
        step = METHODS[method](job, rows, side)
    except ImportError as error:
        pytest.skip(str(error))
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)


if __name__ == "__main__":
    main()
