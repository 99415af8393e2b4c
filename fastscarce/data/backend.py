"""Who decodes: worker processes, or DALI."""

from __future__ import annotations

import torch

from fastscarce.data.dali import Dali
from fastscarce.data.request import Backend
from fastscarce.data.source import Source
from fastscarce.data.workers import Workers

__all__ = ["open_backend"]


def open_backend(
    name: str,
    source: Source,
    *,
    image_size: tuple[int, int],
    channels: int,
    rows: int,
    workers: int,
    prefetch: int,
    device: torch.device,
) -> Backend:
    """A backend by its name.

    Args:
        name: ``torch`` or ``dali``.
        source: Where the samples come from.
        image_size: Height and width of the images in pixels.
        channels: Of the images, 1 or 3.
        rows: Most rows of a request.
        workers: Processes of PyTorch's loader, or threads of DALI.
        prefetch: Requests that each worker, or DALI, is ahead.
        device: Where the images are going.

    Raises:
        ValueError: There is no backend of that name.
        ConfigError: It is not installed.
    """
    if name == "torch":
        return Workers(
            source,
            image_size=image_size,
            channels=channels,
            workers=workers,
            prefetch=prefetch,
            pin=device.type == "cuda",
        )
    if name == "dali":
        return Dali(
            source,
            image_size=image_size,
            channels=channels,
            rows=rows,
            threads=workers,
            prefetch=prefetch,
            device=device,
        )
    raise ValueError(f"Loader needs a backend torch or dali, got {name!r}.")
