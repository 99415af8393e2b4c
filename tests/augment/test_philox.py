from __future__ import annotations

import numpy as np
import pytest

from fastscarce.augment.philox import blocks, keyed_order, philox4x32, uniforms


def words_of(counter: list[int], key: list[int]) -> list[int]:
    return [int(word) for word in philox4x32(*(np.uint64(number) for number in counter + key))]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Random123's kat_vectors, philox4x32 with 10 rounds: zeros, ones, digits of pi.
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert words_of(counter, key) == expected
    # The compiled loop that plans are drawn by.
    low, high, view, draw = counter
    sample = np.uint64(high << 32 | low).astype(np.int64)
    got = blocks(key[1] << 32 | key[0], [sample], view, first=draw, count=1)[0]
    assert got.tolist() == expected


def test_counter_is_id_view_and_draw() -> None:
    sample, view, seed = -5, 9, (7 << 32) | 3
    low, high = sample & 0xFFFFFFFF, (sample >> 32) & 0xFFFFFFFF
    got = blocks(seed, [sample], view, first=2, count=2)[0]
    for number, draw in enumerate((2, 3)):
        expected = words_of([low, high, view, draw], [3, 7])
        assert got[4 * number : 4 * number + 4].tolist() == expected


def test_uniforms_are_open_and_uniform() -> None:
    values = uniforms(1, np.arange(4000), 0, first=0, count=2).ravel()
    assert values.min() > 0
    assert values.max() < 1
    counts = np.histogram(values, bins=16, range=(0, 1))[0]
    chi_square = ((counts - values.size / 16) ** 2 / (values.size / 16)).sum()
    assert chi_square < 37.7  # 99.9 % of chi-square with 15 degrees of freedom


@pytest.mark.parametrize("view", [-1, 2**32])
def test_view_out_of_range(view: int) -> None:
    with pytest.raises(ValueError, match="view must be from 0"):
        blocks(0, [1], view, first=0, count=1)


def test_keyed_order_forgets_the_listing() -> None:
    ids = np.arange(100) * 7 - 300
    shuffled = np.random.default_rng(0).permutation(ids)
    first = ids[keyed_order(5, ids, view=0, draw=1)]
    assert np.array_equal(first, shuffled[keyed_order(5, shuffled, view=0, draw=1)])
    assert not np.array_equal(first, ids[keyed_order(6, ids, view=0, draw=1)])
