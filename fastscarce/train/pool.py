"""The data set's images for training, and a model's predictions on any of them."""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastscarce.augment import Plan, Policy, apply, draw, draw_batches, get_policy
from fastscarce.cache import normalisation
from fastscarce.data import ImageSet, OnDemand, Pixels, Stream, StreamBatch
from fastscarce.errors import DataError
from fastscarce.train.run import Run

__all__ = ["Fed", "Feed", "Pool", "PoolKind", "Taken", "accuracy", "predict"]

# Rows of a forward pass; part of the result, since the last bits of a row depend on its batch.
BATCH = 512

# Batches whose plans are drawn at once, of so many rows together at most: 8 MiB of plans.
AHEAD, _ROWS_AHEAD = 256, 65_536

Positions = NDArray[np.int64]
PoolKind = Literal["auto", "off", "host", "device", "disk"]


@dataclass(frozen=True)
class Pool:
    """A data set's images, wherever they lie, and what it takes to make views of them.

    Attributes:
        pixels: uint8 ``(n, height, width, channels)``.
        resident: The same on the device, where they are kept there.
        device: Where views are made.
        ids: int64 ``(n,)``.
        labels: int64 ``(n,)`` on the device, -1 where there is none.
        classes: Number of classes.
        flip: Whether a mirrored image keeps its label.
        seed: Of all views.
    """

    pixels: Pixels
    resident: Tensor | None
    device: torch.device
    ids: NDArray[np.int64]
    labels: Tensor
    classes: int
    flip: bool
    seed: int

    @classmethod
    def of(
        cls, images: ImageSet, *, seed: int, device: torch.device, kind: PoolKind = "auto"
    ) -> Pool:
        """The pool of a data set.

        Args:
            images: The data set.
            seed: Of all views.
            device: Where views are made.
            kind: ``device`` keeps the images there, and so does ``auto`` where they are in memory
                and take half of what the device has free; otherwise a batch's rows go there.

        Raises:
            DataError: The images are to be on the device, and don't fit.
        """
        return cls(
            pixels=images.images,
            resident=_resident(images, device, kind),
            device=device,
            ids=images.ids,
            labels=torch.from_numpy(images.labels).to(device),
            classes=len(images.classes),
            flip=images.flip,
            seed=seed,
        )

    def policy(self, policy: str | Policy) -> Policy:
        """A policy as it is for these images: without flips that change a label, and its fill."""
        return _fitted(get_policy(policy), self.flip, int(self.pixels.shape[3]))

    def draw(
        self,
        positions: Positions,
        policy: str | Policy,
        view: int | Positions,
        partners: Positions | None = None,
    ) -> Plan:
        """What is done to some images: a function of (seed, id, view), the policy and partners."""
        _, height, width, _ = self.pixels.shape
        return draw(
            self.policy(policy),
            self.ids[positions],
            view=view,
            seed=self.seed,
            image_size=(height, width),
            partners=partners,
        )

    def draw_batches(self, batches: Sequence[StreamBatch], policy: str | Policy) -> list[Plan]:
        """What `draw` says of each of several batches, of their own views and partners."""
        _, height, width, _ = self.pixels.shape
        return draw_batches(
            self.policy(policy),
            [self.ids[batch.positions] for batch in batches],
            view=[batch.view for batch in batches],
            seed=self.seed,
            image_size=(height, width),
            partners=[batch.partners for batch in batches],
        )

    def whole(self) -> Tensor:
        """All images on the device, for what reads any of them by place.

        Raises:
            DataError: They are decoded on demand, or lie beside the device.
        """
        if self.resident is not None:
            return self.resident
        if isinstance(self.pixels, np.ndarray) and self.device.type == "cpu":
            with warnings.catch_warnings():  # a mapped file can't be written to, and isn't
                warnings.simplefilter("ignore", UserWarning)
                return torch.from_numpy(self.pixels)
        raise DataError(
            "A teacher that is asked, or its table, needs the images on the device; set pool to"
            f" {'auto, host or disk' if self.device.type == 'cpu' else 'auto or device'}."
        )

    def take(self, positions: Positions) -> Taken:
        """Some images on the device."""
        if self.resident is not None:
            return Taken(self.resident, torch.from_numpy(positions).to(self.device))
        return Taken(self._moved(torch.from_numpy(self.pixels[positions])))

    def ahead(self, batches: Iterable[Positions], rows: int) -> Iterator[Taken]:
        """The images of batches of at most ``rows``, decoded ahead where they are in no memory."""
        if not isinstance(self.pixels, OnDemand):
            yield from (self.take(positions) for positions in batches)
            return
        for images in self.pixels.ahead(batches, rows=rows, device=self.device):
            yield Taken(self._moved(images))

    def carry_out(self, plan: Plan, taken: Taken, model: nn.Module) -> Tensor:
        """The planned views, normalised as ``model`` asks, float32 ``(rows, C, H, W)``."""
        mean, std = normalisation(model, int(self.pixels.shape[3]))
        return apply(
            plan.to(self.device),
            taken.images,
            index=taken.index,
            mean=mean,
            std=std,
            layout=torch.channels_last,
        )

    def views(
        self, positions: Positions, policy: str | Policy, view: int | Positions, model: nn.Module
    ) -> Tensor:
        """Views of some images: drawn and carried out."""
        return self.carry_out(self.draw(positions, policy, view), self.take(positions), model)

    def _moved(self, images: Tensor) -> Tensor:
        if self.device.type == "cuda" and not images.is_cuda and not images.is_pinned():
            images = images.pin_memory()
        return images.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Taken:
    """A batch's images on the device.

    Attributes:
        images: uint8 ``(n, height, width, channels)``.
        index: Which of them are the batch's rows, int64 ``(rows,)``; None: all, in their order.
    """

    images: Tensor
    index: Tensor | None = None


@dataclass(frozen=True)
class Fed:
    """What a step needs of its images.

    Attributes:
        rows: Which they are.
        plan: What is done to them.
        taken: The images.
    """

    rows: StreamBatch
    plan: Plan
    taken: Taken


class Feed:
    """The images of a stream's steps, drawn and decoded ahead while steps follow each other.

    What a step gets follows from its number alone; all that is held is what comes next.

    Args:
        pool: Where they come from.
        stream: Says which they are.
        policy: What is done to them.
    """

    def __init__(self, pool: Pool, stream: Stream, policy: str | Policy) -> None:
        self._pool = pool
        self._stream = stream
        self._policy = policy
        self._drawn: deque[tuple[StreamBatch, Plan]] = deque()
        self._pieces: Iterator[StreamBatch] | None = None
        self._coming: Iterator[Taken] | None = None
        self._next: tuple[int, int, int] | None = None

    def __call__(self, step: int, piece: int, pieces: int) -> Fed:
        """A piece of a step's rows, their plan and their images."""
        if self._pieces is None or self._next != (step, piece, pieces):
            self.close()
            self._pieces = self._from(step, piece, pieces)
        if not self._drawn:
            rows = [next(self._pieces)]
            count = min(AHEAD, max(1, _ROWS_AHEAD // len(rows[0].positions)))
            rows.extend(islice(self._pieces, count - 1))
            plans = self._pool.draw_batches(rows, self._policy)
            self._drawn.extend(zip(rows, plans, strict=True))
        own, plan = self._drawn.popleft()
        if isinstance(self._pool.pixels, OnDemand):
            if self._coming is None:
                positions = (rows.positions for rows in self._from(step, piece, pieces))
                self._coming = self._pool.ahead(positions, len(own.positions))
            taken = next(self._coming)
        else:
            taken = self._pool.take(own.positions)
        following = (step, piece + 1, pieces) if piece + 1 < pieces else (step + 1, 0, pieces)
        self._next = following
        return Fed(own, plan, taken)

    def close(self) -> None:
        """Forget what comes next, and end the processes that decode ahead."""
        self._coming = self._pieces = self._next = None
        self._drawn.clear()

    def _from(self, step: int, piece: int, pieces: int) -> Iterator[StreamBatch]:
        """Pieces without end."""
        while True:
            batch = self._stream.batch(step)
            for number in range(piece, pieces):
                yield batch.piece(number, pieces)
            step, piece = step + 1, 0


def _resident(images: ImageSet, device: torch.device, kind: PoolKind) -> Tensor | None:
    if kind not in ("auto", "device") or not isinstance(images.images, np.ndarray):
        return None
    in_file = isinstance(images.images, np.memmap)
    if in_file and kind == "auto":
        return None
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if images.images.nbytes > free // 2:
            if kind == "auto":
                return None
            raise DataError(
                f"{images.name} needs {images.images.nbytes / 2**30:.1f} GiB on the device, of"
                f" which {free / 2**30:.1f} GiB are free; set pool to host, disk or off."
            )
    return torch.from_numpy(np.ascontiguousarray(images.images)).to(device)


@functools.lru_cache(maxsize=64)
def _fitted(policy: Policy, flip: bool, channels: int) -> Policy:
    """The policy as it suits a data set."""
    if not flip:
        policy = policy.without("flip")
    # Of grey scans the ground is black; a photograph has none.
    return replace(policy, fill="reflect") if channels == 3 else policy


@torch.no_grad()
def predict(
    run: Run,
    model: nn.Module,
    pool: Pool,
    positions: Positions,
    *,
    views: int = 1,
    policy: str = "eval",
    first_view: int = 0,
) -> Tensor:
    """Logits of images, shared out over the processes in batches that don't depend on their number.

    Args:
        run: Gives the processes and the precision.
        model: In eval mode.
        pool: The images.
        positions: Which of them, int64 ``(rows,)``, each once.
        views: Views of each image: the first is the plain image, the others are ``policy``'s.
        policy: Of the second view and all after it.
        first_view: Number of the second view.

    Returns:
        float32 ``(views, rows, classes)`` on the CPU, the same in every process.
    """
    result = torch.zeros(views, len(positions), pool.classes, device=run.device)
    units = [(view, start) for view in range(views) for start in range(0, len(positions), BATCH)]
    own = units[run.rank :: run.world_size]
    coming = pool.ahead((positions[start : start + BATCH] for _, start in own), BATCH)
    for (view, start), taken in zip(own, coming, strict=True):
        rows = positions[start : start + BATCH]
        plan = pool.draw(rows, "eval" if view == 0 else policy, first_view + view)
        batch = pool.carry_out(plan, taken, model)
        with run.accelerator.autocast():
            logits = model(batch)
        result[view, start : start + len(rows)] = logits.float()
    if run.world_size > 1:
        torch.distributed.all_reduce(result)
    return result.cpu()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Part of the rows whose highest logit is the label's. ``logits``: ``(rows, classes)``."""
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())
