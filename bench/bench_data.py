"""JPEG files to normalised float32 batches with RandAugment and CutMix, beside other loaders.

Run ``python bench/bench_data.py``. JPEGs of 500x375 pixels are cut from scikit-learn's two
photographs. Every method gives batches of 64 x 3 x 224 x 224 of a random resized crop, a flip,
RandAugment(2, 9), ImageNet's mean and deviation, and CutMix, with two workers or threads:
fastscarce from files, tars, Parquet and the pool, and by DALI; torchvision v2 in a DataLoader;
timm's loader; DALI alone (file reader, its own RandAugment, a random box a batch from torchvision);
and Albumentations, whose transforms that RandAugment names are drawn two at a time.

Methods take turns. In each turn a method starts afresh, its first batches (what workers decode
ahead) are thrown away, and batches are counted for some seconds; the table holds the medians of
images a second and their ratio to the fastest of the others. "Pillow decodes" is what one core
decodes to 500x375, nothing else done.

``--memory`` prints the resident memory of this process and its workers after each of ten epochs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_sources
import harness
import numpy as np
import pytest
import torch
from torch import Tensor

from fastscarce.augment import CutMix, Flip, Policy, RandAugment, ResizedCrop, apply, draw
from fastscarce.data import Loader, Sampler, load_images

IMAGES, BATCH, SIDE, WORKERS, PREFETCH = 2000, 64, 224, 2, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESULTS = Path(__file__).parent / "results" / "data.json"
POLICY = Policy((ResizedCrop(), Flip(), RandAugment(), CutMix(1.0, 1.0)), sampling="nearest")

Batches = Iterator[Tensor]


def fastscarce(kind: str, count: int, backend: Any = "torch") -> Batches:
    source = bench_sources.sources(count)[kind]
    sampler = Sampler(source.ids, seed=0, batch_size=BATCH, pairs=True)
    with Loader(
        source, sampler, image_size=SIDE, policy=POLICY, workers=WORKERS, prefetch=PREFETCH,
        backend=backend,
    ) as loader:  # fmt: skip
        while True:
            for batch in loader:
                assert batch.plan is not None
                batch.plan.mixed_target(batch.labels)
                yield apply(batch.plan, batch.images, mean=MEAN, std=STD)


def pool(count: int) -> Batches:
    images = load_images(bench_sources.sources(count)["folder"], image_size=SIDE)
    pixels = torch.from_numpy(np.asarray(images.images))
    labels = torch.from_numpy(images.labels)
    sampler = Sampler(images.ids, seed=0, batch_size=BATCH, pairs=True)
    while True:
        for rows in sampler:
            plan = draw(POLICY, rows.ids, view=rows.view, seed=0, image_size=SIDE,
                        partners=rows.partners)  # fmt: skip
            index = torch.from_numpy(rows.positions)
            plan.mixed_target(labels[index])
            yield apply(plan, pixels, index=index, mean=MEAN, std=STD)


def _mixed(loader: Any) -> Batches:
    from torchvision.transforms import v2

    mix = v2.CutMix(num_classes=10)
    while True:
        for images, labels in loader:
            yield mix(images, labels)[0]


def torchvision_loader(count: int) -> Batches:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([
        v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip(), v2.RandAugment(2, 9), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
    ])  # fmt: skip
    data = ImageFolder(str(_root(count)), transform)
    return _mixed(
        DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=WORKERS,
                   prefetch_factor=PREFETCH, persistent_workers=True)
    )  # fmt: skip


def timm_loader(count: int) -> Batches:
    from timm.data import Mixup, create_dataset, create_loader

    data = create_dataset("", root=str(_root(count)), split="train", is_training=True)
    loader = create_loader(
        data, input_size=(3, SIDE, SIDE), batch_size=BATCH, is_training=True, use_prefetcher=False,
        auto_augment="rand-m9-n2-mstd0", num_workers=WORKERS, persistent_workers=True,
        device=torch.device("cpu"),
    )  # fmt: skip
    mix = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, num_classes=10)
    while True:
        for images, labels in loader:
            yield mix(images, labels)[0]


def dali_alone(count: int) -> Batches:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug.rand_augment import rand_augment

    @pipeline_def(
        batch_size=BATCH, num_threads=WORKERS, device_id=None, prefetch_queue_depth=PREFETCH,
        enable_conditionals=True,
    )  # fmt: skip
    def pipeline() -> Any:
        encoded, label = fn.readers.file(file_root=str(_root(count)), random_shuffle=True)
        levels = fn.decoders.image_random_crop(encoded, random_area=(0.08, 1.0))
        levels = fn.resize(levels, size=[SIDE, SIDE])
        levels = rand_augment(levels, n=2, m=9, fill_value=0)
        images = fn.crop_mirror_normalize(
            levels, dtype=types.FLOAT, output_layout="CHW", mirror=fn.random.coin_flip(),
            mean=[255 * x for x in MEAN], std=[255 * x for x in STD],
        )  # fmt: skip
        return images, label

    built = pipeline()
    built.build()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            images, label = built.run()
            yield (
                torch.from_numpy(images.as_array()),
                torch.from_numpy(label.as_array())[:, 0].long(),
            )

    return _mixed(batches())


def albumentations(count: int) -> Batches:
    import albumentations as A
    import cv2
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    part = 9 / 30
    drawn = A.SomeOf(
        [
            A.NoOp(), A.AutoContrast(p=1), A.Equalize(p=1), A.Rotate((-30 * part, 30 * part), p=1),
            A.Solarize((1 - part, 1 - part), p=1), A.Posterize(7, p=1),
            A.ColorJitter(0, 0, (1 - 0.9 * part, 1 + 0.9 * part), 0, p=1),
            A.ColorJitter((1 - 0.9 * part, 1 + 0.9 * part), 0, 0, 0, p=1),
            A.ColorJitter(0, (1 - 0.9 * part, 1 + 0.9 * part), 0, 0, p=1), A.Sharpen(p=1),
            A.Affine(shear={"x": (-5, 5), "y": 0}, p=1),
            A.Affine(shear={"x": 0, "y": (-5, 5)}, p=1),
            A.Affine(translate_percent={"x": (-0.13, 0.13), "y": 0}, p=1),
            A.Affine(translate_percent={"x": 0, "y": (-0.13, 0.13)}, p=1),
        ],
        n=2, replace=True, p=1,
    )  # fmt: skip
    transform = A.Compose(
        [A.RandomResizedCrop((SIDE, SIDE)), A.HorizontalFlip(), drawn, A.Normalize(MEAN, STD)]
    )

    def read(path: str) -> Any:
        image: Any = cv2.imread(path)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def augment(image: Any) -> Tensor:
        return torch.from_numpy(transform(image=image)["image"].transpose(2, 0, 1).copy())

    data = ImageFolder(str(_root(count)), augment, loader=read)
    return _mixed(
        DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=WORKERS,
                   prefetch_factor=PREFETCH, persistent_workers=True,
                   worker_init_fn=lambda _: cv2.setNumThreads(1))
    )  # fmt: skip


METHODS: dict[str, Callable[[int], Batches]] = {
    "fastscarce, files": lambda count: fastscarce("folder", count),
    "fastscarce, WebDataset": lambda count: fastscarce("webdataset", count),
    "fastscarce, Parquet": lambda count: fastscarce("parquet", count),
    "fastscarce, files by DALI": lambda count: fastscarce("folder", count, "dali"),
    "fastscarce, pool": pool,
    "torchvision v2": torchvision_loader,
    "timm": timm_loader,
    "DALI alone": dali_alone,
    "Albumentations": albumentations,
}


def _root(count: int) -> Path:
    bench_sources.sources(count)
    return bench_sources.folder() / "files"


def turn(method: Callable[[int], Batches], count: int, seconds: float) -> float:
    """Images a second of a method that starts afresh."""
    with contextlib.closing(method(count)) as batches:  # type: ignore[type-var]
        for _ in range(WORKERS * PREFETCH + 1):
            found = next(batches)
            assert found.shape == (BATCH, 3, SIDE, SIDE)
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            images += len(next(batches))
        return images / (time.perf_counter() - start)


def decoded(count: int) -> float:
    """Images a second that one core decodes by Pillow."""
    from PIL import Image

    contents = bench_sources.photographs(min(count, 200))
    start = time.perf_counter()
    for content in contents:
        Image.open(io.BytesIO(content)).load()
    return len(contents) / (time.perf_counter() - start)


def measure(count: int, seconds: float, turns: int) -> dict[str, float]:
    """Medians of images a second."""
    found: dict[str, list[float]] = {"Pillow decodes, a core": []}
    methods = dict(METHODS)
    for _ in range(turns):
        found["Pillow decodes, a core"].append(decoded(count))
        for name, method in list(methods.items()):
            try:
                found.setdefault(name, []).append(turn(method, count, seconds))
            except ImportError as error:
                print(f"{name} is left out: {error}")
                del methods[name], found[name]
    return {name: statistics.median(values) for name, values in found.items()}


def print_table(rates: dict[str, float]) -> None:
    others = [name for name in rates if not name.startswith(("fastscarce", "Pillow"))]
    fastest = max(rates[name] for name in others)
    rows = [[name, f"{rate:.0f}", f"{rate / fastest:.2f}"] for name, rate in rates.items()]
    print(harness.markdown(["method", "images/s", "x fastest other"], rows))


def resident() -> int:
    """Bytes of memory of this process and its children that no other process shares."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if os.getpid() in (parent, int(folder.name)):
                for line in (folder / "smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += 1024 * int(line.split()[1])
    return total


def memory(count: int, epochs: int) -> list[int]:
    """What is resident after each epoch, MiB."""
    batches = fastscarce("folder", count)
    found = []
    for _ in range(epochs):
        for _ in range(-(-count // BATCH)):
            next(batches)
        found.append(resident() >> 20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES, help="JPEGs that are made")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a method's turn")
    parser.add_argument("--turns", type=int, default=3, help="of each method")
    parser.add_argument("--memory", action="store_true", help="resident memory of ten epochs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of results")
    arguments = parser.parse_args()
    torch.set_num_threads(harness.THREADS)
    if arguments.memory:
        print(*memory(arguments.images, 10), "MiB")
        return
    rates = measure(arguments.images, arguments.seconds, arguments.turns)
    print_table(rates)
    facts = harness.environment("cpu", harness.THREADS)
    del facts["temperature"], facts["alpha"]
    harness.write_record(arguments.out, {**facts, "images_per_second": rates})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_data(benchmark: Any, name: str) -> None:
    torch.set_num_threads(harness.THREADS)
    try:
        with contextlib.closing(METHODS[name](256)) as batches:  # type: ignore[type-var]
            benchmark.pedantic(lambda: next(batches), rounds=5, warmup_rounds=2)
    except ImportError as error:
        pytest.skip(str(error))


if __name__ == "__main__":
    main()
