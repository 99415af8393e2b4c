"""Drawing of plans: a row a sample, of (policy, seed, id, view, image size) alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastscarce.augment.mapping import UNSOUND_PARTNER, UNSOUND_VIEW, draw_rows
from fastscarce.augment.philox import NO_NUMBERS
from fastscarce.augment.plan import Plan, planned
from fastscarce.augment.policy import Policy, get_policy
from fastscarce.augment.recycled import recycled_rows
from fastscarce.augment.table import PLAN, checked_size

__all__ = ["draw", "draw_batches", "neighbours"]

Numbers = npt.NDArray[np.int64]
Batches = Sequence[npt.ArrayLike] | npt.NDArray[Any] | Tensor


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
    ids = checked_ids("draw", sample_ids)
    size = checked_size("draw", image_size)
    views = _views("draw", view, (len(ids),))
    places = NO_NUMBERS
    if partners is not None:
        places = _numbers("draw", "partners", partners)
        if places.shape != ids.shape:
            raise ValueError(_partners_needed("draw", len(ids), f"shape {places.shape}"))
    return planned(_drawn("draw", policy, ids, views, places, len(ids), seed, size), size)


def draw_batches(
    policy: str | Sequence[Any] | Policy,
    batches: Batches,
    *,
    view: npt.ArrayLike | Sequence[npt.ArrayLike],
    seed: int,
    image_size: int | tuple[int, int],
    partners: Batches | None = None,
) -> list[Plan]:
    """What `draw` draws for each of several batches, at a part of the price.

    A training loop that draws its next 256 batches at once hardly notices it.

    Args:
        policy: See `draw`.
        batches: Sample ids of each batch, of as many rows each; the last may have fewer. A list, or
            an array or a tensor ``(batches, rows)``.
        view: View numbers: one for all, one a batch, or for each batch one a row.
        seed: See `draw`.
        image_size: See `draw`.
        partners: For each batch what `draw` takes. None: neighbours.

    Returns:
        A `Plan` a batch. They share memory.

    Raises:
        ValueError: As `draw`; or the batches' lengths or the views' number are none of these.
    """
    ids, lengths = _joined("sample ids", batches)
    if (
        not lengths
        or min(lengths) < 1
        or set(lengths[:-1]) - {lengths[0]}
        or lengths[-1] > lengths[0]
    ):
        raise ValueError(
            f"draw_batches needs batches of one length, the last one's or more, got {lengths}."
        )
    numbers = _numbers("draw_batches", "sample ids", ids)
    size = checked_size("draw_batches", image_size)
    views: int | Numbers
    listed = isinstance(view, Sequence) and any(np.ndim(one) for one in view)
    if listed or getattr(view, "ndim", 0) == 2:
        views = _per_row("views", view, lengths)  # type: ignore[arg-type]
    else:
        views = _views("draw_batches", view, (len(lengths),))  # type: ignore[arg-type]
    places = NO_NUMBERS if partners is None else _per_row("partners", partners, lengths)
    rows = _drawn("draw_batches", policy, numbers, views, places, lengths[0], seed, size)
    return [planned(part, size) for part in rows.unsafe_split(lengths[0])]


def _drawn(
    name: str,
    policy: str | Sequence[Any] | Policy,
    ids: Numbers,
    views: int | Numbers,
    partners: Numbers,
    batch: int,
    seed: int,
    size: tuple[int, int],
) -> Tensor:
    """Rows of a plan, uint8 ``(rows, 128)``; the compiled loop looks whether numbers are sound."""
    policy = get_policy(policy)
    if not isinstance(seed, (int, np.integer)):
        raise ValueError(f"{name} needs a whole number as its seed, got {seed!r}.")
    number, many = (views, NO_NUMBERS) if isinstance(views, int) else (0, views)
    rows = recycled_rows(len(ids), PLAN.itemsize)
    if len(ids) == 0:
        return rows
    unsound = draw_rows(
        policy.ready(size), len(policy.steps), np.uint64(int(seed) & 0xFFFFFFFFFFFFFFFF), ids,
        number, many, partners, batch, *size, rows.numpy(),
    )  # fmt: skip
    if unsound == UNSOUND_VIEW:
        raise ValueError(_views_needed(many))
    if unsound == UNSOUND_PARTNER:
        raise ValueError(_partners_needed(name, batch, f"{partners.min()} to {partners.max()}"))
    return rows


def checked_ids(name: str, sample_ids: npt.ArrayLike) -> Numbers:
    """Ids, int64 ``(rows,)``.

    Raises:
        ValueError: They are not.
    """
    ids = _numbers(name, "sample_ids", sample_ids)
    if ids.ndim != 1:
        raise ValueError(f"{name} needs sample_ids of shape (rows,), got {ids.shape}.")
    return ids


def _numbers(name: str, of: str, values: npt.ArrayLike) -> Numbers:
    """Whole numbers as int64 in C order."""
    numbers = np.asarray(values)
    if numbers.dtype != np.int64:
        whole = numbers.dtype.kind in "iu" or numbers.size == 0
        large = numbers.dtype.kind == "u" and numbers.size and int(numbers.max()) >> 63
        if not whole or large:
            raise ValueError(
                f"{name} needs {of} as whole numbers that int64 holds, got {numbers.dtype}."
            )
    return np.asarray(numbers, dtype=np.int64, order="C")


def _joined(of: str, batches: Batches) -> tuple[npt.NDArray[Any], list[int]]:
    """The numbers of all batches, and how many each has."""
    numbers: npt.NDArray[Any]
    if not hasattr(batches, "__len__"):
        raise ValueError(
            f"draw_batches needs {of}, a list of arrays, one a batch, got {type(batches).__name__}."
        )
    if isinstance(batches, (np.ndarray, Tensor)) and batches.ndim == 2:
        rows, length = batches.shape
        return np.asarray(batches).reshape(-1), [length] * rows
    try:
        numbers = np.concatenate(batches) if len(batches) else NO_NUMBERS
        lengths = [len(batch) for batch in batches]  # type: ignore[arg-type]
    except (TypeError, ValueError):  # they have no length, or not one number of dimensions
        numbers, lengths = np.empty(()), []
    if numbers.ndim != 1:
        raise ValueError(
            f"draw_batches needs {of} of shape (rows,), got {[np.shape(b) for b in batches]}."
        )
    return numbers, lengths


def _per_row(of: str, batches: Batches, lengths: list[int]) -> Numbers:
    numbers, found = _joined(of, batches)
    if found != lengths:
        raise ValueError(f"draw_batches needs {of} for batches of {lengths}, got {found}.")
    return _numbers("draw_batches", of, numbers)


def _views(name: str, view: npt.ArrayLike | int, shape: tuple[int]) -> int | Numbers:
    """One view number, or several; those are looked at where they are read."""
    if isinstance(view, int) and 0 <= view <= 0xFFFFFFFF:  # as almost always
        return view
    numbers = _numbers(name, "view", view)
    if numbers.shape not in ((), shape):
        raise ValueError(
            f"{name} needs one view number, or one a row ({shape[0]}), got {numbers.shape}."
        )
    if numbers.shape == shape:
        return numbers
    if not 0 <= int(numbers) <= 0xFFFFFFFF:
        raise ValueError(_views_needed(numbers))
    return int(numbers)


def _views_needed(got: Numbers) -> str:
    return f"A view must be from 0 to 4294967295, got {got.min()} to {got.max()}."


def _partners_needed(name: str, rows: int, got: str) -> str:
    return f"{name} needs partners, {rows} places from 0 to {rows - 1}, got {got}."
