"""What a teacher says of a batch: rows of a table, of pseudo-labels, or of the teacher itself."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastscarce.augment import CutMix, Plan, Policy, get_policy
from fastscarce.cache import Layout, Teacher, decode, pack
from fastscarce.cache.view import View
from fastscarce.config import StageConfig
from fastscarce.data import StreamBatch
from fastscarce.data.order import with_partners
from fastscarce.errors import CacheError, ConfigError
from fastscarce.ops import MixedTarget, MixedTopK, TopK
from fastscarce.pseudo import PseudoLabels
from fastscarce.train.pool import Pool, Positions

__all__ = ["LabelRows", "Source", "Teaching", "label_teaching", "mixes", "with_mixing"]


class Source(Protocol):
    """Where rows come from; `fastscarce.cache.TeacherTable` is one."""

    @property
    def layout(self) -> Layout:
        """Of the rows."""

    def records(
        self, sample_ids: NDArray[np.int64], view: NDArray[np.int64]
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """Rows as bytes, uint8 ``(rows, stride)``, and places of those that are not there."""


class LabelRows:
    """Soft pseudo-labels as rows of a table that is kept in memory, the same for every view."""

    def __init__(self, labels: PseudoLabels, device: torch.device) -> None:
        self.layout = Layout(labels.classes, labels.classes)
        order = np.argsort(labels.ids)
        log_probs = torch.from_numpy(np.ascontiguousarray(labels.log_probs[order]))
        self._rows = View.of(labels.ids[order], pack(log_probs.to(device), self.layout), device)

    def records(
        self, sample_ids: NDArray[np.int64], view: NDArray[np.int64]
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """See `Source`."""
        ids = torch.from_numpy(sample_ids)
        return self._rows.rows(ids)[0], self._rows.lacking(ids)


class Teaching:
    """Views of some images, and what the teacher says of each.

    Where its policy mixes, the teacher looks at the mixed images themselves. Otherwise a mixed
    image is taught the same mixture of what the teacher says of its two unmixed views.

    Args:
        pool: The images.
        lessons: Positions to learn from, one as often as it counts in an epoch.
        policy: Of the views, as the teacher saw them.
        mixing: Of the student's: the same, followed by what mixes them where the teacher's are not
            mixed.
        source: Of rows. None: the teacher is asked about every view.
        live: The teacher, for rows that the source lacks.
        layout: Of rows, where there is no source.
        views: After how many views of an image the first comes again. None: never.

    Raises:
        ConfigError: There is nothing to learn from, or nobody to learn from.
    """

    def __init__(
        self,
        pool: Pool,
        lessons: Positions,
        *,
        policy: Policy,
        mixing: Policy,
        source: Source | None = None,
        live: Teacher | None = None,
        layout: Layout | None = None,
        views: int | None = None,
    ) -> None:
        chosen = layout if source is None else source.layout
        if chosen is None or (source is None and live is None):
            raise ConfigError("Distillation needs a table of rows or a teacher, got neither.")
        self.lessons = lessons
        self.layout = chosen
        self.mixing = mixing
        self.mixed = policy.mixes
        """Whether the teacher sees the mixed images."""
        self.cached_views = views
        self.filled = 0
        """Rows that the teacher was asked for because the source lacked them."""
        self._pool = pool
        self._policy = policy
        self._source = source
        self._live = live

    def rows(self, batch: StreamBatch) -> TopK:
        """What the teacher says of the views that it sees, a row a row on the pool's device.

        Args:
            batch: Which images, which view of each, and their partners.

        Raises:
            CacheError: Rows are missing and there is no teacher to ask.
        """
        return decode(self._records(batch), self.layout)

    def _records(self, batch: StreamBatch) -> Tensor:
        if self._source is None:
            return self._ask(batch, np.arange(len(batch.positions)))
        records, lacking = self._source.records(self._pool.ids[batch.positions], batch.view)
        if len(lacking) == 0:
            return records
        if self._live is None:
            raise CacheError(
                f"The table lacks {len(lacking)} of a step's {len(records)} rows; run the same "
                "`fastscarce cache build` again, or give --teacher to say what is missing."
            )
        self.filled += len(lacking)
        place = torch.from_numpy(lacking).to(records.device)
        return records.index_copy(0, place, self._ask(batch, lacking))

    def _ask(self, batch: StreamBatch, places: Positions) -> Tensor:
        """Rows of some of a batch's images, and of partners that it takes to draw them."""
        assert self._live is not None
        device = self._pool.device
        rows, partners = with_partners(places, batch.partners) if self.mixed else (places, None)
        positions = batch.positions[rows]
        plan = self._pool.draw(positions, self._policy, batch.view[rows], partners).to(device)
        index = torch.from_numpy(positions).to(device)
        logits = self._live.logits(plan, self._pool.whole(), index)[: len(places)]
        # The tags of a table's rows are not looked at here: zeros take their place.
        tags = torch.zeros(len(places), dtype=torch.int64) if self.layout.tagged else None
        return pack(logits, self.layout, tags)


def label_teaching(pool: Pool, labels: PseudoLabels, settings: StageConfig) -> Teaching:
    """Teaching by pseudo-labels: those chosen, as often as they count.

    Raises:
        ConfigError: No pseudo-label was chosen.
    """
    place = {int(number): position for position, number in enumerate(pool.ids)}
    positions = np.array([place[int(number)] for number in labels.ids], dtype=np.int64)
    lessons = np.repeat(positions, labels.repeats)
    if len(lessons) == 0:
        raise ConfigError(
            "No pseudo-label passes the selection; lower labels.threshold or raise "
            "labels.keep_per_class."
        )
    policy = pool.policy(settings.augmentation)
    return Teaching(
        pool,
        lessons,
        policy=policy,
        mixing=with_mixing(policy, settings),
        source=LabelRows(labels, pool.device),
    )


def with_mixing(policy: str | Policy, settings: StageConfig) -> Policy:
    """A policy with CutMix of partners at its end where the stage asks for it.

    A step at the end leaves the draws of those before it as they are.
    """
    chosen = get_policy(policy)
    if not mixes(settings):
        return chosen
    return chosen.followed_by(CutMix(settings.cutmix_alpha, settings.cutmix_probability))


def mixes(settings: StageConfig) -> bool:
    """Whether a stage asks for CutMix."""
    return settings.cutmix_probability > 0.0 and settings.cutmix_alpha > 0.0


def mixed_rows(rows: TopK, plan: Plan | None) -> TopK | MixedTopK:
    """The teacher of mixed images; the rows as they are where nothing is mixed.

    Here and below the plan is what mixes the images; None where rows are of mixed ones already.
    """
    if plan is None or bool((plan.table["lam"] == 1.0).all()):
        return rows
    return plan.mixed_topk(rows)


def mixed_labels(rows: TopK, plan: Plan | None) -> Tensor | MixedTarget:
    """The first class of each row, mixed as the images are."""
    place = rows.log_probs.float().argmax(1, keepdim=True)
    first = rows.indices.gather(1, place)[:, 0].long()
    return first if plan is None else plan.mixed_target(first)


def mixed_log_probs(rows: TopK, plan: Plan | None, classes: int) -> Tensor:
    """All classes' log-probabilities of mixed images, float32 ``(rows, classes)``.

    For losses that look at more than the classes that a row names.
    """
    own = torch.log_softmax(rows.dense(classes).float(), dim=1)
    if plan is None:
        return own
    other = own[plan.partner.to(own.device)]
    share = plan.lam.to(own.device)[:, None]
    mixed = torch.logaddexp(own + share.log(), other + (1.0 - share).log())
    return torch.where(share == 1.0, own, mixed)
