"""Images decoded and cropped by NVIDIA DALI: on the CPU by its threads, on a GPU by nvJPEG.

DALI gets the encoded images, the boxes in pixels and the requests' numbers from here, and draws
nothing itself. What decoders differ in never reaches it: an image that is no baseline JPEG of one
whole scan, nor a plain PNG, is decoded as the PyTorch loader does it, in this process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastscarce.data.crop import WHOLE, pixels_of
from fastscarce.data.decode import Header, inspect
from fastscarce.data.request import Decoded, Request, decode_request
from fastscarce.data.source import Failure, Source
from fastscarce.errors import ConfigError, DataError

__all__ = ["Dali"]

_SCAN, _BASELINE = 0xDA, (0xC0, 0xC1)
_TABLES = (0xC4, 0xC8, 0xCC)  # among the frames' numbers, and no frames
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_JPEG_END = b"\xff\xd9"


class Dali:
    """Decodes requests in order, ahead of their use.

    Args:
        source: Where the samples come from. Arrays need no decoder, and are cropped here.
        image_size: Height and width of the images in pixels.
        channels: Of the images, 1 or 3.
        rows: Most rows of a request.
        threads: Of DALI, on the CPU.
        prefetch: Requests that DALI is ahead.
        device: Where images are decoded, and stay.

    Raises:
        ConfigError: DALI is not installed.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: tuple[int, int],
        channels: int,
        rows: int,
        threads: int,
        prefetch: int,
        device: torch.device,
    ) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "The loader dali needs NVIDIA DALI; install it by: pip install fastscarce[dali]"
            ) from error
        self._source = source
        self._image_size = image_size
        self._channels = channels
        self._rows = rows
        self._threads = max(threads, 1)
        self._prefetch = prefetch
        self._device = device
        self._spare = _tiny_jpeg()
        self._sent: dict[int, _Sent] = {}

    def start(self, requests: Iterable[Request]) -> Iterator[Decoded]:
        """Give the images of some requests, which may be endless, in their order."""
        self.close()
        if not self._source.encoded:
            yield from (self._here(request) for request in requests)
            return
        pipeline = self._pipeline(iter(requests))
        expected = 0
        while True:
            try:
                images, numbers = pipeline.run()
            except StopIteration:
                return
            except RuntimeError:  # of a decoder: which image it was is found out here
                yield self._here(self._sent.pop(expected).request)
                expected += 1
                continue
            number = int(np.asarray(numbers.as_cpu().as_array()).flat[0])
            if number != expected:
                raise DataError(
                    f"DALI lost a batch: number {expected} was due, {number} came; use the"
                    " loader torch."
                )
            expected += 1
            yield self._sent.pop(number).finished(from_dlpack(images.as_tensor()).clone())

    def close(self) -> None:
        """Forget what was read ahead."""
        self._sent = {}

    def _here(self, request: Request) -> Decoded:
        return decode_request(
            self._source, request, image_size=self._image_size, channels=self._channels
        )

    def _pipeline(self, requests: Iterator[Request]) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self._device.type == "cuda"
        height, width = self._image_size

        # Without exec_dynamic one image that can't be decoded ends the pipeline for good.
        @pipeline_def(
            batch_size=self._rows,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            exec_dynamic=True,
            prefetch_queue_depth=self._prefetch,
        )
        def pipeline() -> tuple[Any, Any]:
            encoded, low, high, number = fn.external_source(
                source=self._inputs(requests), num_outputs=4, batch=True
            )
            images = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.GRAY if self._channels == 1 else types.RGB,
            )
            images = fn.resize(
                images,
                size=[height, width],
                roi_start=low,
                roi_end=high,
                interp_type=types.INTERP_CUBIC,
                antialias=True,
            )
            return images, number

        built = pipeline()
        built.build()
        return built

    def _inputs(
        self, requests: Iterator[Request]
    ) -> Iterator[
        tuple[list[npt.NDArray[np.uint8]], list[Any], list[Any], list[npt.NDArray[np.int64]]]
    ]:
        """Encoded images, boxes as (y, x) of their corners, and the request's number, a row each.

        The number travels through the pipeline beside the images, so that none is mistaken.
        """
        for number, request in enumerate(requests):
            sent = _Sent(request)
            encoded, low, high = [], [], []
            for row, content in enumerate(self._source.read_each(request.positions)):
                box = WHOLE if request.boxes is None else request.boxes[row]
                header = None
                if isinstance(content, bytes):
                    header = _for_dali(content)
                if header is None or not isinstance(content, bytes):
                    sent.decode(row, self._here(_row(request, row)))
                    content, shape = self._spare, (8, 8)
                else:
                    shape = (header.height, header.width)
                left, top, right, bottom = pixels_of(box, shape=shape, image_size=self._image_size)
                encoded.append(np.frombuffer(content, dtype=np.uint8))
                low.append(np.array((top, left), dtype=np.float32))
                high.append(np.array((bottom, right), dtype=np.float32))
            self._sent[number] = sent
            yield encoded, low, high, [np.array([number], dtype=np.int64)] * len(encoded)


class _Sent:
    """A request on its way, and the rows of it that were decoded beside DALI."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._rows: dict[int, Tensor] = {}
        self._failures: dict[int, Failure] = {}

    def decode(self, row: int, done: Decoded) -> None:
        """Keep a row's image, or why there is none."""
        self._rows[row] = done.images[0]
        if done.failures:
            self._failures[row] = done.failures[0]

    def finished(self, images: Tensor) -> Decoded:
        """DALI's images with those rows in their places."""
        for row, image in self._rows.items():
            images[row] = image.to(images.device)
        return Decoded(images, self._failures)


def _row(request: Request, row: int) -> Request:
    boxes = None if request.boxes is None else request.boxes[row : row + 1]
    return Request(request.positions[row : row + 1], boxes)


def _for_dali(content: bytes) -> Header | None:
    """The header of an image that all decoders read alike; None for any other, broken or not."""
    try:
        header = inspect(content)
    except DataError:
        return None
    if not header.plain or header.orientation != 1:
        return None
    alike = header.format == "PNG" or (header.format == "JPEG" and _is_one_scan(content))
    return header if alike else None


def _is_one_scan(content: bytes) -> bool:
    """Whether a JPEG is baseline, with one scan that ends where the bytes end.

    A marker in the middle of a scan is an error to libjpeg, which DALI passes over in silence.

    Source: ITU-T T.81, section B.1.
    """
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker, size = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (*_BASELINE, *_TABLES):
            return False
        place += 2 + size
        if marker == _SCAN:
            end = _END_OF_SCAN.search(content, place)
            return end is not None and end[0] == _JPEG_END and end.end() == len(content)
    return False


def _tiny_jpeg() -> bytes:
    """What stands in the place of an image that DALI doesn't get."""
    import io

    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "JPEG")
    return content.getvalue()
