"""A plan as an object: saved and read again, joined, and what is none refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fastscarce.augment import POLICIES, Plan, apply, concatenate, describe, draw, draw_batches


def test_what_is_no_plan_is_refused() -> None:
    plan = draw("weak", range(4), view=0, seed=0, image_size=8)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: concatenate([plan, 3]), "concatenate needs a Plan"),  # type: ignore[list-item]
        (lambda: describe(plan.table), "describe needs a Plan"),  # type: ignore[arg-type]
        (lambda: plan.mixed_target([1, 2, 3, 4]), "labels as a tensor"),  # type: ignore[arg-type]
        (lambda: plan.mixed_topk(torch.zeros(4, 3)), "needs a TopK"),  # type: ignore[arg-type]
        (lambda: POLICIES["weak"].without("flop"), "without needs steps of flip"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_save_and_load(tmp_path: Path) -> None:
    plan = draw("strong+cutmix", range(9), view=3, seed=2, image_size=(20, 30))
    plan.save(tmp_path / "plan.npz")
    back = Plan.load(tmp_path / "plan.npz")
    assert np.array_equal(back.table, plan.table)
    assert (back.image_size, back.version) == (plan.image_size, plan.version)
    (tmp_path / "no.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"Plan\.load needs a plan's file"):
        Plan.load(tmp_path / "no.npz")
    written = (tmp_path / "plan.npz").read_bytes()
    for place in range(0, len(written), 7):
        for bit in (1, 32):
            damaged = bytearray(written)
            damaged[place] ^= bit
            (tmp_path / "no.npz").write_bytes(bytes(damaged))
            with contextlib.suppress(ValueError):
                Plan.load(tmp_path / "no.npz")
    for facts in ("[]", "null", '{"version": 99, "image_size": [20, 30]}',
                  '{"version": 3, "image_size": [0, -5]}', '{"version": 3, "image_size": "99"}',
                  "[" * 100_000):  # fmt: skip
        np.savez(tmp_path / "no.npz", table=plan.table, facts=np.array(facts))
        with pytest.raises(ValueError, match=r"Plan\.load needs a plan's file"):
            Plan.load(tmp_path / "no.npz")
    with pytest.raises(ValueError, match=r"\(No such file or directory\); check the path"):
        Plan.load(tmp_path / "none.npz")


def test_two_views_of_one_call() -> None:
    pool = torch.randint(0, 256, (8, 16, 16, 3)).byte()
    weak = draw("weak", range(8), view=0, seed=0, image_size=16)
    strong = draw("strong+cutmix", range(8), view=1, seed=0, image_size=16)
    both = apply(concatenate([weak, strong]), pool, index=torch.arange(8).repeat(2))
    assert torch.equal(both, torch.cat([apply(weak, pool), apply(strong, pool)]))
    with pytest.raises(ValueError, match="concatenate needs plans of one image size"):
        concatenate([weak, draw("weak", [1], view=0, seed=0, image_size=17)])
    with pytest.raises(ValueError, match="concatenate needs"):
        concatenate([])


def test_large_plans_share_memory_with_none_that_is_alive() -> None:
    ids = np.arange(64 * 600).reshape(64, 600)  # 4.7 MiB of plans

    def drawn(view: int) -> list[Plan]:
        return draw_batches("randaugment(2, 9)", ids, view=view, seed=0, image_size=32)

    def right(plan: Plan, view: int, batch: int) -> bool:
        alone = draw("randaugment(2, 9)", ids[batch], view=view, seed=0, image_size=32)
        return np.array_equal(plan.table, alone.table)

    kept: list[tuple[Plan, int, int]] = []
    places = set()
    for view in range(12):
        plans = drawn(view)
        places.add(plans[0].rows.untyped_storage().data_ptr())
        assert all(right(plans[batch], view, batch) for batch in (0, 63))
        kept = [*kept[-2:], (plans[view], view, view)]  # a plan keeps the memory of all
        assert all(right(*one) for one in kept)
    assert len(places) <= 6  # three that are alive, the last one, and two that wait

    def many(first: int) -> bool:
        return all(right(drawn(view)[7], view, 7) for view in range(first, first + 5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(0, 40, 10)))
