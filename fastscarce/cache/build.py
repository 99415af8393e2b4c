"""Asks a teacher about every view of every sample, once.

The unit of work is a fixed range of the sorted ids, or of the pairs that are mixed, with a fixed
number of rows; a process does those units whose number is its own modulo the processes. So the rows
are the same for any number of processes, and after a resume with another number of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastscarce.augment import Policy, get_policy
from fastscarce.cache.fingerprint import (
    Content,
    differing,
    digest,
    listed,
    not_allowed,
)
from fastscarce.cache.journal import journals, read_journal
from fastscarce.cache.maintain import adopt_own, repair
from fastscarce.cache.manifest import (
    Manifest,
    find_tables,
    locked,
    read_manifest,
    read_samples,
    write_manifest,
    write_samples,
)
from fastscarce.cache.pipeline import Piece, Pipeline, shard_rows
from fastscarce.cache.quality import quality_of
from fastscarce.cache.record import Layout, pack
from fastscarce.cache.samples import Samples, expectation
from fastscarce.cache.sentinel import pixel_hashes, sentinel_ids
from fastscarce.cache.shard import ROWS, ShardWriter, read_shard, rows_held
from fastscarce.cache.teacher import Teacher
from fastscarce.cache.views import SampleViews
from fastscarce.errors import CacheError

__all__ = ["BATCH", "Built", "build"]

BATCH = 256
"""Rows of a forward pass; part of the result, since the last bits of a row depend on its batch."""

# What can't be continued, whatever is allowed: rows would not fit beside the others.
_FIXED = (
    "cache.classes",
    "cache.codec",
    "cache.k",
    "cache.tagged",
    "data.ids",
    "data.rows",
    "transform.pairs",
)

Ids = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Built:
    """What a process did.

    Attributes:
        folder: Of the table.
        written: Rows written by this process.
        kept: Rows that were there before, over all processes.
        missing: Rows that are not there yet; other processes may be at them.
        seconds: Since the call.
    """

    folder: Path
    written: int
    kept: int
    missing: int
    seconds: float


def build(
    teacher: Teacher | nn.Module | Sequence[nn.Module],
    samples: Samples,
    path: str | Path,
    *,
    policy: str | Policy,
    views: int,
    seed: int,
    k: int = 16,
    codec: Literal["float16", "uint8"] = "float16",
    tagged: bool = False,
    batch_size: int = BATCH,
    rows_per_shard: int = ROWS,
    rank: int = 0,
    world_size: int = 1,
    allow_mismatch: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Built:
    """Make a table, or what is missing of it.

    Args:
        teacher: A network, several (their probabilities are averaged), or a `Teacher`, on the
            device of the images. It is put into evaluation mode, and sees levels scaled by its own
            ``pretrained_cfg``'s mean and standard deviation, or by 0.5 and 0.5.
        samples: Which images.
        path: A folder of tables; this one's is named by its fingerprint.
        policy: Of the views. Of one with CutMix or MixUp rows are of mixed images, with the
            partners that `fastscarce.data.Sampler` deals by ``seed``, ``pairs=True`` and ``views``.
            Of one without, a student may mix the rows of two views.
        views: How many, numbered from 0.
        seed: Of the views.
        k: Classes kept a row; all of them where there are fewer.
        codec: Of the log-probabilities.
        tagged: Keep a hash of the plan with each row.
        batch_size: Rows of a forward pass, whole pairs where they are mixed. Part of the result.
        rows_per_shard: What a process that dies loses at most, however it does; at least a batch.
            A file is closed an eighth before, so that the teacher goes on while it is written.
        rank: This process's number; each needs its own.
        world_size: How many processes share the work.
        allow_mismatch: Keys that a table which is to be continued may differ in.
        say: Gets lines for people.

    Raises:
        CacheError: Another process writes as this one, or a table to go on with is damaged.
        ResultsError: The folder can't be written; what is there is whole.
        TrainingError: The teacher's output is not finite.
        ValueError: A number is out of range.
    """
    started = time.monotonic()
    asked = Teacher.of(teacher)
    chosen = get_policy(policy)
    _check(chosen, views, k, batch_size, rows_per_shard, rank, world_size)
    part = samples.sorted()
    classes = len(part.class_names)
    layout = Layout(classes, min(k, classes), codec, tagged=tagged)
    content: Content = {
        "teacher": {**asked.content(int(part.images.shape[3])), "batch_size": batch_size},
        **expectation(part, chosen, seed),
        "cache": {
            "classes": classes,
            "k": layout.k,
            "codec": codec,
            "tagged": tagged,
            "views": views,
        },
    }
    try:
        folder, manifest = _opened(
            Path(path).expanduser(), content, layout, part, allow_mismatch, say
        )
        with ExitStack() as held:
            _repair_if_alone(folder, manifest, say)
            held.enter_context(locked(folder, "table", shared=True))
            held.enter_context(locked(folder, f"rank{rank:03d}"))
            adopt_own(folder, manifest, f"rank{rank:03d}")
            done = _done(folder, manifest)
            work = _Work(asked, part, chosen, seed, layout, batch_size, views)
            # What a teacher says of a mixed image is neither right nor wrong.
            judged = part.without_labels() if chosen.mixes else part
            rows = max(rows_per_shard, batch_size)
            writer = ShardWriter(
                folder,
                layout,
                fingerprint=manifest.fingerprint,
                writer=f"rank{rank:03d}",
                rows=shard_rows(rows, batch_size),
            )
            pieces = Pipeline(layout, judged, writer, rows)
            written = _run(work, pieces, done, rank, world_size)
            missing = _finish(folder)
    except OSError as error:
        raise CacheError(
            f"{path} can't be written ({error.strerror or error}); free space, or name a folder "
            "that can be written to: rows that were written before are whole."
        ) from error
    kept = sum(len(known) for known in done.values())
    return Built(folder, written, kept, missing, time.monotonic() - started)


def _check(
    policy: Policy,
    views: int,
    k: int,
    batch_size: int,
    rows_per_shard: int,
    rank: int,
    world_size: int,
) -> None:
    for name, value in (
        ("views", views),
        ("k", k),
        ("batch_size", batch_size),
        ("rows_per_shard", rows_per_shard),
    ):
        if value < 1:
            raise ValueError(f"build needs {name} of at least 1, got {value}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"build needs rank from 0 to {world_size - 1}, got {rank}.")
    if policy.mixes and batch_size % 2:
        raise ValueError(
            f"build needs an even batch_size for a policy that mixes two images, got {batch_size}."
        )


def _opened(
    path: Path,
    content: Content,
    layout: Layout,
    samples: Samples,
    allow: Sequence[str],
    say: Callable[[str], None],
) -> tuple[Path, Manifest]:
    """The table to go on with, or a new one."""
    others = []
    for folder in find_tables(path):
        manifest = read_manifest(folder)
        keys = differing(content, manifest.content)
        if not not_allowed(keys, allow):
            fixed = [key for key in keys if key in _FIXED]
            if fixed:
                raise CacheError(
                    f"{folder} can't be gone on with: {listed(fixed)} differ, and its rows would "
                    "not fit beside the new ones; leave the key out of --allow-mismatch."
                )
            if not _has_samples(folder, manifest):
                write_samples(folder, samples.ids)
                say(f"{folder}: the list of samples was lost or damaged, and is written again")
            views = max(manifest.views, int(content["cache"]["views"]))
            if views > manifest.views:
                cache = {**manifest.content["cache"], "views": views}
                manifest = replace(
                    manifest,
                    views=views,
                    quality=None,
                    content={**manifest.content, "cache": cache},
                )
                write_manifest(folder, manifest)
            return folder, manifest
        others.append((folder, keys))
    if others:
        folder, keys = min(others, key=lambda other: len(other[1]))
        say(f"{folder} differs in {listed(keys)}; a new table is made beside it")
    name = digest(content)
    folder = path / name[:16]
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(
        fingerprint=name,
        content=content,
        layout=layout,
        views=int(content["cache"]["views"]),
        rows=len(samples.ids),
        samples=write_samples(folder, samples.ids),
        class_names=samples.class_names,
        versions=_versions(),
    )
    write_manifest(folder, manifest)
    return folder, manifest


def _has_samples(folder: Path, manifest: Manifest) -> bool:
    try:
        read_samples(folder, manifest)
    except CacheError:
        return False
    return True


def _versions() -> dict[str, str]:
    from fastscarce import __version__

    return {"fastscarce": __version__, "torch": torch.__version__, "numpy": np.__version__}


def _repair_if_alone(folder: Path, manifest: Manifest, say: Callable[[str], None]) -> None:
    """Adopt what earlier processes left whole and drop the rest, unless others are writing now."""
    try:
        with locked(folder, "table"):
            dropped = repair(folder, manifest)
    except CacheError:
        return
    for line in dropped:
        say(line)


def _done(folder: Path, manifest: Manifest) -> dict[int, Ids]:
    """Ids of the rows that are there, by view, each shard's checksum verified."""
    found: dict[int, list[Ids]] = {}
    for path in journals(folder):
        for line in read_journal(path):
            shard = read_shard(folder, line, manifest.layout, manifest.fingerprint, mapped=True)
            found.setdefault(line.view, []).append(shard.ids)
    return {view: np.unique(np.concatenate(parts)) for view, parts in found.items()}


@dataclass(frozen=True)
class _Unit:
    """Rows of one forward pass.

    Attributes:
        view: Of all of them.
        places: Of the rows among the sorted samples.
        own: How many of them are the unit's; those after them fill it up.
        chosen: The view's sentinels among all samples.
    """

    view: SampleViews
    places: Ids
    own: int
    chosen: Marks


@dataclass(frozen=True)
class _Work:
    teacher: Teacher
    samples: Samples
    policy: Policy
    seed: int
    layout: Layout
    batch_size: int
    views: int

    def units(self) -> Iterator[_Unit]:
        """Each view's rows in turn; the last unit is filled up from the first."""
        rows = len(self.samples.ids)
        for number in range(self.views):
            view = SampleViews(self.samples, self.policy, self.seed, number)
            chosen = np.isin(
                self.samples.ids, sentinel_ids(self.samples.ids, view=number, seed=self.seed)
            )
            for start in range(0, rows, self.batch_size):
                at = np.arange(start, start + self.batch_size, dtype=np.int64)
                own = min(self.batch_size, rows - start)
                yield _Unit(view, view.order[at % rows], own, chosen)

    def ask(self, unit: _Unit, new: Ids) -> Piece:
        """One forward pass. ``new``: places in the unit of the rows to keep."""
        view, places, images = unit.view, unit.places, self.samples.images
        ids = self.samples.ids[places]
        plan, rows = view.draw(places)
        planned = plan.to(images.device, non_blocking=True)
        logits = self.teacher.logits(planned, images, view.index(rows))[: len(places)]
        if logits.shape != (len(places), self.layout.classes):
            raise CacheError(
                f"The teacher needs {self.layout.classes} classes, as the data has, for each of "
                f"{len(places)} images, got an output of shape {tuple(logits.shape)}; give a class "
                "map where its classes are others."
            )
        tags = view.tags(plan, rows)[: len(places)] if self.layout.tagged else None
        records = pack(logits, self.layout, tags)
        ready = None
        if records.is_cuda:
            pinned = torch.empty(records.shape, dtype=torch.uint8, pin_memory=True)
            records = pinned.copy_(records, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        held = new[unit.chosen[places[new]]]
        sentinels: dict[int, str] = {}
        if len(held):
            hashes = pixel_hashes(view, places[held])
            sentinels = dict(zip(ids[held].tolist(), hashes, strict=True))
        return Piece(view.view, new, ids, records, sentinels, ready)


def _run(work: _Work, pieces: Pipeline, done: dict[int, Ids], rank: int, world_size: int) -> int:
    """This process's units, the writing in a thread of its own; returns the rows written."""
    written = 0
    try:
        for number, unit in enumerate(work.units()):
            if number % world_size != rank:
                continue
            own = np.arange(unit.own)
            known = done.get(unit.view.view)
            if known is not None:
                own = own[~np.isin(work.samples.ids[unit.places[own]], known)]
            if len(own):
                pieces.reserve(len(own))
                pieces.put(work.ask(unit, own))
                written += len(own)
    finally:
        # Also when the loop was interrupted: whole units that were asked for are kept.
        pieces.close()
    return written


def _finish(folder: Path) -> int:
    """Write the quality when all rows are there; returns how many are not."""
    manifest = read_manifest(folder)
    lines = [line for path in journals(folder) for line in read_journal(path)]
    missing = manifest.rows * manifest.views - sum(
        rows_held(folder, [line for line in lines if line.view == view])
        for view in range(manifest.views)
    )
    if missing == 0:
        write_manifest(folder, manifest.with_quality(quality_of(lines)))
    return missing
