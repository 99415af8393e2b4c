"""Image files to arrays of one size, by Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastscarce.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SUFFIXES", "decode", "look"]

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)

_GREY_MODES = frozenset(("1", "L", "LA", "La", "F", "I"))
_ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 exchange width and height


def look(path: Path) -> tuple[int, int, bool]:
    """Read a file's header: height and width as shown, and whether it is grey.

    Raises:
        DataError: The file is no image that Pillow reads.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
            return height, width, _is_grey(image)
    except Exception as error:  # Pillow's plugins raise what they like on broken bytes
        raise _unreadable(path, error) from error


def decode(path: Path, *, height: int, width: int, grey: bool) -> npt.NDArray[np.uint8]:
    """Decode a file: EXIF rotation applied, shorter side resized to fit, centre cropped.

    Returns:
        uint8 ``(height, width, 1 or 3)``.

    Raises:
        DataError: The file can't be decoded.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            image = _to_bytes(upright).convert("L" if grey else "RGB")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        return np.asarray(image, dtype=np.uint8).reshape(height, width, 1 if grey else 3)
    except Exception as error:
        raise _unreadable(path, error) from error


def _is_grey(image: Image) -> bool:
    return image.mode in _GREY_MODES or image.mode.startswith("I;16")


def _to_bytes(image: Image) -> Image:
    """Sixteen-bit greys scaled to eight bits, where Pillow's own conversion would clip them."""
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I") and (image.mode != "I" or levels.max(initial=0.0) > 255):
        levels = levels / 257.0
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} can't be decoded ({type(error).__name__}: {error});"
        " replace or remove the file, or set on_error to skip."
    )
