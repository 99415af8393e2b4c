"""Drawing of plans: a row a sample, of (policy, seed, id, view, image size) alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.augment.mapping import draw_rows
from fastscarce.augment.philox import NO_NUMBERS, view_numbers
from fastscarce.augment.plan import Plan, planned
from fastscarce.augment.policy import Policy, get_policy
from fastscarce.augment.table import PLAN

__all__ = ["draw", "draw_batches", "neighbours"]


def neighbours(rows: int) -> npt.NDArray[np.int64]:
    """Places of partners, ``(rows,)``: 2i and 2i + 1 are a pair; an odd last row is its own."""
    place: npt.NDArray[np.int64] = np.arange(rows, dtype=np.int64) ^ 1
    return place.clip(max=max(rows - 1, 0))


def draw(
    policy: str | Sequence[Any] | Policy,
    sample_ids: npt.ArrayLike,
    *,
    view: npt.ArrayLike,
    seed: int,
    image_size: int | tuple[int, int],
    partners: npt.ArrayLike | None = None,
) -> Plan:
    """Draw a plan: each row is a function of (policy, seed, id, view, image size) alone.

    Only ``partner``, which names a place in the batch, and that a row whose partner is itself is
    not mixed, come from the batch.

    Args:
        policy: A name such as ``"randaugment(2, 9)+cutmix"``, a list of steps, or a `Policy`.
        sample_ids: int64 ``(rows,)``.
        view: View numbers, 0 to 2**32 - 1: int64 ``(rows,)`` or one number for all.
        seed: Any integer; its low 64 bits count.
        image_size: Side in pixels, or height and width.
        partners: Places in the batch of the rows that are mixed in, int64 ``(rows,)``. None:
            2i and 2i + 1 are each other's.

    Returns:
        A `Plan` of as many rows.

    Raises:
        ValueError: The policy is unknown, or a view, a partner or the size is out of range.
    """
    ids = np.ascontiguousarray(sample_ids, dtype=np.int64)
    if ids.ndim != 1:
        raise ValueError(f"draw needs sample_ids of shape (rows,), got {ids.shape}.")
    rows = ids.shape[0]
    size = checked_size("draw", image_size)
    number, views = view_numbers(view, rows)
    places = NO_NUMBERS if partners is None else _partners(partners, rows)
    return planned(
        _drawn(get_policy(policy), ids, number, views, places, rows, seed, size), size
    )


def draw_batches(
    policy: str | Sequence[Any] | Policy,
    batches: Sequence[npt.ArrayLike],
    *,
    view: npt.ArrayLike,
    seed: int,
    image_size: int | tuple[int, int],
) -> list[Plan]:
    """What `draw` draws for each of several batches, at a part of the price.

    A training loop that draws its next 16 batches at once hardly notices it.

    Args:
        policy: See `draw`.
        batches: Sample ids of each batch, of as many rows each; the last may have fewer.
        view: View numbers: one for all, or one a batch.
        seed: See `draw`.
        image_size: See `draw`.

    Returns:
        A `Plan` a batch. They share memory.

    Raises:
        ValueError: As `draw`; or the batches' lengths or the views' number are none of these.
    """
    parts = [np.asarray(batch, dtype=np.int64) for batch in batches]
    if any(part.ndim != 1 for part in parts):
        raise ValueError(
            f"draw_batches needs sample ids of shape (rows,), got {[p.shape for p in parts]}."
        )
    lengths = [len(part) for part in parts]
    if (
        not lengths
        or min(lengths) < 1
        or set(lengths[:-1]) - {lengths[0]}
        or lengths[-1] > lengths[0]
    ):
        raise ValueError(
            f"draw_batches needs batches of one length, the last one's or more, got {lengths}."
        )
    size = checked_size("draw_batches", image_size)
    number, views = view_numbers(view, len(parts))
    ids = np.concatenate(parts)
    whole = _drawn(get_policy(policy), ids, number, views, NO_NUMBERS, lengths[0], seed, size)
    return [planned(rows, size) for rows in whole.unsafe_split(lengths[0])]


def _drawn(
    policy: Policy,
    ids: npt.NDArray[np.int64],
    number: np.uint64,
    views: npt.NDArray[np.int64],
    partners: npt.NDArray[np.int64],
    batch: int,
    seed: int,
    size: tuple[int, int],
) -> Tensor:
    """Rows of a plan, uint8 ``(rows, 128)``."""
    rows = torch.empty((len(ids), PLAN.itemsize), dtype=torch.uint8)
    if len(ids):
        draw_rows(
            policy.ready(size), len(policy.steps), np.uint64(seed & 0xFFFFFFFFFFFFFFFF), ids,
            number, views, partners, batch, *size, rows.numpy(),
        )  # fmt: skip
    return rows


def checked_size(name: str, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width.

    Raises:
        ValueError: They are not from 1 to 32767.
    """
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or not all(isinstance(s, int) and 1 <= s <= 32767 for s in pair):
        raise ValueError(
            f"{name} needs image_size, one side or (height, width) of 1 to 32767 pixels, got"
            f" {image_size!r}."
        )
    return pair


def _partners(partners: npt.ArrayLike, rows: int) -> npt.NDArray[np.int64]:
    places = np.asarray(partners, dtype=np.int64)
    if places.shape != (rows,) or (rows and not (places.min() >= 0 and places.max() < rows)):
        raise ValueError(
            f"draw needs partners, {rows} places from 0 to {rows - 1}, got shape {places.shape}"
            + (f" from {places.min()} to {places.max()}." if places.size else ".")
        )
    return places
