"""What a loader asks to be decoded, and what comes of it, whoever decodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.data.crop import WHOLE, Boxes, as_channels, decode_crop, resize_crop
from fastscarce.data.source import Failure, Source
from fastscarce.errors import DataError

__all__ = ["Backend", "Decoded", "Request", "decode_request"]


@dataclass(frozen=True)
class Request:
    """What is to be decoded.

    Attributes:
        positions: Of the samples in the source, int64 ``(rows,)``.
        boxes: What is kept of each image, float32 ``(rows, 4)``, as `crop_boxes` gives them; None
            keeps the whole centred region.
    """

    positions: npt.NDArray[np.int64]
    boxes: Boxes | None = None


@dataclass(frozen=True)
class Decoded:
    """What came of a request.

    Attributes:
        images: uint8 ``(rows, height, width, channels)``; zeros where a row failed.
        failures: The rows that could not be read or decoded.
    """

    images: Tensor
    failures: dict[int, Failure]


def decode_request(
    source: Source,
    request: Request,
    *,
    image_size: tuple[int, int],
    channels: int,
    shared: bool = False,
) -> Decoded:
    """Read and decode in this process, into shared memory if asked for."""
    images = torch.empty((len(request.positions), *image_size, channels), dtype=torch.uint8)
    if shared:
        images.share_memory_()
    failures: dict[int, Failure] = {}
    for row, content in enumerate(source.read_each(request.positions)):
        if isinstance(content, Failure):
            failures[row] = content
            continue
        box = WHOLE if request.boxes is None else request.boxes[row]
        try:
            if isinstance(content, bytes):
                image = decode_crop(content, box, image_size=image_size, channels=channels)
            else:
                image = resize_crop(as_channels(content, channels), box, image_size=image_size)
            images[row] = image
        except DataError as error:
            failures[row] = source.failure(request.positions[row], str(error))
    images[list(failures)] = 0
    return Decoded(images, failures)


class Backend(Protocol):
    """Decodes requests in order, ahead of their use."""

    def start(self, requests: Iterable[Request]) -> Iterator[Decoded]:
        """Give the images of some requests, which may be endless, in their order.

        Raises:
            DataError: The decoding itself broke down, not a single image.
        """

    def close(self) -> None:
        """End what `start` started. Starting again is possible."""
