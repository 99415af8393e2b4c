"""Looks at every byte of a table, and where asked for at what the teacher says today."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.augment import get_policy
from fastscarce.augment.philox import keyed_order
from fastscarce.cache.build import BATCH
from fastscarce.cache.fingerprint import require_same
from fastscarce.cache.journal import Line, journals, read_journal
from fastscarce.cache.manifest import Manifest, only_table, read_manifest, read_samples
from fastscarce.cache.samples import Samples, expectation
from fastscarce.cache.shard import read_shard
from fastscarce.cache.table import TeacherTable
from fastscarce.cache.teacher import Teacher
from fastscarce.cache.views import SampleViews
from fastscarce.errors import CacheError

__all__ = ["Deep", "Verification", "verify"]

_DRAW = 0xDEE9  # the counter's word that sets these draws apart from a view's


@dataclass(frozen=True)
class Deep:
    """A teacher asked again, beside the same teacher asked twice.

    Attributes:
        rows: That were compared.
        kl: Mean divergence of the rows from what the teacher says now, in nats.
        flips: Rows whose first class is another one.
        control_kl: The same of the teacher asked in batches of another order.
        control_flips: The same of it.
    """

    rows: int
    kl: float
    flips: int
    control_kl: float
    control_flips: int


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        folder: Of the table.
        rows: That are there and sound, each once.
        missing: Rows that the table is to have and has not.
        problems: A sentence for each thing that is not as it was written.
        deep: Where it was asked for.
    """

    folder: Path
    rows: int
    missing: int
    problems: list[str] = field(default_factory=list)
    deep: Deep | None = None

    @property
    def sound(self) -> bool:
        """Whether every byte is as it was written; rows may be missing."""
        return not self.problems


def verify(
    path: str | Path,
    *,
    deep: int = 0,
    teacher: Teacher | None = None,
    samples: Samples | None = None,
    allow_mismatch: tuple[str, ...] = (),
) -> Verification:
    """Read every file of a table and compare it with its checksum.

    Args:
        path: Of the table.
        deep: Rows that the teacher is asked about again.
        teacher: That the table was made with; for ``deep``.
        samples: That it was made of; for ``deep``.
        allow_mismatch: Keys of the fingerprint that may differ from them.

    Raises:
        CacheError: There is no table, its manifest is damaged, or it was made of something else
            than ``teacher`` and ``samples``.
        ValueError: ``deep`` is asked for without a teacher and samples.
    """
    folder = only_table(Path(path).expanduser())
    manifest = read_manifest(folder)
    problems: list[str] = []
    lines: list[Line] = []
    for journal in journals(folder):
        lines += read_journal(journal, problems)
    held = np.zeros(manifest.views, dtype=np.int64)
    try:
        expected = read_samples(folder, manifest)
    except CacheError as error:
        problems.append(str(error))
        expected = None
    for view in range(manifest.views):
        found = []
        for line in lines:
            if line.view != view:
                continue
            try:
                shard = read_shard(folder, line, manifest.layout, manifest.fingerprint, mapped=True)
                found.append(shard.ids)
            except CacheError as error:
                problems.append(str(error))
        ids = np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)
        if expected is not None and not np.isin(ids, expected).all():
            problems.append(f"{folder}: view {view} has rows of samples that are not the table's.")
        held[view] = len(ids)
    rows = int(held.sum())
    compared = None
    if deep and not problems:
        if teacher is None or samples is None:
            raise ValueError("verify needs a teacher and samples to go deep.")
        compared = _deep(folder, manifest, deep, teacher, samples.sorted(), allow_mismatch)
    return Verification(folder, rows, manifest.rows * manifest.views - rows, problems, compared)


def _deep(
    folder: Path,
    manifest: Manifest,
    count: int,
    teacher: Teacher,
    samples: Samples,
    allow: tuple[str, ...],
) -> Deep:
    transform = manifest.content["transform"]
    policy, seed = get_policy(transform["policy"]), int(transform["seed"])
    said = manifest.content["teacher"]
    live = {**teacher.content(int(samples.images.shape[3])), "batch_size": said["batch_size"]}
    require_same(
        {"teacher": live, **expectation(samples, policy, seed)},
        manifest.content,
        where=str(folder),
        allow=allow,
    )
    rows, kl, flips, control_kl, control_flips = 0, 0.0, 0, 0.0, 0
    share = -(-count // manifest.views)
    with TeacherTable.open(folder, residency="mmap") as table:
        for view in range(min(manifest.views, count)):
            places = keyed_order(seed, samples.ids, view=view, draw=_DRAW)
            places = places[: min(share, count - rows)]
            _, lacking = table.records(samples.ids[places], view)
            places = np.delete(places, lacking)
            views = SampleViews(samples, policy, seed, view)
            for start in range(0, len(places), BATCH):
                batch = places[start : start + BATCH]
                kept = table.rows(samples.ids[batch], view).dense(manifest.layout.classes)
                kept = torch.log_softmax(kept.float(), dim=1)  # rounded rows miss a sum of 1
                first = _ask(teacher, views, batch)
                second = _ask(teacher, views, batch[::-1].copy()).flip(0)
                rows += len(batch)
                kl += float(_divergence(first, kept))
                flips += int((first.argmax(1) != kept.argmax(1)).sum())
                control_kl += float(_divergence(first, second))
                control_flips += int((first.argmax(1) != second.argmax(1)).sum())
    whole = max(rows, 1)
    return Deep(rows, kl / whole, flips, control_kl / whole, control_flips)


def _ask(teacher: Teacher, views: SampleViews, places: npt.NDArray[np.int64]) -> Tensor:
    plan, rows = views.draw(places)
    images = views.samples.images
    logits = teacher.logits(plan.to(images.device), images, views.index(rows))[: len(places)]
    return torch.log_softmax(logits.float(), dim=1).cpu()


def _divergence(live: Tensor, other: Tensor) -> Tensor:
    """Sum over rows of KL(live || other), float64; classes that ``live`` gives nothing count 0."""
    p, q = live.double(), other.double().clamp(min=-100.0)
    return torch.where(p.isinf(), 0.0, p.exp() * (p - q)).sum()
