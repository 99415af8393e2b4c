"""Batches of an epoch: each sample exactly once, for any number of processes, resumed anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastscarce.augment import neighbours
from fastscarce.data.order import Numbers, epoch_order, occurrences

__all__ = ["Sampler", "SamplerBatch"]

_KEYS = ("epoch", "position", "seed")
_EPOCHS = 2**32  # a view's number has 32 bits


@dataclass(frozen=True)
class SamplerBatch:
    """One process's rows of a global batch. Padding repeats a row of the global batch, masked.

    Attributes:
        ids: Of the samples, int64 ``(rows,)``.
        positions: Of the samples among the sampler's ids, int64 ``(rows,)``.
        mask: Whether a row counts, bool ``(rows,)``; False for padding.
        partners: Place in this batch of the row that is mixed in, int64 ``(rows,)``, for
            `fastscarce.augment.draw`; its own place for a row that has no partner.
        view: Which view of each sample, int64 ``(rows,)``.
        state: The sampler's state once this batch is done with.
    """

    ids: Numbers
    positions: Numbers
    mask: npt.NDArray[np.bool_]
    partners: Numbers
    view: Numbers
    state: dict[str, int]


class Sampler:
    """An epoch's batches in the order of a permutation keyed by (seed, epoch).

    The epoch is cut into global batches of ``batch_size`` rows, and each into nearly equal blocks
    of consecutive rows, one a process. So a global batch holds the same samples, in the same
    order, for any number of processes. All processes get equally many rows and batches: what is
    missing, in the last batch or where a batch can't be shared evenly, is padded and masked.

    Iterating goes from where the sampler stands to the end of the epoch, and leaves it at the start
    of the next one.

    Args:
        size: How many samples, with ids from 0; or their ids, int64 ``(n,)``, in any order. The
            batches don't depend on that order. An id may be repeated: each time it is another view.
        seed: Any integer; its low 64 bits count.
        rank: This process's number.
        world_size: How many processes.
        batch_size: Rows of a global batch, over all processes; with pairs its whole pairs.
        pairs: Deal the samples into pairs of partners, keyed by (seed, view), never split over
            batches or processes. The one left over of an odd number is its own partner.
        views: How many views there are: epoch ``e`` reads view ``e % views``, and pairs as that
            view does. None: each epoch reads a view of its own.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        size: int | npt.ArrayLike,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int,
        pairs: bool = False,
        views: int | None = None,
    ) -> None:
        ids = np.arange(size) if isinstance(size, (int, np.integer)) else np.asarray(size)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(
                "Sampler needs a size of at least 1, or integer ids of shape (n,), got"
                f" {size if np.ndim(size) == 0 else f'{ids.dtype} {ids.shape}'}."
            )
        if not 0 <= rank < world_size:
            raise ValueError(
                f"Sampler needs a rank from 0 to {world_size - 1} of {world_size} processes,"
                f" got {rank}."
            )
        if not isinstance(seed, (int, np.integer)):
            raise ValueError(f"Sampler needs a whole number as its seed, got {seed!r}.")
        if batch_size < 1 + pairs:
            raise ValueError(
                f"Sampler needs a batch_size of at least {1 + pairs}{' with pairs' * pairs},"
                f" got {batch_size}."
            )
        if views is not None and views < 1:
            raise ValueError(f"Sampler needs views of at least 1, got {views}.")
        self.ids = np.ascontiguousarray(ids, dtype=np.int64)
        self.size = int(self.ids.size)
        self.seed = int(seed)
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.pairs = pairs
        self.views = views
        self._occurrence = occurrences(self.ids)
        self._repeats = int(self._occurrence.max()) + 1
        self._unit = 2 if pairs else 1
        self._epoch = 0
        self._position = 0
        self._kept: tuple[tuple[int, int], Numbers] | None = None

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next batch belongs to."""
        return self._epoch

    def __len__(self) -> int:
        """Batches of a whole epoch, the same for each process."""
        return -(-self.size // self._stride)

    def __iter__(self) -> Iterator[SamplerBatch]:
        epoch = self._epoch
        while self._epoch == epoch:
            batch = self.batch(epoch, self._position)
            self.load_state_dict(batch.state)
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; in the epoch that the sampler stands in, stay.

        Raises:
            ValueError: ``epoch`` is negative or above 2**32 - 1.
        """
        _check_epoch(epoch)
        if epoch != self._epoch:
            self._epoch, self._position = int(epoch), 0

    def state_dict(self) -> dict[str, int]:
        """Where the sampler stands: three integers, ``seed``, ``epoch`` and ``position``.

        The position counts the epoch's samples that all processes have been given.
        """
        return {"seed": self.seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go where a sampler of the same samples stood, with any number of processes.

        Raises:
            ValueError: The state isn't one of a sampler of as many samples.
        """
        sound = (
            isinstance(state, Mapping)
            and sorted(state) == list(_KEYS)
            and all(
                isinstance(value, (int, np.integer)) and not isinstance(value, bool)
                for value in state.values()
            )
        )
        if not sound:
            raise ValueError(
                f"Sampler needs a state of the integers {', '.join(_KEYS)}, got {state!r}."
            )
        _check_epoch(state["epoch"])
        position = int(state["position"])
        if not 0 <= position < self.size or position % self._unit:
            whole = " at a whole pair" if self.pairs else ""
            raise ValueError(
                f"Sampler needs a position from 0 to {self.size - 1}{whole}, got {position}; the"
                " state is of other samples."
            )
        self.seed, self._epoch, self._position = int(state["seed"]), int(state["epoch"]), position

    def batch(self, epoch: int, position: int) -> SamplerBatch:
        """This process's rows of the global batch that starts at ``position`` of ``epoch``.

        A pure function: where the sampler stands doesn't change it, and isn't changed.

        Raises:
            ValueError: The epoch or the position is out of range.
        """
        _check_epoch(epoch)
        if not 0 <= position < self.size or position % self._unit:
            raise ValueError(
                f"Sampler needs a position from 0 to {self.size - 1}, in steps of {self._unit},"
                f" got {position}."
            )
        order = self._order(epoch)
        end = min(position + self._stride, self.size)
        units = -(-(end - position) // self._unit)
        first = position + self.rank * units // self.world_size * self._unit
        last = min(position + (self.rank + 1) * units // self.world_size * self._unit, end)
        count = max(last - first, 0)
        rows = -(-self._stride // self._unit // self.world_size) * self._unit
        places = np.full(rows, order[position], dtype=np.int64)
        places[:count] = order[first:last]
        partners = np.arange(rows, dtype=np.int64)
        if self.pairs:
            partners[:count] = neighbours(count)
        ended = end == self.size
        return SamplerBatch(
            ids=self.ids[places],
            positions=places,
            mask=np.arange(rows) < count,
            partners=partners,
            view=self._view(epoch) * self._repeats + self._occurrence[places],
            state={
                "seed": self.seed,
                "epoch": epoch + int(ended),
                "position": 0 if ended else end,
            },
        )

    @property
    def _stride(self) -> int:
        """Samples of a full global batch: with pairs, an odd batch size leaves a row out."""
        return self.batch_size // self._unit * self._unit

    def _view(self, epoch: int) -> int:
        return epoch if self.views is None else epoch % self.views

    def _order(self, epoch: int) -> Numbers:
        """The epoch's permutation; the last one is kept, which changes nothing but the time."""
        key = (self.seed, epoch)
        if self._kept is None or self._kept[0] != key:
            view = self._view(epoch) * self._repeats + self._occurrence if self.pairs else None
            epochs = epoch * self._repeats + self._occurrence
            self._kept = key, epoch_order(self.ids, seed=self.seed, epoch=epochs, view=view)
        return self._kept[1]


def _check_epoch(epoch: int) -> None:
    if not isinstance(epoch, (int, np.integer)):
        raise ValueError(f"Sampler needs a whole number as an epoch, got {epoch!r}.")
    if not 0 <= epoch < _EPOCHS:
        raise ValueError(f"Sampler needs an epoch from 0 to {_EPOCHS - 1}, got {epoch}.")
