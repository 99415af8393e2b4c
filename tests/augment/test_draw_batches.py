"""Several batches drawn at once: what each would have been drawn as."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastscarce.augment import draw, draw_batches, neighbours


@pytest.mark.parametrize("lengths", [[8, 8, 8], [7, 7, 3], [1, 1], [300, 5], [4]])
def test_several_batches_are_drawn_as_each(lengths: list[int]) -> None:
    ends = np.cumsum(lengths)
    batches = [np.arange(end - rows, end) * 31 for rows, end in zip(lengths, ends, strict=True)]
    for view in (2**32 - 1, np.arange(len(lengths)) + 3):
        plans = draw_batches("strong+cutmix", batches, view=view, seed=-4, image_size=(33, 20))
        for plan, ids, one in zip(plans, batches, np.broadcast_to(view, len(lengths)), strict=True):
            alone = draw("strong+cutmix", ids, view=int(one), seed=-4, image_size=(33, 20))
            assert np.array_equal(plan.table, alone.table)
            assert torch.equal(plan.rows, alone.rows)
            assert torch.equal(plan.partner, torch.from_numpy(neighbours(len(ids))))
            assert torch.equal(plan.lam, torch.from_numpy(plan.table["lam"].copy()))


@pytest.mark.parametrize(
    ("batches", "view", "message"),
    [
        ([], 0, r"batches of one length, the last one's or more, got \[\]"),
        ([[1, 2], []], 0, r"got \[2, 0\]"),
        ([[1, 2], [3], [4, 5]], 0, r"got \[2, 1, 2\]"),
        ([[1], [2, 3]], 0, r"got \[1, 2\]"),
        ([[[1, 2]]], 0, r"of shape \(rows,\), got \[\(1, 2\)\]"),
        ([[1, 2], [3, 4]], [0, 1, 2], r"one view number, or one a row \(2\)"),
        ([[1, 2], [3, 4]], [0, 2**32], "view must be from 0 to 4294967295, got 0 to 4294967296"),
        ([[1, 2], [3, 4]], [[0, 1], [2, -1]], "view must be from 0 to 4294967295, got -1 to 2"),
        ([[1, 2], [3, 4]], [[0, 1], [2]], r"views for batches of \[2, 2\], got \[2, 1\]"),
        ([[1, 2], [3, 4]], [[0, 1], 2], r"views of shape \(rows,\)"),
        ([[1, 2], [3, 4.5]], 0, "whole numbers that int64 holds, got float64"),
        ([1, 2], 0, r"of shape \(rows,\), got \[\(\), \(\)\]"),
        (3, 0, "a list of arrays, one a batch, got int"),
    ],
)
def test_batches_that_are_refused(batches: list[list[int]], view: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_batches("weak", batches, view=view, seed=0, image_size=8)  # type: ignore[arg-type]


def test_batches_have_views_and_partners_of_their_own() -> None:
    """As a stream deals them: batches that span an epoch's end, and rows without a partner."""
    draws = np.random.default_rng(0)
    batches = [draws.integers(-(2**62), 2**62, rows) for rows in (9, 9, 4)]
    views = [draws.integers(0, 2**32, len(batch)) for batch in batches]
    partners = [draws.integers(0, len(batch), len(batch)) for batch in batches]
    facts: dict[str, Any] = {"seed": 2, "image_size": 24}
    plans = draw_batches("strong+cutmix", batches, view=views, partners=partners, **facts)
    for plan, ids, view, places in zip(plans, batches, views, partners, strict=True):
        alone = draw("strong+cutmix", ids, view=view, partners=places, **facts)
        assert np.array_equal(plan.table, alone.table)
    partners[2][0] = 4
    for given, message in (
        (partners, "draw_batches needs partners, 9 places from 0 to 8, got 0 to 8"),
        (partners[:2], r"partners for batches of \[9, 9, 4\], got \[9, 9\]"),
        (3, "partners, a list of arrays, one a batch, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_batches("weak", batches, view=0, partners=given, **facts)  # type: ignore[arg-type]


def test_views_of_batches_may_be_an_array() -> None:
    ids, views = np.arange(12).reshape(3, 4), np.arange(12).reshape(3, 4) % 5
    expected = draw_batches("weak+cutmix", ids, view=list(views), seed=0, image_size=16)
    for given in (views, torch.from_numpy(views)):
        plans = draw_batches("weak+cutmix", ids, view=given, seed=0, image_size=16)
        for one, other in zip(plans, expected, strict=True):
            assert np.array_equal(one.table, other.table)


def test_batches_of_any_kind() -> None:
    ids = np.arange(24).reshape(4, 6)
    expected = [draw("weak+cutmix", row, view=1, seed=0, image_size=32).table for row in ids]
    kinds = (ids, torch.from_numpy(ids), list(ids), list(torch.from_numpy(ids)), ids.tolist())
    for batches in (*kinds, ids.T.copy().T, ids.astype(np.int32)):
        plans = draw_batches("weak+cutmix", batches, view=1, seed=0, image_size=32)
        assert len(plans) == 4
        for plan, table in zip(plans, expected, strict=True):
            assert np.array_equal(plan.table, table)
