"""Images decoded by worker processes: PyTorch's DataLoader carries requests there and back."""

from __future__ import annotations

import atexit
import os
import signal
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fastscarce.data.request import Decoded, Request, decode_request
from fastscarce.data.source import Failure, Source
from fastscarce.errors import DataError

__all__ = ["Workers", "explain"]


class _Decoder(Dataset[tuple[Tensor, dict[int, Failure]]]):
    """What a worker does with a request."""

    def __init__(self, source: Source, image_size: tuple[int, int], channels: int) -> None:
        self._source = source
        self._image_size = image_size
        self._channels = channels

    def __getitem__(self, request: Request) -> tuple[Tensor, dict[int, Failure]]:
        # Shared from the start, where an error goes to the parent: a queue that finds shared memory
        # full drops the batch, and the parent would wait for ever.
        done = decode_request(
            self._source,
            request,
            image_size=self._image_size,
            channels=self._channels,
            shared=get_worker_info() is not None,
        )
        return done.images, done.failures


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the whole group: the parent may still finish its step and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Workers:
    """Decodes requests in order, ahead of their use.

    Args:
        source: Where the samples come from.
        image_size: Height and width of the images in pixels.
        channels: Of the images, 1 or 3.
        workers: Processes; 0 decodes in this one, when an image is asked for.
        prefetch: Requests that each worker is ahead.
        pin: Whether results lie in pinned memory, for a copy to a GPU.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: tuple[int, int],
        channels: int,
        workers: int,
        prefetch: int,
        pin: bool,
    ) -> None:
        self._decoder = _Decoder(source, image_size, channels)
        self._workers = workers
        self._prefetch = prefetch
        self._pin = pin
        self._iterator: Iterator[tuple[Tensor, dict[int, Failure]]] | None = None
        here = weakref.ref(self)

        def at_exit() -> None:
            workers = here()
            if workers is not None:
                workers.close()

        # Does not hold these workers: a loader that is let go of ends them.
        self._at_exit = at_exit

    def start(self, requests: Iterable[Request]) -> Iterator[Decoded]:
        """Give the images of some requests, which may be endless, in their order.

        Raises:
            DataError: A worker died, or shared memory is full.
        """
        self.close()
        self._owner = os.getpid()
        loader: DataLoader[tuple[Tensor, dict[int, Failure]]] = DataLoader(
            self._decoder,
            batch_size=None,
            sampler=requests,
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            pin_memory=self._pin,
            worker_init_fn=_leave_signals_to_the_parent,
            # Of its own: the seed that it draws for the workers must not move the global one.
            generator=torch.Generator(),
        )
        # Before multiprocessing's own, which would wait for workers that nobody told to end.
        atexit.register(self._at_exit)
        try:
            self._iterator = iter(loader)
            while True:
                try:
                    images, failures = next(self._iterator)
                except StopIteration:
                    return
                yield Decoded(images, failures)
        except (RuntimeError, OSError, EOFError) as error:
            explained = explain(error)
            if explained is None:
                raise
            raise explained from error
        finally:
            self.close()

    def close(self) -> None:
        """End the workers. Starting again starts new ones."""
        atexit.unregister(self._at_exit)
        iterator, self._iterator = self._iterator, None
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None and self._owner == os.getpid():  # not in a fork of it
            shutdown()


def explain(error: Exception) -> DataError | None:
    """What a DataLoader's error means: full memory, a dead worker, or None for anything else."""
    text = str(error).strip()
    last = text.splitlines()[-1] if text else ""
    if "shared memory" in text or "No space left" in text:
        return DataError(
            "Shared memory is full, which decoded batches go through; enlarge /dev/shm, or lower"
            f" workers or batch_size ({last})."
        )
    gone = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))  # its end of a pipe
    if gone or ("DataLoader worker" in text and "Caught" not in text):
        return DataError(
            "A worker that decodes images ended; look at free memory, or lower workers"
            f" ({last or type(error).__name__})."
        )
    return None
