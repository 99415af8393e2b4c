"""The order of training: an endless stream of batches that is a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fastscarce.augment import neighbours
from fastscarce.data.order import Numbers, epoch_order, occurrences

__all__ = ["Stream", "StreamBatch"]

_EPOCHS_KEPT = 2  # a batch that spans an epoch's end reads two orders


@dataclass(frozen=True)
class StreamBatch:
    """One process's rows of a global batch, each int64 ``(rows,)``.

    Attributes:
        positions: Which samples.
        epoch: Of each row: a batch may span the end of an epoch.
        view: Which view of the sample: ``epoch * max_repeats + n`` for its n-th row in the epoch,
            so that no view is seen twice, unless the stream has ``views``.
        partners: Place in this batch of the row that is mixed in, for `fastscarce.augment.draw`;
            its own place for a row that has no partner.
    """

    positions: Numbers
    epoch: Numbers
    view: Numbers
    partners: Numbers

    def piece(self, number: int, pieces: int) -> StreamBatch:
        """One of ``pieces`` equal parts of the rows; of whole pairs where the stream has pairs."""
        rows = len(self.positions) // pieces
        part = slice(number * rows, (number + 1) * rows)
        return StreamBatch(
            self.positions[part],
            self.epoch[part],
            self.view[part],
            self.partners[part] - number * rows,
        )


@dataclass
class Stream:
    """Full batches without end, epoch after epoch, each in the order that `Sampler` deals too.

    Row ``g`` of the stream belongs to epoch ``g // size``; process ``rank`` takes the ``rank``-th
    of ``world_size`` equal blocks of each global batch. So each sample comes exactly once an epoch,
    in the same order for any number of processes, and the state is one integer, the step.

    With pairs, partners are neighbours that start at an even row: the sample that is left over of
    an odd number ends an even epoch and begins an odd one. So a block of an even number of rows
    never splits a pair.

    Args:
        size: How many samples, or the positions to stream, int64 ``(size,)``, where one may be
            repeated.
        seed: Any integer.
        batch_size: Rows of a global batch, over all processes.
        rank: This process's number.
        world_size: How many processes.
        pairs: Deal the samples into pairs of partners, keyed by (seed, epoch).
        ids: Of the samples, int64 ``(size,)``, which order and pairs follow from; None: the
            positions.
        views: After how many views of a sample the first comes again. None: never.
        same_pairs: A view comes again with its pairs, as `Sampler` deals them, and as a teacher
            has seen it who looked at mixed images. Otherwise each epoch deals anew.

    Raises:
        ValueError: A number is out of range, or the processes can't share a batch evenly.
    """

    size: int | npt.ArrayLike
    seed: int = field(kw_only=True)
    batch_size: int = field(kw_only=True)
    rank: int = field(default=0, kw_only=True)
    world_size: int = field(default=1, kw_only=True)
    pairs: bool = field(default=False, kw_only=True)
    ids: npt.ArrayLike | None = field(default=None, kw_only=True)
    views: int | None = field(default=None, kw_only=True)
    same_pairs: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.size, (int, np.integer)):
            positions = np.arange(self.size, dtype=np.int64)
        else:
            positions = np.asarray(self.size, dtype=np.int64)
        if positions.ndim != 1 or positions.size == 0:
            raise ValueError(f"Stream needs at least one sample, got shape {positions.shape}.")
        ids = positions if self.ids is None else np.ascontiguousarray(self.ids, dtype=np.int64)
        if ids.shape != positions.shape:
            raise ValueError(
                f"Stream needs one id a sample, ({positions.size},), got shape {ids.shape}."
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to {self.world_size - 1}, got {self.rank}.")
        block = self.world_size * (2 if self.pairs else 1)
        if self.views is not None and self.views < 1:
            raise ValueError(f"Stream needs views of at least 1, got {self.views}.")
        if self.batch_size < 1 or self.batch_size % block:
            what = "twice the" if self.pairs else "the"
            raise ValueError(
                f"batch_size must be a multiple of {what} {self.world_size} processes,"
                f" got {self.batch_size}."
            )
        self._positions = positions
        self._ids = ids
        self._occurrence = occurrences(ids)
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
            view=self._view(epoch * self.max_repeats + self._occurrence[place]),
            partners=self._partners(epoch),
        )

    def _view(self, number: Numbers) -> Numbers:
        return number if self.views is None else number % self.views

    def _partners(self, epoch: Numbers) -> Numbers:
        """Neighbours from an even row on, but for two that are of two epochs: each its own."""
        place = np.arange(len(epoch), dtype=np.int64)
        if not self.pairs:
            return place
        partner = neighbours(len(epoch))
        return np.where(epoch[partner] == epoch, partner, place)

    def _order(self, epoch: int) -> Numbers:
        """The epoch's permutation; the last few are kept, which changes nothing but the time."""
        if epoch not in self._orders:
            while len(self._orders) >= _EPOCHS_KEPT:
                del self._orders[next(iter(self._orders))]
            numbers = epoch * self.max_repeats + self._occurrence
            view = self._view(numbers) if self.same_pairs else numbers
            self._orders[epoch] = epoch_order(
                self._ids,
                seed=self.seed,
                epoch=numbers,
                view=view if self.pairs else None,
                odd_first=bool(epoch % 2),
            )
        return self._orders[epoch]
