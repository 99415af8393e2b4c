from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscarce.data import Stream


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
    ],
)
def test_refusals(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"needs|must be"):
        Stream(seed=0, **options)


def test_refuses_a_negative_step() -> None:
    with pytest.raises(ValueError, match="step must be 0 or more"):
        Stream(5, seed=0, batch_size=1).batch(-1)
