"""From a teacher's batches to shards, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.cache.quality import sums_of
from fastscarce.cache.record import Layout, decode
from fastscarce.cache.samples import Samples
from fastscarce.cache.shard import ShardWriter
from fastscarce.errors import TrainingError

__all__ = ["Piece", "Pipeline", "shard_rows"]

# A shard is closed this part of it early, so that the teacher goes on while it is written.
_PART = 8

Ids = npt.NDArray[np.int64]


def shard_rows(rows: int, batch_size: int) -> int:
    """After how many rows a shard is closed where ``rows`` may be on their way."""
    return max(batch_size, rows - rows // _PART)


@dataclass(frozen=True)
class Piece:
    """Rows of one forward pass on their way to the writer."""

    view: int
    keep: Ids  # which of the batch's rows are new
    ids: Ids
    records: Tensor
    sentinels: dict[int, str]
    ready: torch.cuda.Event | None


class Pipeline:
    """A queue to the thread that writes; an error there is raised at the next call here.

    Rows that the teacher is asked about, that wait, are collected or are being written are
    together never more than ``rows``: as many are lost where the process dies.

    Args:
        layout: Of the rows.
        samples: That they are of, lowest id first.
        writer: Of the shards.
        rows: That may be on their way. At least a batch.
    """

    def __init__(self, layout: Layout, samples: Samples, writer: ShardWriter, rows: int) -> None:
        self._layout = layout
        self._samples = samples
        self._writer = writer
        self._hashes: dict[tuple[int, int], str] = {}  # of sentinels, until their shard is written
        writer.summarise = self._summary
        self._most = rows
        self._asked = 0
        self._change = threading.Condition()
        # Pieces, numbers of rows that there has to be room for, and None at the end.
        self._queue: queue.SimpleQueue[Piece | int | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="table-writer", daemon=True)
        self._thread.start()

    def reserve(self, rows: int) -> None:
        """Wait until the teacher may be asked about so many more rows.

        Raises what the writing ended in.
        """
        with self._change:
            if not self._fits(rows):
                self._queue.put(rows)
                self._change.wait_for(lambda: self._error is not None or self._fits(rows))
        self._raise()
        self._asked += rows

    def put(self, piece: Piece) -> None:
        """Hand over rows that were reserved."""
        self._queue.put(piece)

    def close(self) -> None:
        """Have everything written; raises what the writing ended in."""
        self._queue.put(None)
        self._thread.join()
        self._raise()

    def _fits(self, rows: int) -> bool:
        return self._asked + rows - self._writer.written <= self._most

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        piece: Piece | int | None = 0
        while piece is not None:
            piece = self._queue.get()
            if self._error is not None:
                continue  # what comes after an error is let go, so that nobody waits
            try:
                if isinstance(piece, Piece):
                    self._write(piece)
                elif piece is None or not self._fits(piece):
                    self._writer.flush()
            except BaseException as error:
                self._error = error
            with self._change:
                self._change.notify()

    def _write(self, piece: Piece) -> None:
        if piece.ready is not None:
            piece.ready.synchronize()
        whole = len(piece.keep) == len(piece.records)
        records = piece.records if whole else piece.records[torch.from_numpy(piece.keep)]
        # By view too: the shard of the view before may still have to be written.
        self._hashes.update({(piece.view, key): text for key, text in piece.sentinels.items()})
        self._writer.add(piece.view, piece.ids[piece.keep], records.numpy())

    def _summary(
        self, view: int, ids: Ids, records: npt.NDArray[np.uint8]
    ) -> tuple[dict[str, float], list[list[Any]]]:
        """Of a shard's rows at once: by batches it would cost the teacher's passes a per cent."""
        rows = decode(torch.from_numpy(records), self._layout)
        # Nor is a row that gives nothing to any class.
        most = rows.log_probs.amax(1)
        odd = torch.isnan(most) | (torch.isneginf(most) & torch.isneginf(rows.log_tail))
        if bool(odd.any()):
            raise TrainingError(
                f"The teacher's output on sample {int(ids[int(odd.nonzero()[0])])}, view {view}, is"
                " not finite; run it in float32, or train it with a lower learning rate."
            )
        labels = self._samples.labels[np.searchsorted(self._samples.ids, ids)]
        sums, first = sums_of(rows, self._layout, labels)
        known = np.array([key for of, key in self._hashes if of == view], dtype=np.int64)
        sentinels = [
            [int(ids[row]), self._hashes.pop((view, int(ids[row]))), int(first[row])]
            for row in np.flatnonzero(np.isin(ids, known))
        ]
        return sums, sentinels
