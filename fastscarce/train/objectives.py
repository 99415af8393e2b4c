"""What a step minimises: labels alone, or labels and a teacher's rows.

An objective's batch follows from the step; all it holds is what was drawn and decoded ahead. Rows
are counted over all processes and every process has equally many, so the mean of the processes'
means is the mean over the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastscarce.augment import Plan
from fastscarce.config import StageConfig, StudentConfig
from fastscarce.data import Stream
from fastscarce.errors import ConfigError
from fastscarce.ops import MixedTarget, TopK, kd_loss
from fastscarce.train.pool import Feed, Pool, Positions
from fastscarce.train.run import Run, derive_seed
from fastscarce.train.teaching import (
    Teaching,
    mixed_labels,
    mixed_log_probs,
    mixed_rows,
    mixes,
    with_mixing,
)

__all__ = ["SelfTraining", "Supervised"]

_NO_LABEL = -100  # what the losses ignore


def _stream(
    run: Run,
    name: str,
    pool: Pool,
    positions: Positions,
    batch_size: int,
    *,
    pairs: bool,
    seed: int | None = None,
    **views: Any,
) -> Stream:
    pieces = run.config.gradient_accumulation_steps
    parts = run.world_size * pieces * (2 if pairs else 1)
    if batch_size < parts or batch_size % parts:
        whole = " times 2, the rows that CutMix pairs" if pairs else ""
        raise ConfigError(
            f"{name} must be a multiple of processes times gradient_accumulation_steps{whole} "
            f"({run.world_size} x {pieces}{' x 2' if pairs else ''}), got {batch_size}."
        )
    return Stream(
        positions,
        seed=derive_seed(run.config.seed, name, "order") if seed is None else seed,
        batch_size=batch_size,
        rank=run.rank,
        world_size=run.world_size,
        pairs=pairs,
        ids=pool.ids[positions],
        **views,
    )


class Supervised:
    """Cross entropy on labelled images."""

    def __init__(self, run: Run, pool: Pool, labelled: Positions, settings: StageConfig) -> None:
        self._pool = pool
        self._settings = settings
        self._stream = _stream(
            run, "batch_size", pool, labelled, settings.batch_size, pairs=mixes(settings)
        )
        self._feed = Feed(pool, self._stream, with_mixing(settings.augmentation, settings))
        self.rows = settings.batch_size

    def batch(
        self, model: nn.Module, step: int, piece: int, pieces: int
    ) -> tuple[Tensor, MixedTarget]:
        """Views, float32 ``(rows, C, H, W)``, and their labels."""
        fed = self._feed(step, piece, pieces)
        images = self._pool.carry_out(fed.plan, fed.taken, model)
        labels = self._pool.labels[torch.from_numpy(fed.rows.positions).to(images.device)]
        return images, fed.plan.mixed_target(labels)

    def __call__(self, model: nn.Module, step: int, piece: int, pieces: int) -> Tensor:
        """Mean cross entropy over the rows, float32 scalar in nats."""
        images, target = self.batch(model, step, piece, pieces)
        return kd_loss(model(images), None, target, label_smoothing=self._settings.label_smoothing)

    def close(self) -> None:
        """End the processes that decode ahead."""
        self._feed.close()


class SelfTraining:
    """Cross entropy on labelled images and distillation on taught ones, one forward pass.

    A mixed image is taught what the teacher says of it, or where the teacher sees unmixed images
    the same mixture of its two rows. Without a weight on the labels
    the labelled images are left out.

    Args:
        run: Gives the processes.
        pool: The images.
        labelled: Those whose labels may be used.
        teaching: Which images are taught what.
        settings: Batch sizes, weights and the loss of the taught images.

    Source: Xie et al., "Self-training with Noisy Student improves ImageNet classification" (2020);
    hard labels: Touvron et al., "Training data-efficient image transformers" (ICML 2021); DKD: Zhao
    et al., "Decoupled Knowledge Distillation" (CVPR 2022).
    """

    def __init__(
        self,
        run: Run,
        pool: Pool,
        labelled: Positions,
        teaching: Teaching,
        settings: StudentConfig,
    ) -> None:
        self._settings = settings
        self._teaching = teaching
        self._labelled = None
        self.rows = settings.unlabelled_batch_size
        if settings.alpha < 1.0:
            self._labelled = Supervised(run, pool, labelled, settings)
            self.rows += settings.batch_size
        self._stream = _stream(
            run,
            "unlabelled_batch_size",
            pool,
            teaching.lessons,
            settings.unlabelled_batch_size,
            pairs=teaching.mixing.mixes,
            # A teacher that sees mixed images sees the pairs of the views' own seed.
            seed=pool.seed if teaching.mixed else None,
            views=teaching.cached_views,
            same_pairs=teaching.mixed,
        )
        self._pool = pool
        self._feed = Feed(pool, self._stream, teaching.mixing)
        # Labels of the taught images themselves, for the loss that tells the label's class apart.
        self._known = torch.full_like(pool.labels, _NO_LABEL)
        if settings.loss == "dkd":
            place = torch.from_numpy(labelled).to(pool.labels.device)
            self._known[place] = pool.labels[place]

    def __call__(self, model: nn.Module, step: int, piece: int, pieces: int) -> Tensor:
        """Weighted sum of the two means, float32 scalar in nats."""
        settings = self._settings
        fed = self._feed(step, piece, pieces)
        positions, plan = fed.rows.positions, fed.plan
        taught = self._pool.carry_out(plan, fed.taken, model)
        rows = self._teaching.rows(fed.rows)
        if self._labelled is None:
            return self._taught_loss(model(taught), positions, plan, rows)
        images, target = self._labelled.batch(model, step, piece, pieces)
        logits = model(torch.cat([images, taught]))
        learned = logits[len(images) :]
        label_loss = kd_loss(
            logits[: len(images)], None, target, label_smoothing=settings.label_smoothing
        )
        teacher_loss = self._taught_loss(learned, positions, plan, rows)
        return (1.0 - settings.alpha) * label_loss + settings.alpha * teacher_loss

    def close(self) -> None:
        """End the processes that decode ahead."""
        if self._labelled is not None:
            self._labelled.close()
        self._feed.close()

    def _taught_loss(self, logits: Tensor, positions: Positions, plan: Plan, rows: TopK) -> Tensor:
        """Mean over the taught rows."""
        settings = self._settings
        # What mixes the rows: nothing where they are of mixed images already.
        mixing = None if self._teaching.mixed else plan
        match settings.loss:
            case "kl":
                teacher = mixed_rows(rows, mixing)
                return kd_loss(logits, teacher, None, temperature=settings.temperature)
            case "hard":
                return kd_loss(logits, None, mixed_labels(rows, mixing))
            case "dkd":
                labels = self._known[torch.from_numpy(positions).to(self._known.device)]
                return kd_loss(
                    logits,
                    mixed_log_probs(rows, mixing, logits.shape[1]),
                    plan.mixed_target(labels),
                    loss="dkd",
                    temperature=settings.temperature,
                    alpha=(1.0, 0.0),
                )
