"""A few samples a view whose pixels are remembered.

By them a student sees that it draws the same views of the same images.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from fastscarce.augment import Policy, apply
from fastscarce.augment.philox import keyed_order
from fastscarce.cache.checksum import short_hash
from fastscarce.cache.samples import Samples
from fastscarce.cache.table import TeacherTable
from fastscarce.cache.views import SampleViews
from fastscarce.errors import CacheError

__all__ = ["check_sentinels", "pixel_hashes", "sentinel_ids"]

COUNT = 16
_DRAW = 0x5E271E1  # the counter's word that sets these draws apart from a view's

Ids = npt.NDArray[np.int64]


def sentinel_ids(ids: Ids, *, view: int, seed: int) -> Ids:
    """Those samples of a view that are remembered, int64, `COUNT` of them or all."""
    return ids[keyed_order(seed, ids, view=view, draw=_DRAW)[:COUNT]]


def pixel_hashes(views: SampleViews, places: Ids) -> list[str]:
    """A hash of the levels of the views of some samples, before they are normalised."""
    plan, rows = views.draw(places)
    images = views.samples.images
    levels = apply(plan.to(images.device), images, index=views.index(rows), dtype=torch.uint8)
    return [short_hash(view.tobytes()) for view in levels[: len(places)].cpu().numpy()]


def check_sentinels(
    table: TeacherTable,
    samples: Samples,
    *,
    policy: Policy,
    seed: int,
    views: Iterable[int],
) -> int:
    """Draw the remembered views again and compare pixels and rows.

    Args:
        table: Whose sentinels are looked at.
        samples: The images; what is remembered of others is left out.
        policy: Of the views.
        seed: Of the views.
        views: Which.

    Returns:
        How many were compared.

    Raises:
        CacheError: Pixels differ, or a row names another first class than it did.
    """
    compared, other_pixels, other_class = 0, 0, 0
    ordered = samples.sorted()
    for view in views:
        known = [entry for entry in table.sentinels(view) if entry[0] in ordered.ids]
        if not known:
            continue
        ids = np.array([number for number, _, _ in known], dtype=np.int64)
        places = np.searchsorted(ordered.ids, ids)
        hashes = pixel_hashes(SampleViews(ordered, policy, seed, view), places)
        rows = table.rows(ids, view)
        best = rows.log_probs.float().argmax(1, keepdim=True)
        first = rows.indices.gather(1, best)[:, 0].cpu().tolist()
        compared += len(known)
        other_pixels += sum(a != b for a, (_, b, _) in zip(hashes, known, strict=True))
        other_class += sum(a != b for a, (_, _, b) in zip(first, known, strict=True))
    if other_pixels or other_class:
        raise CacheError(
            f"{table.folder} says of its own samples what these images do not: of {compared} "
            f"remembered views {other_pixels} have other pixels and {other_class} another first "
            "class; build a table of these images with this version of fastscarce."
        )
    return compared
