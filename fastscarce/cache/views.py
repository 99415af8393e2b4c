"""The views of a table's samples: how they are drawn, and which are mixed with which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.augment import Plan, Policy, draw, neighbours
from fastscarce.cache.samples import Samples
from fastscarce.cache.tag import plan_tags
from fastscarce.data.order import dealt_order, with_partners

__all__ = ["SampleViews"]

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampleViews:
    """One view of each sample. Of a policy that mixes, partners are those that `Sampler` deals.

    Args:
        samples: Which images, lowest id first.
        policy: Of the view.
        seed: Of the view and of its pairs.
        view: Its number.
    """

    samples: Samples
    policy: Policy
    seed: int
    view: int

    @cached_property
    def order(self) -> Ids:
        """Places of the samples, int64 ``(rows,)``: by id, or where they are mixed by pairs."""
        if not self.policy.mixes:
            return np.arange(len(self.samples.ids), dtype=np.int64)
        return dealt_order(self.samples.ids, seed=self.seed, view=self.view)

    @cached_property
    def partners(self) -> Ids:
        """Place of each sample's partner, or its own, int64 ``(rows,)``."""
        partners = np.arange(len(self.order), dtype=np.int64)
        if self.policy.mixes:
            partners[self.order] = self.order[neighbours(len(self.order))]
        return partners

    def draw(self, places: Ids) -> tuple[Plan, Ids]:
        """Plan some samples.

        Args:
            places: Of the samples, int64 ``(rows,)``.

        Returns:
            A plan of these samples, and after them of those partners that are not among them; and
            the places of all that the plan is of.
        """
        rows, partners = with_partners(places, self.partners)
        plan = draw(
            self.policy,
            self.samples.ids[rows],
            view=self.view,
            seed=self.seed,
            image_size=self.samples.size,
            partners=partners,
        )
        return plan, rows

    def index(self, places: Ids) -> Tensor:
        """Which of the images some samples are, int64 ``(rows,)``, on the images' device."""
        index = torch.from_numpy(self.samples.positions[places])
        return index.to(self.samples.images.device, non_blocking=True)

    def tags(self, plan: Plan, places: Ids) -> Tensor:
        """The tags of rows that `draw` gave, int64 ``(rows,)``."""
        partners = self.samples.ids[self.partners[places]] if self.policy.mixes else None
        return torch.from_numpy(plan_tags(plan, partners))
