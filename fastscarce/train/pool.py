"""The data set on the device, and a model's predictions on any of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastscarce.augment import Plan, Policy, apply, draw, get_policy
from fastscarce.cache import normalisation
from fastscarce.data import ImageSet
from fastscarce.train.run import Run

__all__ = ["Pool", "accuracy", "predict"]

# Rows of a forward pass; part of the result, since the last bits of a row depend on its batch.
BATCH = 512

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """Decoded images on one device, and what it takes to make views of them.

    Attributes:
        images: uint8 ``(n, height, width, channels)``.
        ids: int64 ``(n,)``.
        labels: int64 ``(n,)`` on the device, -1 where there is none.
        classes: Number of classes.
        flip: Whether a mirrored image keeps its label.
        seed: Of all views.
    """

    images: Tensor
    ids: NDArray[np.int64]
    labels: Tensor
    classes: int
    flip: bool
    seed: int

    @classmethod
    def of(cls, images: ImageSet, *, seed: int, device: torch.device) -> Pool:
        """Move a data set to ``device``."""
        return cls(
            images=torch.from_numpy(np.ascontiguousarray(images.images)).to(device),
            ids=images.ids,
            labels=torch.from_numpy(images.labels).to(device),
            classes=len(images.classes),
            flip=images.flip,
            seed=seed,
        )

    def policy(self, policy: str | Policy) -> Policy:
        """A policy as it is for these images: without flips that change a label, and its fill."""
        return _fitted(get_policy(policy), self.flip, int(self.images.shape[3]))

    def draw(
        self,
        positions: Positions,
        policy: str | Policy,
        view: int | Positions,
        partners: Positions | None = None,
    ) -> Plan:
        """What is done to some images: a function of (seed, id, view), the policy and partners."""
        _, height, width, channels = self.images.shape
        chosen = _fitted(get_policy(policy), self.flip, channels)
        ids = self.ids[positions]
        return draw(
            chosen,
            ids,
            view=view,
            seed=self.seed,
            image_size=(height, width),
            partners=partners,
        )

    def carry_out(self, plan: Plan, positions: Positions, model: nn.Module) -> Tensor:
        """The planned views, normalised as ``model`` asks, float32 ``(rows, C, H, W)``."""
        mean, std = normalisation(model, int(self.images.shape[3]))
        device = self.images.device
        return apply(
            plan.to(device),
            self.images,
            index=torch.from_numpy(positions).to(device),
            mean=mean,
            std=std,
            layout=torch.channels_last,
        )

    def views(
        self, positions: Positions, policy: str | Policy, view: int | Positions, model: nn.Module
    ) -> Tensor:
        """Views of some images: drawn and carried out."""
        return self.carry_out(self.draw(positions, policy, view), positions, model)


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
    for view, start in units[run.rank :: run.world_size]:
        rows = positions[start : start + BATCH]
        batch = pool.views(rows, "eval" if view == 0 else policy, first_view + view, model)
        with run.accelerator.autocast():
            logits = model(batch)
        result[view, start : start + len(rows)] = logits.float()
    if run.world_size > 1:
        torch.distributed.all_reduce(result)
    return result.cpu()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Part of the rows whose highest logit is the label's. ``logits``: ``(rows, classes)``."""
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())
