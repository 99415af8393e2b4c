"""Batches of decoded images: in the sampler's order, ahead of their use, on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastscarce.augment import Plan, Policy, draw, get_policy
from fastscarce.data.backend import open_backend
from fastscarce.data.crop import Boxes, crop_boxes, without_crop
from fastscarce.data.order import Numbers
from fastscarce.data.request import Decoded, Request, decode_request
from fastscarce.data.sampler import Sampler, SamplerBatch
from fastscarce.data.source import Failure, Source
from fastscarce.data.standin import stand_ins
from fastscarce.errors import DataError

__all__ = ["Loader", "LoaderBatch", "OnError"]

OnError = Literal["raise", "skip", "replace"]

_TRIES = 16  # samples that may stand in for one that is broken


@dataclass(frozen=True)
class LoaderBatch:
    """One process's rows of a global batch.

    Attributes:
        images: uint8 ``(rows, height, width, channels)`` on the loader's device, cropped as the
            policy's resized crop says where it begins with one.
        ids: Of the samples, int64 ``(rows,)`` on the CPU.
        labels: int64 ``(rows,)`` on the device, -1 where there is none.
        mask: Whether a row counts, bool ``(rows,)`` on the device: False for padding, and for a
            sample that was skipped.
        plan: What is still to be done to the images, on the device: `fastscarce.augment.apply`
            carries it out. None where the loader has no policy.
        rows: The sampler's batch, as it was carried out.
        failures: Samples of this batch that could not be decoded.
    """

    images: Tensor
    ids: Tensor
    labels: Tensor
    mask: Tensor
    plan: Plan | None
    rows: SamplerBatch
    failures: tuple[Failure, ...]


class Loader:
    """Reads, decodes and crops a sampler's batches in worker processes.

    The order, the sharding and the state are the sampler's: the loader moves the sampler on when a
    batch is handed out, not when it is read ahead. So `state_dict` of either says where to resume,
    and under several processes each loader has its own sampler's share; don't hand it to
    Accelerate's ``prepare``.

    Args:
        source: Where the samples come from.
        sampler: Over ids of the source.
        image_size: Side of the images in pixels, or height and width.
        channels: Of the images, 1 or 3.
        policy: What is done to them, by name or `Policy`. A resized crop at its beginning is done
            here, from all of the image's pixels, and the rest is planned.
        seed: Of the views; None: the sampler's.
        workers: Processes that decode, or threads of DALI; 0 decodes in this process.
        prefetch: Batches that each worker is ahead.
        device: Where the batches go: on a GPU a batch ahead, from pinned memory.
        backend: ``torch``, or ``dali`` where the extra ``dali`` is installed.
        on_error: What to do about a sample that can't be read or decoded. ``raise``; ``skip``: its
            row is masked; ``replace``: it gets the pixels of another one of its label, chosen by
            its id.

    Raises:
        ValueError: A number is out of range, the sampler has ids that the source hasn't, or it
            deals no pairs and the policy mixes.
        ConfigError: DALI is asked for and not installed.
    """

    def __init__(
        self,
        source: Source,
        sampler: Sampler,
        *,
        image_size: int | tuple[int, int],
        channels: int = 3,
        policy: str | Policy | None = None,
        seed: int | None = None,
        workers: int = 2,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
        backend: Literal["torch", "dali"] = "torch",
        on_error: OnError = "raise",
    ) -> None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or min(size) < 1 or channels not in (1, 3):
            raise ValueError(
                "Loader needs an image_size of at least 1 pixel and 1 or 3 channels, got"
                f" {image_size} and {channels}."
            )
        if workers < 0 or prefetch < 1:
            raise ValueError(
                f"Loader needs workers of 0 or more and prefetch of 1 or more, got {workers} and"
                f" {prefetch}."
            )
        if on_error not in ("raise", "skip", "replace"):
            raise ValueError(f"Loader needs on_error raise, skip or replace, got {on_error!r}.")
        chosen = None if policy is None else get_policy(policy)
        if chosen is not None and chosen.mixes and not sampler.pairs:
            raise ValueError(
                "Loader needs a sampler with pairs=True for a policy that mixes two images; without"
                " partners it would mix none."
            )
        self.source = source
        self.sampler = sampler
        self.failures: dict[int, Failure] = {}
        """What could not be decoded so far, by id."""
        self._place = _places(source, sampler)
        self._size = size
        self._channels = channels
        self._policy = chosen
        self._own_seed = seed
        self._device = torch.device(device)
        self._on_error = on_error
        self._backend = open_backend(
            backend,
            source,
            image_size=size,
            channels=channels,
            rows=len(sampler.batch(0, 0).ids),
            workers=workers,
            prefetch=prefetch,
            device=self._device,
        )
        self._decoded: Iterator[Decoded] | None = None
        self._ahead: deque[LoaderBatch] = deque()
        self._next: dict[str, int] | None = None
        self._copies = torch.cuda.Stream() if self._device.type == "cuda" else None

    @property
    def _seed(self) -> int:
        """Of the views: the sampler's may be another one since its state was restored."""
        return self.sampler.seed if self._own_seed is None else self._own_seed

    def __len__(self) -> int:
        """Batches of a whole epoch, the same for each process."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[LoaderBatch]:
        """Batches from where the sampler stands to the end of the epoch.

        Raises:
            DataError: A sample can't be decoded and ``on_error`` is ``raise``, a worker died, or
                shared memory is full.
        """
        epoch = self.sampler.epoch
        while self.sampler.epoch == epoch:
            batch = self._following()
            self.sampler.load_state_dict(batch.rows.state)
            self._next = batch.rows.state
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """`Sampler.set_epoch`."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """`Sampler.state_dict`: after the last batch that was handed out."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """`Sampler.load_state_dict`."""
        self.sampler.load_state_dict(state)

    def close(self) -> None:
        """End the workers; iterating again starts new ones."""
        self._decoded, self._next = None, None
        self._ahead.clear()
        self._backend.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _following(self) -> LoaderBatch:
        """The next batch; on a GPU the one after it is on its way already."""
        state = self.sampler.state_dict()
        if self._decoded is None or state != self._next:
            self.close()
            self._asked: deque[SamplerBatch] = deque()
            # Nothing in it leads back here: a loader that is let go of ends its workers at once.
            requests = _requests(self.sampler, state, self._asked, self._place, self._cropped())
            self._decoded = self._backend.start(requests)
        try:
            while len(self._ahead) < (1 if self._copies is None else 2):
                self._ahead.append(self._finished(next(self._decoded)))
        except BaseException:
            self.close()
            raise
        batch = self._ahead.popleft()
        if self._copies is not None:
            torch.cuda.current_stream().wait_stream(self._copies)
            batch.images.record_stream(torch.cuda.current_stream())
        return batch

    def _cropped(self) -> Callable[[SamplerBatch], Boxes | None]:
        """What a batch's images are cropped to before the plan is carried out."""
        policy, seed, size = self._policy, self._seed, self._size

        def boxes(rows: SamplerBatch) -> Boxes | None:
            if policy is None:
                return None
            return crop_boxes(policy, rows.ids, view=rows.view, seed=seed, image_size=size)

        return boxes

    def _finished(self, decoded: Decoded) -> LoaderBatch:
        """A batch of what came back, on its way to the device."""
        rows, images = self._asked.popleft(), decoded.images
        if decoded.failures:
            rows, images = self._mended(rows, decoded)
        plan = None
        if self._policy is not None:
            plan = draw(
                without_crop(self._policy),
                rows.ids,
                view=rows.view,
                seed=self._seed,
                image_size=self._size,
                partners=rows.partners,
            )
        labels = torch.from_numpy(self.source.labels[self._place[rows.positions]])
        mask = torch.from_numpy(rows.mask)
        if self._copies is not None:
            with torch.cuda.stream(self._copies):
                images = images.to(self._device, non_blocking=True)
                labels, mask = labels.to(self._device), mask.to(self._device)
                plan = None if plan is None else plan.to(self._device)
        return LoaderBatch(
            images=images,
            ids=torch.from_numpy(rows.ids),
            labels=labels,
            mask=mask,
            plan=plan,
            rows=rows,
            failures=tuple(decoded.failures.values()),
        )

    def _mended(self, rows: SamplerBatch, decoded: Decoded) -> tuple[SamplerBatch, Tensor]:
        """The batch without the rows that failed, or with others in their place."""
        self.failures |= {failure.id: failure for failure in decoded.failures.values()}
        if self._on_error == "raise":
            first = next(iter(decoded.failures.values()))
            raise DataError(
                f"{self.source.name}: {first.name} can't be decoded ({first.reason}); replace or"
                " remove it, or set on_error to skip or replace."
            )
        failed = np.array(sorted(decoded.failures), dtype=np.int64)
        if self._on_error == "skip":
            mask = rows.mask.copy()
            mask[failed] = False
            place = np.arange(len(mask), dtype=np.int64)
            alone = np.isin(place, failed) | np.isin(rows.partners, failed)
            partners = np.where(alone, place, rows.partners)
            return replace(rows, mask=mask, partners=partners), decoded.images
        for row in failed.tolist():
            decoded.images[row] = self._stand_in(rows, row)
        return rows, decoded.images

    def _stand_in(self, rows: SamplerBatch, row: int) -> Tensor:
        """What stands in for a broken image: another one's pixels, in the box of this row's view.

        Its own id stays, and so do its label, its draws and its place in every table of ids.
        """
        position = int(self._place[rows.positions[row]])
        boxes = self._cropped()(rows)
        box = None if boxes is None else boxes[[row]]
        for other in stand_ins(self.source, position)[:_TRIES]:
            done = decode_request(
                self.source,
                Request(other[None], box),
                image_size=self._size,
                channels=self._channels,
            )
            if not done.failures:
                return done.images[0]
        raise DataError(
            f"{self.source.name} has no readable image of its label that could stand in for"
            f" {self.source.name_of(position)}; set on_error to skip."
        )


def _requests(
    sampler: Sampler,
    state: dict[str, int],
    asked: deque[SamplerBatch],
    place: Numbers,
    boxes: Callable[[SamplerBatch], Boxes | None],
) -> Iterator[Request]:
    """Requests without end: epochs follow each other, so that workers never wait for one."""
    while True:
        rows = sampler.batch(state["epoch"], state["position"])
        asked.append(rows)
        yield Request(place[rows.positions], boxes(rows))
        state = rows.state


def _places(source: Source, sampler: Sampler) -> Numbers:
    """Positions in the source of the sampler's ids."""
    order = np.argsort(source.ids, kind="stable")
    found = np.searchsorted(source.ids, sampler.ids, sorter=order)
    places: Numbers = order[np.minimum(found, len(order) - 1)] if len(order) else found
    if not len(order) or not np.array_equal(source.ids[places], sampler.ids):
        raise ValueError(
            f"Loader needs a sampler of ids of {source.name}, got others; make it by"
            " Sampler(source.ids, ...)."
        )
    return places
