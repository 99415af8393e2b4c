from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscarce.augment import draw
from fastscarce.data import Sampler, SamplerBatch, partner_ids

SIZES: dict[str, Any] = {
    "size": st.integers(1, 60),
    "batch_size": st.integers(2, 23),
    "world": st.integers(1, 4),
    "pairs": st.booleans(),
    "seed": st.integers(0, 2**64 - 1),
}


def epoch_of(samplers: list[Sampler], stop: int | None = None) -> list[list[SamplerBatch]]:
    """Batches of each process, in step; up to ``stop`` of them."""
    if stop is None:
        return [list(batches) for batches in zip(*samplers, strict=True)]
    iterators = [iter(sampler) for sampler in samplers]
    return [[next(iterator) for iterator in iterators] for _ in range(stop)]


def counted(steps: list[list[SamplerBatch]]) -> list[int]:
    """Ids that count, in the order of the global batches."""
    return [int(number) for step in steps for batch in step for number in batch.ids[batch.mask]]


def samplers(world: int, size: int, **options: Any) -> list[Sampler]:
    return [Sampler(size, rank=rank, world_size=world, **options) for rank in range(world)]


@settings(max_examples=80, deadline=None)
@given(**SIZES, epoch=st.integers(0, 5))
def test_each_sample_once_an_epoch_in_one_order(
    size: int, batch_size: int, world: int, pairs: bool, seed: int, epoch: int
) -> None:
    options = {"seed": seed, "batch_size": batch_size, "pairs": pairs}
    alone = Sampler(size, **options)
    alone.set_epoch(epoch)
    whole = epoch_of([alone])
    together = samplers(world, size, **options)
    for sampler in together:
        sampler.set_epoch(epoch)
    steps = epoch_of(together)
    assert sorted(counted(steps)) == list(range(size))
    assert counted(steps) == counted(whole)
    assert len(steps) == len(whole) == len(alone)
    assert len({len(batch.ids) for step in steps for batch in step}) == 1
    assert all(len({str(batch.state) for batch in step}) == 1 for step in steps)
    assert all(sampler.state_dict() == alone.state_dict() for sampler in together)
    assert alone.epoch == epoch + 1


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(1, 60),
    batch_size=st.integers(2, 23),
    world=st.integers(1, 4),
    epoch=st.integers(0, 5),
    views=st.sampled_from([None, 1, 3]),
)
def test_partners_are_a_function_of_seed_and_view(
    size: int, batch_size: int, world: int, epoch: int, views: int | None
) -> None:
    seed = 77
    ids = np.random.Generator(np.random.Philox(size)).permutation(size) * 7919 - 11
    view = epoch if views is None else epoch % views
    listed = np.sort(ids)
    partner = dict(zip(listed, partner_ids(listed, seed=seed, view=view), strict=True))
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "views": views}
    for sampler in [
        Sampler(ids, rank=r, world_size=world, pairs=True, **options) for r in range(world)
    ]:
        sampler.set_epoch(epoch)
        for batch in sampler:
            assert (batch.view == view).all()
            assert np.array_equal(batch.ids, ids[batch.positions])
            padding = np.flatnonzero(~batch.mask)
            assert np.array_equal(batch.partners[padding], padding)
            for place in np.flatnonzero(batch.mask):
                assert batch.ids[batch.partners[place]] == partner[batch.ids[place]]
                assert batch.mask[batch.partners[place]]


@settings(max_examples=80, deadline=None)
@given(
    **SIZES,
    epoch=st.integers(0, 4),
    new_world=st.integers(1, 4),
    new_batch_size=st.integers(2, 23),
    data=st.data(),
)
def test_resumes_anywhere_with_any_number_of_processes(
    size: int,
    batch_size: int,
    world: int,
    pairs: bool,
    seed: int,
    epoch: int,
    new_world: int,
    new_batch_size: int,
    data: st.DataObject,
) -> None:
    options: dict[str, Any] = {"seed": seed, "pairs": pairs}
    before = samplers(world, size, batch_size=batch_size, **options)
    for sampler in before:
        sampler.set_epoch(epoch)
    stop = data.draw(st.integers(0, len(before[0])))
    seen = counted(epoch_of(before, stop))
    state = before[data.draw(st.integers(0, world - 1))].state_dict()
    after = samplers(new_world, size, batch_size=new_batch_size, seed=0, pairs=pairs)
    for sampler in after:
        sampler.load_state_dict(state)
        sampler.set_epoch(state["epoch"])  # as a loop over epochs does: it stays where it is
    rest = counted(epoch_of(after))
    alone = Sampler(size, batch_size=batch_size, **options)
    alone.set_epoch(epoch)
    expected = counted(epoch_of([alone]))
    if stop == len(before[0]):  # the epoch had ended, and the next one follows
        assert seen == expected
        seen, expected = [], counted(epoch_of([alone]))
    assert seen + rest == expected


def test_orders_are_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, pairs: bool) -> list[int]:
        sampler = Sampler(200, seed=seed, batch_size=16, pairs=pairs)
        sampler.set_epoch(epoch)
        return counted(epoch_of([sampler]))

    for pairs in (False, True):
        orders = [order(1, 0, pairs), order(1, 1, pairs), order(2, 0, pairs)]
        for one in range(3):
            for other in range(one):
                same = np.mean(np.array(orders[one]) == np.array(orders[other]))
                assert same < 0.1


def test_batches_of_a_cached_view_pair_alike_but_come_in_another_order() -> None:
    sampler = Sampler(100, seed=3, batch_size=10, pairs=True, views=2)
    pairs, orders = [], []
    for epoch in (1, 3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        orders.append([tuple(batch.ids) for batch in batches])
        pairs.append(
            {
                (int(a), int(b))
                for x in batches
                for a, b in zip(x.ids, x.ids[x.partners], strict=True)
            }
        )
    assert pairs[0] == pairs[1]
    assert len(pairs[0]) == 100
    assert orders[0] != orders[1]


def test_a_repeated_id_is_another_view_and_never_its_own_partner() -> None:
    ids = np.array([5, 5, 5, 5, 6, 6, 7, 8])
    seen = set()
    partners = set()
    sampler = Sampler(ids, seed=0, batch_size=4, pairs=True)
    for _ in range(20):
        for batch in sampler:
            seen |= set(zip(batch.ids.tolist(), batch.view.tolist(), strict=True))
            partners |= set(
                zip(batch.ids.tolist(), batch.ids[batch.partners].tolist(), strict=True)
            )
    assert len(seen) == 20 * len(ids)
    assert {(5, 6), (5, 7), (5, 8), (6, 7)} <= partners


def test_the_mixed_views_do_not_depend_on_the_batch() -> None:
    """What a batch of a streaming loader mixes is what a cache of the view has mixed."""
    tables = []
    for batch_size, world in ((4, 1), (10, 2)):
        rows = {}
        for rank in range(world):
            for batch in Sampler(
                21, seed=9, batch_size=batch_size, rank=rank, world_size=world, pairs=True
            ):
                plan = draw(
                    "eval+cutmix",
                    batch.ids,
                    view=batch.view,
                    seed=9,
                    image_size=32,
                    partners=batch.partners,
                )
                for place in np.flatnonzero(batch.mask):
                    row = plan.table[place]
                    mixed = int(batch.ids[row["partner"]])
                    rows[int(row["id"])] = (mixed, float(row["lam"]), row["box"].tolist())
        tables.append(rows)
    assert tables[0] == tables[1]
    alone = [number for number, row in tables[0].items() if row[0] == number]
    assert len(alone) == 1
    assert tables[0][alone[0]][1] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0, "batch_size": 4}, "size of at least 1"),
        ({"size": [0.5, 1.5], "batch_size": 4}, "integer ids"),
        ({"size": 5, "batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"size": 5, "batch_size": 1, "pairs": True}, "batch_size of at least 2 with pairs"),
        ({"size": 5, "batch_size": 4, "world_size": 2, "rank": 2}, "rank from 0 to 1"),
        ({"size": 5, "batch_size": 4, "views": 0}, "views of at least 1"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(seed=0, **options)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"seed": 0, "epoch": 0}, "integers epoch, position, seed"),
        ("epoch", "integers epoch, position, seed, got 'epoch'"),
        ({"seed": 0, "epoch": 0, "position": 1.0}, "integers"),
        ({"seed": 0, "epoch": 0, "position": 8}, "from 0 to 7 at a whole pair, got 8"),
        ({"seed": 0, "epoch": 0, "position": 3}, "whole pair, got 3"),
        ({"seed": 0, "epoch": -1, "position": 0}, "epoch from 0"),
    ],
)
def test_refuses_a_state_of_something_else(state: Any, message: str) -> None:
    sampler = Sampler(8, seed=0, batch_size=4, pairs=True)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == {"seed": 0, "epoch": 0, "position": 0}


def test_refuses_a_batch_out_of_range() -> None:
    sampler = Sampler(8, seed=0, batch_size=4)
    with pytest.raises(ValueError, match="epoch from 0"):
        sampler.set_epoch(-1)
    with pytest.raises(ValueError, match="position from 0 to 7"):
        sampler.batch(0, 8)
