"""How fast images get through each stage of training, and which stage holds the others up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastscarce.augment import apply, draw, read_policy
from fastscarce.config import BenchDataConfig
from fastscarce.data import Failure, Loader, LoaderBatch, Sampler, Source, inspect, open_source
from fastscarce.data.crop import without_crop
from fastscarce.data.order import Numbers
from fastscarce.data.request import Request, decode_request
from fastscarce.errors import ConfigError, DataError
from fastscarce.models import create
from fastscarce.train.ranges import check_ranges

__all__ = ["Throughput", "bench_data", "measure_data"]

_ROWS = 64  # of a request while stages are timed alone


@dataclass(frozen=True)
class Throughput:
    """Images a second.

    Attributes:
        read: Encoded images, by one process.
        decode: To uint8 of one size, by one process.
        load: Read and decoded ahead, by the loader as it is set.
        augment: The plan drawn and carried out.
        transfer: To the device; None where the images are there already.
        model: Forward and backward of the model.
        together: All of it.
        bottleneck: The stage that holds the others up.
        failures: Images that were met and can't be decoded.
    """

    read: float
    decode: float
    load: float
    augment: float
    transfer: float | None
    model: float
    together: float
    bottleneck: str
    failures: tuple[Failure, ...]


def bench_data(config: BenchDataConfig) -> str:
    """Measure and describe: a line a stage, and the bottleneck.

    Raises:
        ConfigError: A number is out of range.
        DataError: The data can't be read.
    """
    found = measure_data(config)
    kind = "threads of DALI" if config.loader == "dali" else "workers"
    lines = [
        ("read", "one process", found.read),
        ("decode", "one process", found.decode),
        ("read and decode", f"{config.loader}, {config.workers} {kind}", found.load),
        ("augment", config.policy, found.augment),
        ("transfer", "to the device", found.transfer),
        ("model", f"{config.model.name}, forward and backward", found.model),
        ("together", "", found.together),
    ]
    rows = [
        f"{stage:16}{'-' if rate is None else f'{rate:.0f}':>10} images/s  {how}".rstrip()
        for stage, how, rate in lines
    ]
    broken = [f"{one.name} was left out ({one.reason})" for one in found.failures]
    return "\n".join([*rows, f"bottleneck: {found.bottleneck}", *broken])


def measure_data(config: BenchDataConfig) -> Throughput:
    """Time each stage alone, then all together, for ``config.seconds`` each.

    Raises:
        ConfigError: A number is out of range.
        DataError: The data can't be read.
    """
    check_ranges(config)
    if config.seconds <= 0 or config.batch_size < 2:
        raise ConfigError(
            "bench data needs seconds above 0 and a batch_size of at least 2, got"
            f" {config.seconds} and {config.batch_size}."
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    use_gpu = torch.cuda.is_available() and not config.cpu
    device = torch.device("cuda" if use_gpu else "cpu")
    source = open_source(
        config.data,
        image_key=config.image_key,
        label_key=config.label_key,
        id_key=config.id_key,
    )
    if len(source) == 0:
        raise DataError(f"{source.name} has no images; look at what {config.data} names.")
    channels = _channels(source)
    size = source.shape[:2] if source.shape else (config.image_size, config.image_size)
    model = create(
        config.model.name,
        classes=len(source.classes),
        channels=channels,
        image_size=size[0],
        seed=0,
        pretrained=config.model.pretrained,
        drop_rate=config.model.dropout,
        drop_path_rate=config.model.stochastic_depth,
    )
    model = model.to(device).to(memory_format=torch.channels_last)
    policy = read_policy(config.policy)
    sampler = Sampler(source.ids, seed=config.seed, batch_size=config.batch_size, pairs=True)
    clock = _Clock(config.seconds, device)
    failures: dict[int, Failure] = {}

    def batches_of(loader: Loader) -> Iterator[LoaderBatch]:
        while True:
            for batch in loader:
                failures.update({failure.id: failure for failure in batch.failures})
                yield batch

    def loader() -> Loader:
        return Loader(
            source,
            sampler,
            image_size=size,
            channels=channels,
            policy=policy,
            workers=config.workers,
            device=device,
            backend=config.loader,
            on_error="skip",
        )

    def views(batch: LoaderBatch) -> Tensor:
        plan = draw(
            without_crop(policy),
            batch.rows.ids,
            view=batch.rows.view,
            seed=config.seed,
            image_size=(int(batch.images.shape[1]), int(batch.images.shape[2])),
            partners=batch.rows.partners,
        )
        return apply(plan.to(device), batch.images, layout=torch.channels_last)

    def trained(images: Tensor) -> int:
        model(images).float().mean().backward()
        return len(images)

    read = clock.rate(_reading(source))
    decode = clock.rate(_decoding(source, size, channels))
    with loader() as ahead:
        batches = batches_of(ahead)
        first = next(batches)
        load = clock.rate(lambda: len(next(batches).ids))
    augment = clock.rate(lambda: len(views(first)))
    host = first.images.cpu()
    transfer = None if device.type == "cpu" else clock.rate(lambda: len(host.to(device)))
    example = views(first)
    train = clock.rate(lambda: trained(example))
    with loader() as ahead:
        batches = batches_of(ahead)
        together = clock.rate(lambda: trained(views(next(batches))))
    own = {"augment": augment, "transfer": transfer, "model": train}
    rates = {name: rate for name, rate in own.items() if rate is not None}
    if load < 1.0 / sum(1.0 / rate for rate in rates.values()):
        rates = {"read": read, "decode": decode}
    bottleneck = min(rates, key=lambda name: rates[name])
    broken = tuple(failures[number] for number in sorted(failures))
    return Throughput(read, decode, load, augment, transfer, train, together, bottleneck, broken)


class _Clock:
    """Times steps for some seconds, after one that isn't counted."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._seconds = seconds
        self._device = device

    def rate(self, step: Callable[[], int]) -> float:
        """Images a second of a step that says how many it dealt with."""
        step()
        self._wait()
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < self._seconds:
            images += step()
        self._wait()
        return images / (time.perf_counter() - start)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _requests(source: Source) -> Iterator[Numbers]:
    """Positions in the order of an epoch, without end."""
    sampler = Sampler(len(source), seed=0, batch_size=_ROWS)
    while True:
        for batch in sampler:
            yield batch.positions[batch.mask]


def _reading(source: Source) -> Callable[[], int]:
    requests = _requests(source)
    return lambda: len(source.read_each(next(requests)))


def _decoding(source: Source, size: tuple[int, int], channels: int) -> Callable[[], int]:
    """Decoding alone: of samples that are in memory."""
    places = next(_requests(source))
    held = [item for item in source.read_each(places) if not isinstance(item, Failure)]
    if not held:
        raise DataError(f"{source.name} has no readable image among {len(places)} of its samples.")
    request = Request(np.arange(len(held), dtype=np.int64))
    memory = Source(
        name=source.name,
        reader=_Held(held),
        ids=request.positions,
        labels=np.full(len(held), -1, dtype=np.int64),
        classes=source.classes,
        is_test=np.zeros(len(held), dtype=bool),
        flip=source.flip,
        shape=source.shape,
    )

    def step() -> int:
        decode_request(memory, request, image_size=size, channels=channels)
        return len(held)

    return step


@dataclass(frozen=True)
class _Held:
    """Samples in memory."""

    contents: list[Any]

    def read(self, positions: Numbers) -> list[Any]:
        """Some of them."""
        return [self.contents[place] for place in positions.tolist()]


def _channels(source: Source) -> int:
    """Of the first samples that can be read: 1 where all are grey."""
    if source.shape is not None:
        return source.shape[2]
    for content in source.read_each(np.arange(min(len(source), _ROWS))):
        if isinstance(content, bytes):
            try:
                if not inspect(content).grey:
                    return 3
            except DataError:
                continue
    return 1
