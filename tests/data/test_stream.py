from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscarce.data import Stream, partner_ids


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 70),
    share=st.integers(1, 40),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
)
def test_each_sample_once_an_epoch_for_any_world(
    size: int, share: int, world: int, seed: int
) -> None:
    batch = share * world
    steps = -(-3 * size // batch)
    alone = Stream(size, seed=seed, batch_size=batch)
    ranks = [
        Stream(size, seed=seed, batch_size=batch, rank=r, world_size=world) for r in range(world)
    ]
    positions, epochs = [], []
    for step in range(steps):
        whole = alone.batch(step)
        parts = [stream.batch(step) for stream in ranks]
        assert all(part.positions.shape == (share,) for part in parts)
        assert np.array_equal(whole.positions, np.concatenate([p.positions for p in parts]))
        assert np.array_equal(whole.view, np.concatenate([p.view for p in parts]))
        positions.append(whole.positions)
        epochs.append(whole.epoch)
    order, epoch = np.concatenate(positions), np.concatenate(epochs)
    for number in range(3):
        assert np.array_equal(np.sort(order[epoch == number]), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 70), half=st.integers(1, 20), world=st.integers(1, 4))
def test_pairs_are_dealt_and_never_split(size: int, half: int, world: int) -> None:
    ids = np.arange(size) * 31 + 5
    batch = 2 * half * world
    streams = [
        Stream(size, seed=8, batch_size=batch, rank=r, world_size=world, pairs=True, ids=ids)
        for r in range(world)
    ]
    mates = [partner_ids(ids, seed=8, view=epoch) for epoch in range(4)]
    seen: list[list[int]] = [[] for _ in mates]
    for step in range(-(-3 * size // batch)):
        for stream in streams:
            rows = stream.batch(step)
            for place in range(len(rows.positions)):
                epoch, position = rows.epoch[place], rows.positions[place]
                if epoch < 3:
                    partner = rows.positions[rows.partners[place]]
                    assert ids[partner] == mates[epoch][position]
                    seen[epoch].append(int(position))
    assert all(sorted(positions) == list(range(size)) for positions in seen[:3])


@pytest.mark.parametrize("same", [False, True])
def test_views_come_again_with_their_pairs_or_with_others(same: bool) -> None:
    ids = np.arange(13) * 7 - 20
    stream = Stream(13, seed=2, batch_size=6, pairs=True, ids=ids, views=3, same_pairs=same)
    orders: list[list[int]] = [[] for _ in range(8)]
    for step in range(8 * 13 // 6):
        batch = stream.batch(step)
        assert np.array_equal(batch.view, batch.epoch % 3)
        for row, (epoch, view) in enumerate(zip(batch.epoch, batch.view, strict=True)):
            mates = partner_ids(ids, seed=2, view=int(view if same else epoch))
            position = batch.positions[row]
            assert ids[batch.positions[batch.partners[row]]] == mates[position]
            orders[epoch].append(int(position))
    assert all(sorted(order) == list(range(13)) for order in orders[:-1])
    assert orders[0] != orders[3]  # the pairs of a view in another order


def test_pieces_keep_their_partners() -> None:
    batch = Stream(7, seed=0, batch_size=12, pairs=True).batch(0)
    mates = batch.positions[batch.partners]
    pieces = [batch.piece(number, 3) for number in range(3)]
    assert all(len(piece.positions) == 4 for piece in pieces)
    assert np.array_equal(np.concatenate([p.positions[p.partners] for p in pieces]), mates)
    assert np.array_equal(np.concatenate([p.view for p in pieces]), batch.view)


def test_the_order_is_of_ids() -> None:
    ids = np.array([40, 10, 30, 20])
    listed = np.sort(ids)
    for pairs in (False, True):
        one = Stream(4, seed=0, batch_size=4, pairs=pairs, ids=ids).batch(3).positions
        other = Stream(4, seed=0, batch_size=4, pairs=pairs, ids=listed).batch(3).positions
        assert np.array_equal(ids[one], listed[other])


def test_a_batch_depends_on_its_step_alone() -> None:
    stream = Stream(23, seed=1, batch_size=8)
    forwards = [stream.batch(step).positions for step in range(12)]
    for step in (11, 0, 7, 3, 3, 10):
        assert np.array_equal(stream.batch(step).positions, forwards[step])
        fresh = Stream(23, seed=1, batch_size=8).batch(step)
        assert np.array_equal(fresh.positions, forwards[step])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first = Stream(100, seed=1, batch_size=100)
    orders = [first.batch(0).positions, first.batch(1).positions]
    orders.append(Stream(100, seed=2, batch_size=100).batch(0).positions)
    for one in range(3):
        for other in range(one):
            assert (orders[one] == orders[other]).mean() < 0.1


def test_a_repeated_sample_never_repeats_a_view() -> None:
    places = np.array([4, 9, 9, 9, 7, 7])
    stream = Stream(places, seed=0, batch_size=6)
    assert stream.max_repeats == 3
    seen = set()
    for step in range(20):
        batch = stream.batch(step)
        assert np.array_equal(np.sort(batch.positions), np.sort(places))
        assert (batch.view // 3 == batch.epoch).all()
        seen |= set(zip(batch.positions.tolist(), batch.view.tolist(), strict=True))
    assert len(seen) == 20 * 6


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0, "batch_size": 4},
        {"size": 5, "batch_size": 0},
        {"size": 5, "batch_size": 5, "world_size": 2},
        {"size": 5, "batch_size": 4, "world_size": 2, "rank": 2},
        {"size": 5, "batch_size": 6, "world_size": 2, "pairs": True},
        {"size": 5, "batch_size": 4, "ids": [1, 2]},
        {"size": 5, "batch_size": 4, "views": 0},
    ],
)
def test_refusals(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs|must be"):
        Stream(seed=0, **options)


def test_refuses_a_negative_step() -> None:
    with pytest.raises(ValueError, match="step must be 0 or more"):
        Stream(5, seed=0, batch_size=1).batch(-1)
