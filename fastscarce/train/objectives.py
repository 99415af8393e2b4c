"""What a step minimises: labels alone, or labels and a teacher's rows.

An objective holds no state: its batch follows from the step. Rows are counted over all processes
and every process has equally many, so the mean of the processes' means is the mean over the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fastscarce.augment import CutMix, Policy, get_policy
from fastscarce.config import StageConfig, StudentConfig
from fastscarce.data import Stream, StreamBatch
from fastscarce.errors import ConfigError
from fastscarce.ops import MixedTarget, kd_loss
from fastscarce.pseudo import PseudoLabels
from fastscarce.train.pool import Pool, Positions
from fastscarce.train.run import Run, derive_seed

__all__ = ["SelfTraining", "Supervised"]


def _stream(run: Run, name: str, positions: Positions, batch_size: int) -> Stream:
    parts = run.world_size * run.config.gradient_accumulation_steps
    if batch_size < parts or batch_size % parts:
        raise ConfigError(
            f"{name} must be a multiple of processes times gradient_accumulation_steps "
            f"({run.world_size} x {run.config.gradient_accumulation_steps}), got {batch_size}."
        )
    return Stream(
        positions,
        seed=derive_seed(run.config.seed, name, "order"),
        batch_size=batch_size,
        rank=run.rank,
        world_size=run.world_size,
    )


def _piece(batch: StreamBatch, piece: int, pieces: int) -> tuple[Positions, Positions]:
    rows = len(batch.positions) // pieces
    part = slice(piece * rows, (piece + 1) * rows)
    return batch.positions[part], batch.view[part]


def _policy(settings: StageConfig) -> Policy:
    """The stage's policy, with CutMix of neighbours where it asks for it."""
    policy = get_policy(settings.augmentation)
    if settings.cutmix_probability <= 0.0 or settings.cutmix_alpha <= 0.0:
        return policy
    return policy.followed_by(CutMix(settings.cutmix_alpha, settings.cutmix_probability))


class Supervised:
    """Cross entropy on labelled images."""

    def __init__(self, run: Run, pool: Pool, labelled: Positions, settings: StageConfig) -> None:
        self._pool = pool
        self._settings = settings
        self._policy = _policy(settings)
        self._stream = _stream(run, "batch_size", labelled, settings.batch_size)
        self.rows = settings.batch_size

    def batch(
        self, model: nn.Module, step: int, piece: int, pieces: int
    ) -> tuple[Tensor, MixedTarget]:
        """Views, float32 ``(rows, C, H, W)``, and their labels."""
        positions, view = _piece(self._stream.batch(step), piece, pieces)
        plan = self._pool.draw(positions, self._policy, view)
        images = self._pool.carry_out(plan, positions, model)
        labels = self._pool.labels[torch.from_numpy(positions).to(images.device)]
        return images, plan.mixed_target(labels)

    def __call__(self, model: nn.Module, step: int, piece: int, pieces: int) -> Tensor:
        """Mean cross entropy over the rows, float32 scalar in nats."""
        images, target = self.batch(model, step, piece, pieces)
        return kd_loss(model(images), None, target, label_smoothing=self._settings.label_smoothing)


class SelfTraining:
    """Cross entropy on labelled images and distillation on pseudo-labelled ones, one forward pass.

    A mixed pseudo-labelled image is taught the same mixture of its two teacher rows.

    Source: Xie et al., "Self-training with Noisy Student improves ImageNet classification" (2020).
    """

    def __init__(
        self,
        run: Run,
        pool: Pool,
        labelled: Positions,
        labels: PseudoLabels,
        settings: StudentConfig,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._labelled = Supervised(run, pool, labelled, settings)
        self._policy = _policy(settings)
        place = {int(number): position for position, number in enumerate(pool.ids)}
        positions = np.array([place[int(number)] for number in labels.ids], dtype=np.int64)
        lessons = np.repeat(positions, labels.repeats)
        if len(lessons) == 0:
            raise ConfigError(
                "No pseudo-label passes the selection; lower labels.threshold or raise "
                "labels.keep_per_class."
            )
        self._stream = _stream(
            run, "unlabelled_batch_size", lessons, settings.unlabelled_batch_size
        )
        # A row a position of the pool, so that a batch's rows are one gather.
        self._row = torch.full((len(pool.ids),), -1, dtype=torch.int64, device=pool.images.device)
        self._row[torch.from_numpy(positions)] = torch.arange(
            len(positions), device=pool.images.device
        )
        self._log_probs = torch.from_numpy(labels.log_probs).to(pool.images.device)
        self.rows = settings.batch_size + settings.unlabelled_batch_size

    def __call__(self, model: nn.Module, step: int, piece: int, pieces: int) -> Tensor:
        """Weighted sum of the two means, float32 scalar in nats."""
        settings = self._settings
        images, target = self._labelled.batch(model, step, piece, pieces)
        positions, view = _piece(self._stream.batch(step), piece, pieces)
        plan = self._pool.draw(positions, self._policy, view)
        others = self._pool.carry_out(plan, positions, model)
        device = others.device
        rows = self._log_probs[self._row[torch.from_numpy(positions).to(device)]]
        teacher = mix_rows(rows, rows[plan.partner.to(device)], plan.lam.to(device))
        logits = model(torch.cat([images, others]))
        taught, learned = logits[: len(images)], logits[len(images) :]
        label_loss = kd_loss(taught, None, target, label_smoothing=settings.label_smoothing)
        teacher_loss = kd_loss(learned, teacher, None, temperature=settings.temperature)
        return (1.0 - settings.alpha) * label_loss + settings.alpha * teacher_loss


def mix_rows(own: Tensor, other: Tensor, lam: Tensor) -> Tensor:
    """Log-probabilities of a mixture of two teacher rows.

    Args:
        own: Log-probabilities, ``(rows, classes)``.
        other: The partners' log-probabilities, of the same shape.
        lam: Weight of ``own``, ``(rows,)``, from 0 to 1.

    Returns:
        ``log(lam * exp(own) + (1 - lam) * exp(other))``, exactly ``own`` where ``lam`` is 1.
    """
    share = lam[:, None]
    mixed = torch.logaddexp(own + share.log(), other + (1.0 - share).log())
    return torch.where(share == 1.0, own, mixed)
