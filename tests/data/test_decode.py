"""What is taken, what is refused and why, whatever the bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastscarce.data import decode_crop, decode_whole, inspect, mended
from fastscarce.errors import DataError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)
SMOOTH = np.add.outer(np.arange(24) * 3, np.arange(40) * 2).astype(np.uint8)
COLOUR = np.stack([SMOOTH, 255 - SMOOTH, SMOOTH // 2], axis=-1)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(pixels: np.ndarray = COLOUR, **options: Any) -> bytes:
    return save(Image.fromarray(pixels), "JPEG", quality=95, **options)


def png_of_size(width: int, height: int) -> bytes:
    """A header that asks for a lot, and hardly any data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    content = bytearray(jpeg())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty"),
    "random": (lambda: RNG.bytes(5000), "no image of a known format"),
    "text": (lambda: b"<html>404</html>", "no image of a known format"),
    "cut JPEG": (lambda: jpeg(NOISE)[:-400], "OSError: image file is truncated"),
    "cut progressive JPEG": (lambda: jpeg(NOISE, progressive=True)[:-400], "truncated"),
    "a little less of a JPEG": (lambda: jpeg(NOISE)[:-30], "OSError: image file is truncated"),
    "header of a JPEG": (lambda: jpeg()[:200], "Error"),
    "cut PNG": (lambda: save(Image.fromarray(NOISE), "PNG")[:-400], "Error"),
    "broken PNG": (lambda: save(Image.fromarray(NOISE), "PNG").replace(b"IDAT", b"IDAU"), "format"),
    "cut GIF": (lambda: save(Image.fromarray(NOISE), "GIF")[:-400], "truncated"),
    "cut WebP": (lambda: save(Image.fromarray(NOISE), "WEBP")[:-400], "Error"),
    "cut TIFF": (lambda: save(Image.fromarray(NOISE), "TIFF")[:600], "Error"),
    "PNG bomb": (lambda: png_of_size(30000, 30000), "asks for more than 89,478,485 pixels"),
    "JPEG bomb": (lambda: jpeg_of_size(30000, 30000), "asks for more than 89,478,485 pixels"),
    "no size": (lambda: png_of_size(0, 4), "Error|known format"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, reason = REFUSED[case]
    content = make()
    with pytest.raises(DataError, match=reason) as caught:
        decode_whole(content, grey=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=reason):
        decode_crop(content, image_size=(8, 8), channels=1)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    for content in (png_of_size(30000, 30000), png_of_size(9500, 9500), jpeg_of_size(30000, 30000)):
        with pytest.raises(DataError, match="asks for more than 89,478,485 pixels"):
            inspect(content)
    with pytest.raises(DataError, match="more than 900 pixels: 40x24"):
        inspect(jpeg(), largest=900)
    assert inspect(jpeg(), largest=960).width == 40


RED = Image.fromarray(np.broadcast_to(np.uint8([200, 30, 40]), (24, 40, 3)))


def palette(**options: Any) -> bytes:
    return save(RED.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", **options)


TAKEN: dict[str, Callable[[], bytes]] = {
    "RGB": lambda: save(RED, "PNG"),
    "JPEG": lambda: save(RED, "JPEG", quality=95),
    "progressive": lambda: save(RED, "JPEG", quality=95, progressive=True),
    "CMYK": lambda: save(RED.convert("CMYK"), "JPEG", quality=95),
    "alpha": lambda: save(RED.convert("RGBA"), "PNG"),
    "clear alpha": lambda: save(
        Image.merge("RGBA", (*RED.split(), Image.new("L", (40, 24)))), "PNG"
    ),
    "palette": palette,
    "palette with a clear colour": lambda: palette(transparency=0),
    "palette with alpha": lambda: palette(transparency=bytes(range(0, 250, 50))),
    "animated GIF": lambda: save(
        RED, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 24)), RED]
    ),
    "animated PNG": lambda: save(
        RED, "PNG", save_all=True, append_images=[Image.new("RGB", (40, 24))]
    ),
    "animated WebP": lambda: save(
        RED, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (40, 24))]
    ),
    "two pictures in a JPEG": lambda: save(RED, "MPO", save_all=True, append_images=[RED]),
    "TIFF": lambda: save(RED, "TIFF"),
    "BMP": lambda: save(RED, "BMP"),
    "more after the end": lambda: save(RED, "JPEG", quality=95) + b"\0" * 100,
    "no last marker": lambda: save(RED, "JPEG", quality=95)[:-2],
    "half a last marker": lambda: save(RED, "JPEG", quality=95)[:-1],
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_taken(case: str) -> None:
    content = TAKEN[case]()
    image = decode_whole(content, grey=False)
    assert image.shape == (24, 40, 3)
    assert np.abs(image.astype(int) - [200, 30, 40]).max() <= 6
    header = inspect(content)
    assert (header.height, header.width, header.grey) == (24, 40, False)
    alike = {"RGB", "JPEG", "progressive", "BMP", "more after the end"}
    assert header.plain == (case in alike)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (save(Image.fromarray(SMOOTH), "PNG"), SMOOTH),
        (save(Image.fromarray(SMOOTH).convert("LA"), "PNG"), SMOOTH),
        (save(Image.fromarray(SMOOTH.astype(np.uint16) * 257), "PNG"), SMOOTH),
        (save(Image.fromarray(SMOOTH > 90), "PNG"), (SMOOTH > 90) * 255),
        (save(Image.fromarray(SMOOTH.astype(np.float32)), "TIFF"), SMOOTH),
    ],
)
def test_grey(content: bytes, expected: np.ndarray) -> None:
    assert inspect(content).grey
    assert np.array_equal(decode_whole(content, grey=True)[..., 0], expected)
    colour = decode_whole(content, grey=False)
    assert np.array_equal(colour, np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "late PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int, kind: str) -> None:
    turned = [
        lambda pixels: pixels,
        np.fliplr,
        lambda pixels: np.rot90(pixels, 2),
        np.flipud,
        lambda pixels: pixels.transpose(1, 0, 2),
        lambda pixels: np.rot90(pixels, 3),
        lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
        np.rot90,
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = save(Image.fromarray(COLOUR), kind.split()[-1], exif=exif)
    if kind == "late PNG":  # its block stands behind the pixels
        at = content.index(b"eXIf") - 4
        block = content[at : at + 12 + int.from_bytes(content[at : at + 4], "big")]
        content = content.replace(block, b"").replace(content[-12:], block + content[-12:])
    expected = turned[orientation - 1](COLOUR)
    header = inspect(content)
    assert header.orientation == (1 if kind == "TIFF" else orientation)
    assert (header.height, header.width) == expected.shape[:2]
    assert np.array_equal(decode_whole(content, grey=False), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_says_nothing_of_the_pixels() -> None:
    content = jpeg(exif=b"Exif\0\0" + b"II*\0" + RNG.bytes(60))
    assert inspect(content).orientation == 1
    assert decode_whole(content, grey=False).shape == (24, 40, 3)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_last_marker_is_whole(progressive: bool) -> None:
    content = jpeg(NOISE, progressive=progressive)
    expected = decode_whole(content, grey=False)
    for cut in (content[:-2], content[:-1]):
        assert mended(cut) == content
        assert np.array_equal(decode_whole(cut, grey=False), expected)
    assert mended(content) is content
    assert mended(content[:-20]) == content[:-20]
    assert mended(b"\xff\xd8\xff") == b"\xff\xd8\xff"


def test_a_png_with_damaged_pixels_is_broken() -> None:
    """Pillow looks for EXIF behind the pixels: what fails there is no broken EXIF block."""
    content = save(Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)), "PNG")
    start = content.index(b"IDAT") + 4
    refused = 0
    for place in range(start + 40, len(content) - 20, 97):
        broken = bytearray(content)
        broken[place] ^= 4
        with pytest.raises(DataError, match=r"broken|CRC|error|truncated"):
            decode_whole(bytes(broken), grey=False)
        inspect(bytes(broken))  # its header is sound
        refused += 1
    assert refused > 30


def test_resized_to_fit_and_cropped_in_the_middle() -> None:
    image = decode_crop(save(Image.fromarray(COLOUR), "PNG"), image_size=(24, 24), channels=3)
    assert np.array_equal(image, COLOUR[:, 8:32])
    assert decode_crop(jpeg(), image_size=(10, 14), channels=1).shape == (10, 14, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_damaged_bytes_end_in_an_image_or_a_reason(kind: str) -> None:
    content = save(Image.fromarray(COLOUR), kind)
    draw = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(content)
        for place in draw.integers(0, len(broken), draw.integers(1, 9)):
            broken[place] = draw.integers(0, 256)
        cut = bytes(broken[: draw.integers(1, len(broken) + 1)])
        try:
            inspect(cut)
            image = decode_crop(cut, image_size=(8, 8), channels=3)
        except DataError:
            continue
        assert image.shape == (8, 8, 3)
