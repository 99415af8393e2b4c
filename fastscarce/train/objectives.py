"""What a step minimises: labels alone, or labels and a teacher's rows.

An objective's batch follows from the step; all it holds is what was decoded ahead. Rows are counted
over all processes and every process has equally many, so the mean of the processes' means is the
mean over the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fastscarce.augment import CutMix, Policy, get_policy
from fastscarce.config import StageConfig, StudentConfig
from fastscarce.data import Stream
from fastscarce.errors import ConfigError
from fastscarce.ops import MixedTarget, kd_loss
from fastscarce.pseudo import PseudoLabels
from fastscarce.train.pool import Feed, Pool, Positions
from fastscarce.train.run import Run, derive_seed

__all__ = ["SelfTraining", "Supervised"]


def _stream(
    run: Run, name: str, pool: Pool, positions: Positions, batch_size: int, *, pairs: bool
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
        seed=derive_seed(run.config.seed, name, "order"),
        batch_size=batch_size,
        rank=run.rank,
        world_size=run.world_size,
        pairs=pairs,
        ids=pool.ids[positions],
    )


def _policy(settings: StageConfig) -> Policy:
    """The stage's policy, with CutMix of partners where it asks for it."""
    policy = get_policy(settings.augmentation)
    if not _mixes(settings):
        return policy
    return policy.followed_by(CutMix(settings.cutmix_alpha, settings.cutmix_probability))


def _mixes(settings: StageConfig) -> bool:
    return settings.cutmix_probability > 0.0 and settings.cutmix_alpha > 0.0


class Supervised:
    """Cross entropy on labelled images."""

    def __init__(self, run: Run, pool: Pool, labelled: Positions, settings: StageConfig) -> None:
        self._pool = pool
        self._settings = settings
        self._policy = _policy(settings)
        self._stream = _stream(
            run, "batch_size", pool, labelled, settings.batch_size, pairs=_mixes(settings)
        )
        self._feed = Feed(pool, self._stream)
        self.rows = settings.batch_size

    def batch(
        self, model: nn.Module, step: int, piece: int, pieces: int
    ) -> tuple[Tensor, MixedTarget]:
        """Views, float32 ``(rows, C, H, W)``, and their labels."""
        rows, taken = self._feed(step, piece, pieces)
        plan = self._pool.draw(rows.positions, self._policy, rows.view, rows.partners)
        images = self._pool.carry_out(plan, taken, model)
        labels = self._pool.labels[torch.from_numpy(rows.positions).to(images.device)]
        return images, plan.mixed_target(labels)

    def __call__(self, model: nn.Module, step: int, piece: int, pieces: int) -> Tensor:
        """Mean cross entropy over the rows, float32 scalar in nats."""
        images, target = self.batch(model, step, piece, pieces)
        return kd_loss(model(images), None, target, label_smoothing=self._settings.label_smoothing)

    def close(self) -> None:
        """End the processes that decode ahead."""
        self._feed.close()


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
            run,
            "unlabelled_batch_size",
            pool,
            lessons,
            settings.unlabelled_batch_size,
            pairs=_mixes(settings),
        )
        self._feed = Feed(pool, self._stream)
        # A row a position of the pool, so that a batch's rows are one gather.
        self._row = torch.full((len(pool.ids),), -1, dtype=torch.int64, device=pool.device)
        self._row[torch.from_numpy(positions)] = torch.arange(len(positions), device=pool.device)
        self._log_probs = torch.from_numpy(labels.log_probs).to(pool.device)
        self.rows = settings.batch_size + settings.unlabelled_batch_size

    def __call__(self, model: nn.Module, step: int, piece: int, pieces: int) -> Tensor:
        """Weighted sum of the two means, float32 scalar in nats."""
        settings = self._settings
        images, target = self._labelled.batch(model, step, piece, pieces)
        batch, taken = self._feed(step, piece, pieces)
        plan = self._pool.draw(batch.positions, self._policy, batch.view, batch.partners)
        others = self._pool.carry_out(plan, taken, model)
        device = others.device
        rows = self._log_probs[self._row[torch.from_numpy(batch.positions).to(device)]]
        teacher = mix_rows(rows, rows[plan.partner.to(device)], plan.lam.to(device))
        logits = model(torch.cat([images, others]))
        taught, learned = logits[: len(images)], logits[len(images) :]
        label_loss = kd_loss(taught, None, target, label_smoothing=settings.label_smoothing)
        teacher_loss = kd_loss(learned, teacher, None, temperature=settings.temperature)
        return (1.0 - settings.alpha) * label_loss + settings.alpha * teacher_loss

    def close(self) -> None:
        """End the processes that decode ahead."""
        self._labelled.close()
        self._feed.close()


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
