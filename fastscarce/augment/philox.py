"""Random words without state: Philox4x32-10, a block of four 32-bit words for every counter.

The key is the seed; the counter is (id low, id high, view, draw) and nothing else, so that a
sample's draws are the same in any batch, in any order and with any number of processes.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = [
    "NO_NUMBERS",
    "blocks",
    "keyed_order",
    "philox4x32",
    "uniform",
    "uniforms",
    "view_numbers",
    "words64",
]

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10

Words = npt.NDArray[np.uint64]

NO_NUMBERS: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
"""Where a compiled function takes a number a row or none."""


@njit(inline="always")
def philox4x32(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Ten rounds of Philox4x32: uint64 counter and key words below 2**32 to four such words."""
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0 = (product_1 >> _HALF) ^ c1 ^ k0
        c2 = (product_0 >> _HALF) ^ c3 ^ k1
        c1 = product_1 & _MASK
        c3 = product_0 & _MASK
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


@njit(inline="always")
def uniform(word):  # type: ignore[no-untyped-def]
    """A 32-bit word as float64 in the open interval (0, 1)."""
    return (np.float64(word) + 0.5) * 2.0**-32


@njit(cache=True)
def _fill_blocks(seed, ids, views, first, count, out):  # type: ignore[no-untyped-def]
    k0, k1 = seed & _MASK, seed >> _HALF
    for row in range(ids.shape[0]):
        low, high = ids[row] & _MASK, ids[row] >> _HALF
        for block in range(count):
            words = philox4x32(low, high, views[row], np.uint64(first + block), k0, k1)
            for place in range(4):
                out[row, 4 * block + place] = words[place]


def view_numbers(view: npt.ArrayLike | int, rows: int) -> tuple[np.uint64, npt.NDArray[np.int64]]:
    """Checked view numbers: one for all rows, and none a row; or 0, and int64 ``(rows,)``.

    Raises:
        ValueError: A view is negative or above 2**32 - 1, or there is not one a row.
    """
    if isinstance(view, int) and 0 <= view <= 0xFFFFFFFF:  # as almost always
        return np.uint64(view), NO_NUMBERS
    numbers = np.asarray(view, dtype=np.int64)
    if numbers.shape not in ((), (rows,)):
        raise ValueError(f"draw needs one view number, or one a row ({rows}), got {numbers.shape}.")
    if int(np.bitwise_or.reduce(numbers, axis=None)) >> 32:  # also of a negative number
        raise ValueError(
            f"A view must be from 0 to 4294967295, got {int(numbers.min())} to"
            f" {int(numbers.max())}."
        )
    if numbers.shape == ():
        return np.uint64(numbers), NO_NUMBERS
    return np.uint64(0), np.ascontiguousarray(numbers)


def blocks(seed: int, ids: npt.ArrayLike, view: npt.ArrayLike, *, first: int, count: int) -> Words:
    """The words of draws ``first`` to ``first + count - 1`` of each sample's view.

    Args:
        seed: Any integer; its low 64 bits are the key.
        ids: int64 ``(rows,)``.
        view: int64 ``(rows,)`` or one number, from 0 to 2**32 - 1.
        first: The first draw's number.
        count: How many blocks of four words.

    Returns:
        uint64 ``(rows, 4 * count)``, each value a 32-bit word.

    Raises:
        ValueError: A view is negative or above 2**32 - 1.
    """
    places = np.ascontiguousarray(ids, dtype=np.int64).view(np.uint64)
    out = np.empty((places.shape[0], 4 * count), dtype=np.uint64)
    number, numbers = view_numbers(view, places.shape[0])
    views = numbers.view(np.uint64) if numbers.size else np.full(places.shape, number)
    _fill_blocks(np.uint64(seed & 0xFFFFFFFFFFFFFFFF), places, views, first, count, out)
    return out


def uniforms(
    seed: int, ids: npt.ArrayLike, view: npt.ArrayLike, *, first: int, count: int
) -> npt.NDArray[np.float64]:
    """float64 ``(rows, 4 * count)``, uniform in the open interval (0, 1); see `blocks`."""
    words = blocks(seed, ids, view, first=first, count=count)
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def words64(seed: int, ids: npt.ArrayLike, view: npt.ArrayLike, *, draw: int) -> Words:
    """uint64 ``(rows,)``: one 64-bit word for each id, a keyed hash of it."""
    words = blocks(seed, ids, view, first=draw, count=1)
    return words[:, 0] | (words[:, 1] << _HALF)


def keyed_order(
    seed: int, ids: npt.ArrayLike, *, view: npt.ArrayLike, draw: int
) -> npt.NDArray[np.int64]:
    """Places of ``ids`` in the order of their keyed hash: a permutation that forgets the listing.

    ``view`` is one number, or one a row. Equal hashes (one in 2**64) are ordered by id.
    """
    places = np.asarray(ids, dtype=np.int64)
    return np.lexsort((places, words64(seed, places, view, draw=draw))).astype(np.int64)
