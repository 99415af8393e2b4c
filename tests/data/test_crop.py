from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastscarce.augment import Policy, ResizedCrop, apply, draw, get_policy
from fastscarce.data import decode_whole
from fastscarce.data.crop import (
    as_channels,
    crop_boxes,
    decode_crop,
    pixels_of,
    resize_crop,
    without_crop,
)
from fastscarce.errors import DataError

IDS = np.arange(200) * 17


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def photograph(width: int = 100, height: int = 80) -> Image.Image:
    small = np.random.Generator(np.random.Philox(3)).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_crop_and_rest_are_the_whole_view() -> None:
    policy = get_policy("standard+cutmix")
    options = {"view": 5, "seed": 1, "image_size": (48, 32)}
    whole = draw(policy, IDS, **options).table
    rest = draw(without_crop(policy), IDS, **options).table
    boxes = crop_boxes(policy, IDS, **options)
    assert boxes is not None
    for name in whole.dtype.names or ():
        if name != "matrix":
            assert np.array_equal(whole[name], rest[name]), name
    left, top, right, bottom = boxes.astype(np.float64).T
    crop = np.zeros((len(IDS), 3, 3))
    crop[:, 0, 0], crop[:, 1, 1], crop[:, 2, 2] = right - left, bottom - top, 1.0
    crop[:, 0, 2], crop[:, 1, 2] = ((left + right) / 2 - 0.5) * 32, ((top + bottom) / 2 - 0.5) * 48
    last = np.broadcast_to([0.0, 0.0, 1.0], (len(IDS), 1, 3))
    matrix = np.concatenate((rest["matrix"].reshape(-1, 2, 3).astype(np.float64), last), axis=1)
    composed = (crop @ matrix)[:, :2].reshape(-1, 6)
    np.testing.assert_allclose(composed, whole["matrix"].reshape(-1, 6), atol=2e-5)


def test_cropped_while_decoded_shows_what_the_kernel_would() -> None:
    policy = Policy((ResizedCrop(scale=(0.3, 0.6)),))
    image = photograph(64, 64)
    pixels = torch.from_numpy(np.array(image))[None]
    options = {"view": 0, "seed": 0, "image_size": (64, 64)}
    for number in range(5):
        boxes = crop_boxes(policy, [number], **options)
        assert boxes is not None
        near = decode_crop(encoded(image, "PNG"), boxes[0], image_size=(64, 64), channels=3)
        plan = draw(policy, [number], **options)
        far = apply(plan, pixels, mean=0.0, std=1 / 255, layout=torch.channels_last)
        difference = (near.permute(2, 0, 1).float() - far[0]).abs()
        assert float(difference.mean()) < 6.0
        assert float((pixels[0].permute(2, 0, 1).float() - far[0]).abs().mean()) > 15.0


def test_a_policy_without_a_crop_is_left_alone() -> None:
    policy = get_policy("strong")
    assert without_crop(policy) is policy
    assert crop_boxes(policy, IDS, view=0, seed=0, image_size=(8, 8)) is None


@pytest.mark.parametrize(
    ("box", "shape", "size", "pixels"),
    [
        ((0, 0, 1, 1), (45, 60), (32, 32), (8, 0, 53, 45)),
        ((0, 0, 1, 1), (60, 45), (32, 32), (0, 8, 45, 53)),
        ((0, 0, 1, 1), (60, 45), (40, 30), (0, 0, 45, 60)),
        ((0.5, 0.5, 1, 1), (40, 40), (8, 8), (20, 20, 40, 40)),
        ((0.5, 0.5, 0.5, 0.5), (1, 1), (8, 8), (0, 0, 1, 1)),
        ((1, 1, 1, 1), (4, 4), (8, 8), (3, 3, 4, 4)),
    ],
)
def test_boxes_in_pixels(
    box: tuple[float, ...],
    shape: tuple[int, int],
    size: tuple[int, int],
    pixels: tuple[int, ...],
) -> None:
    assert pixels_of(box, shape=shape, image_size=size) == pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "turned", "grey", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decodes_as_pillow_does(kind: str, channels: int) -> None:
    image, options = photograph(), {"quality": 95}
    if kind == "grey":
        image = image.convert("L")
    if kind == "CMYK":
        image = image.convert("CMYK")
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    content = encoded(image, "PNG" if kind == "PNG" else "JPEG", **options)
    with Image.open(io.BytesIO(content)) as opened:
        shown = opened.transpose(Image.Transpose.ROTATE_270) if kind == "turned" else opened
        plain = shown.convert("L" if channels == 1 else "RGB")
    width, height = plain.size
    side = min(width, height)
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    expected = plain.resize(
        (24, 24), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
    )
    found = decode_crop(content, image_size=(24, 24), channels=channels)
    assert found.shape == (24, 24, channels)
    reference = np.asarray(expected, dtype=np.float64).reshape(24, 24, channels)
    difference = np.abs(found.numpy() - reference)
    assert difference.mean() < 1.5
    assert difference.max() <= 8


def test_a_large_jpeg_is_scaled_while_it_is_decoded() -> None:
    content = encoded(photograph(640, 512), quality=95)
    whole = decode_whole(content, grey=False)
    for box in ((0, 0, 1, 1), (0.1, 0.2, 0.8, 0.6)):
        found = decode_crop(content, box, image_size=(32, 32), channels=3)
        expected = resize_crop(whole, box, image_size=(32, 32))
        difference = (found.float() - expected.float()).abs()
        assert float(difference.mean()) < 2.0
        assert float(difference.max()) < 30


def test_the_reason_is_pillows() -> None:
    with pytest.raises(DataError, match=r"(?i)truncated"):
        decode_crop(encoded(photograph())[:300], image_size=(8, 8), channels=3)


def test_channels() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert as_channels(grey, 3).shape == (2, 3, 3)
    assert as_channels(grey, 1) is grey
    with pytest.raises(DataError, match="3 channels, not 1"):
        as_channels(np.zeros((2, 3, 3), dtype=np.uint8), 1)


def test_broken_jpegs_are_refused_as_they_are_whole() -> None:
    contents = [encoded(photograph(60, 44), quality=80, subsampling=kind) for kind in (0, 1, 2)]
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        content = bytearray(contents[int(draw.integers(3))])
        for place in draw.integers(len(content), size=2).tolist():
            content[place] = int(draw.choice([0, 255, int(draw.integers(256))]))
        del content[int(draw.integers(len(content) // 2, 4 * len(content))) :]
        for channels in (1, 3):
            reasons = []
            for decode in (
                lambda c, n: decode_crop(c, (0.2, 0.1, 0.9, 0.6), image_size=(24, 24), channels=n),
                lambda c, n: decode_whole(c, grey=n == 1),
            ):
                try:
                    decode(bytes(content), channels)
                    reasons.append("")
                except DataError as error:
                    reasons.append(str(error))
            assert reasons[0] == reasons[1]
            refused += bool(reasons[0])
    assert 200 < refused < 1000


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("image_size", [(8, 8), (16, 20), (40, 31), (64, 64)])
def test_a_jpeg_that_is_scaled_as_it_is_decoded(
    image_size: tuple[int, int], subsampling: int
) -> None:
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(0)
    scaled = 0
    for photo in load_sample_images().images:
        content = encoded(Image.fromarray(photo[:401, :613]), quality=90, subsampling=subsampling)
        whole = decode_whole(content, grey=False)
        for _ in range(4):
            left, top = draw.uniform(0, 0.3, 2)
            box = (left, top, left + draw.uniform(0.5, 0.7), top + draw.uniform(0.5, 0.7))
            got = decode_crop(content, box, image_size=image_size, channels=3)
            want = resize_crop(whole, box, image_size=image_size)
            difference = (got.int() - want.int()).abs().float()
            # Most at the edges of a box, where pixels lie across; of 8 x 8 nearly half are edges.
            assert float(difference.mean()) < (3.0 if image_size == (8, 8) else 1.2)
            assert float(difference.max()) <= 20
            scaled += bool(difference.any())
    assert (scaled > 0) == (max(image_size) < 60)  # a sixth of the boxes, and more
