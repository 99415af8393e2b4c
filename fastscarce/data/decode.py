"""Encoded images to arrays, by Pillow; and what is looked at before any decoder sees the bytes.

Every loader asks `inspect` first and falls back on `decode_whole` where a faster decoder gives up,
so that all of them take and refuse the same files for the same reasons.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastscarce.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LARGEST_IMAGE", "SUFFIXES", "Header", "decode_whole", "inspect", "mended"]

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)

# Pixels: a quarter of a GiB of RGB, where Pillow too begins to suspect a decompression bomb.
LARGEST_IMAGE = 89_478_485

_GREY_MODES = frozenset(("1", "L", "LA", "La", "F", "I"))
_ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 exchange width and height
_EXIF_OF_PNG = {"exif", "Raw profile type exif"}
_PLAIN = ("BMP", "JPEG", "PNG")
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
# Where a scan is whole, a decoder skips these up to the marker; where it isn't, they are pixels.
_STRANGE_TAIL = b"\x55\x9a" * 64 + _JPEG_END


@dataclass(frozen=True)
class Header:
    """What an encoded image says of itself.

    Attributes:
        format: Pillow's name of it, ``JPEG`` for example.
        height: In pixels, as shown: EXIF's rotation is applied.
        width: In pixels, as shown.
        grey: Whether it has one channel.
        orientation: EXIF's, 1 to 8; 1 is upright.
        plain: Whether it is a JPEG, PNG or BMP of 8-bit grey or RGB, of one frame and with its end
            there: then every decoder reads it alike. Of others Pillow decides.
    """

    format: str
    height: int
    width: int
    grey: bool
    orientation: int
    plain: bool


def inspect(content: bytes, *, largest: int = LARGEST_IMAGE) -> Header:
    """Read an encoded image's header, and refuse what no decoder should be given.

    Args:
        content: The encoded image.
        largest: Most pixels; a header may ask for more memory than there is.

    Raises:
        DataError: It is empty, no image that Pillow knows, or too large. The text is the reason,
            a few words that don't name the image.
    """
    with _opened(content, largest) as image:
        width, height = image.size
        orientation = _orientation(image, content)
        if orientation in (5, 6, 7, 8):
            width, height = height, width
        kind = image.format or "unknown"
        plain = (
            image.mode in ("L", "RGB")
            and kind in _PLAIN
            and not getattr(image, "is_animated", False)
            and _has_its_end(content, kind)
        )
        return Header(kind, height, width, _is_grey(image), orientation, plain)


def decode_whole(
    content: bytes, *, grey: bool, largest: int = LARGEST_IMAGE
) -> npt.NDArray[np.uint8]:
    """Decode an image at its own size, upright; of an animation the first frame.

    Alpha is dropped, a palette looked up, CMYK converted, and 16 bits are scaled to 8. A JPEG that
    lacks only its last marker is taken; one that lacks image data is not.

    Returns:
        uint8 ``(height, width, 1 or 3)``.

    Raises:
        DataError: It can't be decoded. The text is the reason, without the image's name.
    """
    image = _decoded(content, grey, largest)
    return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, 1 if grey else 3)


def mended(content: bytes) -> bytes:
    """A JPEG that lacks only its last marker, with the marker; anything else as it is.

    Source: ITU-T T.81, section B.1.1.3; decoders differ in what they make of a missing EOI.
    """
    if not content.startswith(_JPEG_START) or content.rstrip(b"\0").endswith(_JPEG_END):
        return content
    data = content.removesuffix(b"\xff")
    whole = data + _JPEG_END
    try:
        # Data that is missing is filled up with what follows, so that two tails differ.
        pixels = [_pixels(tail) for tail in (whole, data + _STRANGE_TAIL)]
    except Exception:  # broken in another way, which a decoder will say
        return content
    return whole if pixels[0] == pixels[1] else content


def _pixels(content: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return image.tobytes()


def _opened(content: bytes, largest: int) -> Image:
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise DataError("it is empty")
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        raise DataError("it is no image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(_too_large(largest)) from error
    except Exception as error:  # Pillow's plugins raise what they like on broken bytes
        raise DataError(_reason(error)) from error
    if image.width * image.height > largest:
        raise DataError(f"{_too_large(largest)}: {image.width}x{image.height}")
    return image


def _has_its_end(content: bytes, kind: str) -> bool:
    if kind == "PNG":
        return b"IEND" in content[-64:]
    return kind != "JPEG" or content.rstrip(b"\0").endswith(_JPEG_END)


def _too_large(largest: int) -> str:
    return f"its header asks for more than {largest:,} pixels"


def _decoded(content: bytes, grey: bool, largest: int) -> Image:
    from PIL import ImageOps

    try:
        with _opened(content, largest) as opened:
            opened.load()  # before its EXIF is asked for: what is broken has to be said
            turned = _orientation(opened, content) != 1
            upright = ImageOps.exif_transpose(opened) if turned else opened
            return _to_bytes(upright).convert("L" if grey else "RGB")
    except DataError:
        raise
    except Exception as error:
        whole = mended(content)
        if whole != content:
            return _decoded(whole, grey, largest)
        raise DataError(_reason(error)) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _orientation(image: Image, content: bytes) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns it itself, and says its size as shown
    if image.format == "PNG" and not _EXIF_OF_PNG & image.info.keys():
        if b"eXIf" not in content:
            return 1  # Pillow would decode the whole image to look for a block after it
        try:
            image.load()
        except Exception as error:
            raise DataError(_reason(error)) from error
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing of the pixels
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _is_grey(image: Image) -> bool:
    return image.mode in _GREY_MODES or image.mode.startswith("I;16")


def _to_bytes(image: Image) -> Image:
    """Sixteen-bit greys scaled to eight bits, where Pillow's own conversion would clip them."""
    from PIL import Image

    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I") and (image.mode != "I" or levels.max(initial=0.0) > 255):
        levels = levels / 257.0
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))
