"""The order of training: an endless stream of batches that is a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fastscarce.augment.philox import keyed_order

__all__ = ["Stream", "StreamBatch"]

_DRAW = 0x57EEA30  # the counter's word that sets these draws apart from a view's
_EPOCHS_KEPT = 2  # a batch that spans an epoch's end reads two orders

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StreamBatch:
    """One process's rows of a global batch, each int64 ``(rows,)``.

    Attributes:
        positions: Which samples.
        epoch: Of each row: a batch may span the end of an epoch.
        view: Which view of the sample: ``epoch * max_repeats + n`` for its n-th row in the epoch,
            so that no view is seen twice.
    """

    positions: Numbers
    epoch: Numbers
    view: Numbers


@dataclass
class Stream:
    """Batches in the order of a permutation for each epoch, keyed by (seed, epoch).

    Row ``g`` of the stream belongs to epoch ``g // size``; process ``rank`` takes the ``rank``-th
    of ``world_size`` equal blocks of each global batch. So each sample comes exactly once an epoch,
    in the same order for any number of processes; neighbours, which CutMix pairs, stay in one
    process where blocks are even; and the state is one integer, the step.

    Args:
        size: How many samples, or the positions to stream, int64 ``(size,)``, where one may be
            repeated.
        seed: Any integer.
        batch_size: Rows of a global batch, over all processes.
        rank: This process's number.
        world_size: How many processes.

    Raises:
        ValueError: A number is out of range, or the processes can't share a batch evenly.
    """

    size: int | npt.ArrayLike
    seed: int = field(kw_only=True)
    batch_size: int = field(kw_only=True)
    rank: int = field(default=0, kw_only=True)
    world_size: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.size, (int, np.integer)):
            positions = np.arange(self.size, dtype=np.int64)
        else:
            positions = np.asarray(self.size, dtype=np.int64)
        if positions.ndim != 1 or positions.size == 0:
            raise ValueError(f"Stream needs at least one sample, got shape {positions.shape}.")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to {self.world_size - 1}, got {self.rank}.")
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size must be a multiple of the {self.world_size} processes,"
                f" got {self.batch_size}."
            )
        self._positions = positions
        self._occurrence = _occurrences(positions)
        self.rows = int(positions.size)
        self.max_repeats = int(self._occurrence.max()) + 1
        self._orders: dict[int, Numbers] = {}

    def batch(self, step: int) -> StreamBatch:
        """This process's rows of global batch ``step``.

        Raises:
            ValueError: ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step must be 0 or more, got {step}.")
        first = step * self.batch_size
        share = self.batch_size // self.world_size
        row = np.arange(share, dtype=np.int64) + first + self.rank * share
        epoch = row // self.rows
        place = np.empty_like(row)
        for number in np.unique(epoch):
            here = epoch == number
            place[here] = self._order(int(number))[row[here] % self.rows]
        return StreamBatch(
            positions=self._positions[place],
            epoch=epoch,
            view=epoch * self.max_repeats + self._occurrence[place],
        )

    def _order(self, epoch: int) -> Numbers:
        """The epoch's permutation; the last few are kept, which changes nothing but the time."""
        if epoch not in self._orders:
            while len(self._orders) >= _EPOCHS_KEPT:
                del self._orders[next(iter(self._orders))]
            places = np.arange(self.rows, dtype=np.int64)
            self._orders[epoch] = keyed_order(self.seed, places, view=epoch, draw=_DRAW)
        return self._orders[epoch]


def _occurrences(positions: Numbers) -> Numbers:
    """How many equal positions come before each one."""
    order = np.argsort(positions, kind="stable")
    ordered = positions[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    lengths = np.diff(np.append(starts, positions.size))
    result = np.empty_like(positions)
    result[order] = np.arange(positions.size) - np.repeat(starts, lengths)
    return result
