"""The part of an image that a view shows, decoded and brought to the view's size.

A resized crop at a policy's beginning can be done where the image is decoded, from all of its
pixels. The rest of the policy is drawn as it was, so that a view is the same view either way.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastscarce.augment import Policy, ResizedCrop, draw
from fastscarce.data.decode import Header, decode_whole, inspect
from fastscarce.errors import DataError

__all__ = [
    "WHOLE",
    "Boxes",
    "as_channels",
    "crop_boxes",
    "decode_crop",
    "pixels_of",
    "resize_crop",
    "without_crop",
]

Boxes = npt.NDArray[np.float32]

WHOLE = (0.0, 0.0, 1.0, 1.0)

# What is left to shrink of a JPEG that was scaled while it was decoded, whose filter is a box.
_LEAST_SHRINK = 3.0


def without_crop(policy: Policy) -> Policy:
    """The policy whose first step crops nothing, where it is a resized crop.

    The step stays, because each step's draws depend on how many stand before it.
    """
    if not policy.steps or not isinstance(policy.steps[0], ResizedCrop):
        return policy
    return replace(policy, steps=(ResizedCrop(scale=(1.0, 1.0), ratio=1.0), *policy.steps[1:]))


def crop_boxes(
    policy: Policy,
    ids: npt.ArrayLike,
    *,
    view: npt.ArrayLike,
    seed: int,
    image_size: tuple[int, int],
) -> Boxes | None:
    """What the resized crop at a policy's beginning keeps of each image.

    Returns:
        float32 ``(rows, 4)``: left, top, right and bottom as fractions of the centred region that
        has the aspect ratio of ``image_size``; None where the policy doesn't begin so.

    Raises:
        ValueError: As `fastscarce.augment.draw` says.
    """
    if not policy.steps or not isinstance(policy.steps[0], ResizedCrop):
        return None
    first = replace(policy, steps=policy.steps[:1])
    matrix = (
        draw(first, ids, view=view, seed=seed, image_size=image_size).table["matrix"].reshape(-1, 6)
    )
    height, width = image_size
    x, right, y, below = (matrix[:, place].astype(np.float64) for place in (0, 2, 4, 5))
    middle = np.stack((right / width, below / height), axis=1) + 0.5
    half = np.stack((x, y), axis=1) / 2.0
    return np.clip(np.hstack((middle - half, middle + half)), 0.0, 1.0).astype(np.float32)


def pixels_of(
    box: npt.ArrayLike, *, shape: tuple[int, int], image_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """A box in whole pixels of an image: left, top, right, bottom, at least a pixel in each axis.

    Args:
        box: Left, top, right, bottom as `crop_boxes` gives them.
        shape: Height and width of the image.
        image_size: Height and width of the view, whose aspect ratio the centred region has.
    """
    left, top, right, bottom = (float(part) for part in np.asarray(box))
    scale = min(shape[0] / image_size[0], shape[1] / image_size[1])
    across, down = image_size[1] * scale, image_size[0] * scale
    x, y = (shape[1] - across) / 2.0, (shape[0] - down) / 2.0
    first_x, last_x = _edges(x + left * across, x + right * across, shape[1])
    first_y, last_y = _edges(y + top * down, y + bottom * down, shape[0])
    return first_x, first_y, last_x, last_y


def _edges(low: float, high: float, size: int) -> tuple[int, int]:
    first = min(max(math.floor(low + 0.5), 0), size - 1)
    return first, min(max(math.floor(high + 0.5), first + 1), size)


def decode_crop(
    content: bytes, box: npt.ArrayLike = WHOLE, *, image_size: tuple[int, int], channels: int
) -> Tensor:
    """Decode an image and bring a box of it to a size: bicubic, antialiased.

    A JPEG that is shrunk to a sixth or less is scaled while it is decoded, by a power of two that
    leaves a third or less to do: a level or two off the whole one's result, on average.

    Args:
        content: The encoded image.
        box: Left, top, right, bottom as `crop_boxes` gives them.
        image_size: Height and width of the result in pixels.
        channels: Of the result, 1 or 3.

    Returns:
        uint8 ``(height, width, channels)``.

    Raises:
        DataError: It can't be decoded. The text is the reason, without the image's name.
    """
    header = inspect(content)
    if header.format == "JPEG" and header.plain and header.orientation == 1:
        part = _part(content, header, box, image_size, channels)
        if part is not None:
            return _resized(part, image_size)
    whole = decode_whole(content, grey=channels == 1)
    return resize_crop(whole, box, image_size=image_size)


def resize_crop(
    image: npt.NDArray[np.uint8], box: npt.ArrayLike, *, image_size: tuple[int, int]
) -> Tensor:
    """Bring a box of an image, uint8 ``(height, width, channels)``, to a size."""
    shape = (image.shape[0], image.shape[1])
    left, top, right, bottom = pixels_of(box, shape=shape, image_size=image_size)
    return _resized(torch.from_numpy(image[top:bottom, left:right].copy()), image_size)


def _resized(part: Tensor, image_size: tuple[int, int]) -> Tensor:
    if part.shape[:2] == image_size:
        return part
    # A batch of one in channels last, strides and all: others are packed and unpacked on the way.
    resized = torch.nn.functional.interpolate(
        part[None].permute(0, 3, 1, 2), size=image_size, mode="bicubic", antialias=True
    )
    return resized[0].permute(1, 2, 0)


def _part(
    content: bytes,
    header: Header,
    box: npt.ArrayLike,
    image_size: tuple[int, int],
    channels: int,
) -> Tensor | None:
    """The box of a plain JPEG, decoded no larger than it needs to be; None where it is broken."""
    pixels = pixels_of(box, shape=(header.height, header.width), image_size=image_size)
    shrink = min((pixels[2] - pixels[0]) / image_size[1], (pixels[3] - pixels[1]) / image_size[0])
    scaled = shrink >= 2 * _LEAST_SHRINK
    if not scaled and channels == 1 and not header.grey:
        return None  # grey of colours is Pillow's, which is not the JPEG's own
    try:
        if scaled:
            return _scaled_part(content, header, pixels, image_size, channels, shrink)
        left, top, right, bottom = pixels
        return _decoded(content, channels)[top:bottom, left:right].contiguous()
    except Exception:  # `decode_whole` says what is wrong, or mends it
        return None


def _decoded(content: bytes, channels: int) -> Tensor:
    """A whole JPEG, uint8 ``(height, width, channels)``: half of the time that Pillow takes."""
    from torchvision.io import ImageReadMode, decode_jpeg

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels: Tensor = decode_jpeg(encoded, mode)
    return pixels.permute(1, 2, 0)


def _scaled_part(
    content: bytes,
    header: Header,
    pixels: tuple[int, int, int, int],
    image_size: tuple[int, int],
    channels: int,
    shrink: float,
) -> Tensor:
    """The box of a JPEG at its size, which is scaled by a power of two while it is decoded."""
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    size, (left, top, right, bottom) = (header.width, header.height), pixels
    with Image.open(io.BytesIO(content)) as image:
        width, height = (math.ceil(side * _LEAST_SHRINK / shrink) for side in size)
        image.draft(mode, (width, height))
        scale = next(n for n in (8, 4, 2, 1) if image.size == tuple(-(-side // n) for side in size))
        # To a part of a pixel: a box of whole ones would be another one here.
        box = (left / scale, top / scale, right / scale, bottom / scale)
        part = image.convert(mode).resize(image_size[::-1], Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(part, dtype=np.uint8).reshape(*image_size, channels))


def as_channels(image: npt.NDArray[np.uint8], channels: int) -> npt.NDArray[np.uint8]:
    """An array, ``(height, width, 1 or 3)``, with so many channels.

    Raises:
        DataError: A colour image is asked to be grey.
    """
    if image.shape[2] == channels:
        return image
    if image.shape[2] == 1:
        return np.broadcast_to(image, (*image.shape[:2], channels))
    raise DataError(f"it has {image.shape[2]} channels, not {channels}")
