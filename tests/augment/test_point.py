"""Each operation against torchvision's on uint8, to one grey level (it truncates, we round)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as peer

from fastscarce.augment.point import POINT_OPERATIONS
from fastscarce.augment.table import OPERATIONS

CASES: list[tuple[str, float, Callable[[Tensor], Tensor], int]] = [
    *[("brightness", f, lambda x, f=f: peer.adjust_brightness(x, f), 1) for f in (0.2, 1.7)],
    *[("contrast", f, lambda x, f=f: peer.adjust_contrast(x, f), 1) for f in (0.2, 1.7)],
    *[("color", f, lambda x, f=f: peer.adjust_saturation(x, f), 2) for f in (0.2, 1.7)],
    *[("sharpness", f, lambda x, f=f: peer.adjust_sharpness(x, f), 1) for f in (0.2, 1.9)],
    *[("solarize", t, lambda x, t=t: peer.solarize(x, t), 0) for t in (30.0, 128.0)],
    *[("posterize", b, lambda x, b=b: peer.posterize(x, int(b)), 0) for b in (4.0, 7.0, 8.0)],
    ("autocontrast", 0.0, peer.autocontrast, 1),
    ("equalize", 0.0, peer.equalize, 0),
    ("invert", 0.0, peer.invert, 0),
    *[("hue", t, lambda x, t=t: peer.adjust_hue(x, t), 2) for t in (-0.3, 0.1)],
]


@pytest.mark.parametrize("side", [8, 28, 33])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "argument", "reference", "levels"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_against_torchvision(
    name: str,
    argument: float,
    reference: Callable[[Tensor], Tensor],
    levels: int,
    channels: int,
    side: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([40, 120, 256, 1]).view(4, 1, 1, 1)  # the last is of one level
    noise = torch.rand(4, channels, side, side, generator=generator)
    images = (noise * spread).to(torch.uint8)
    before = images.float()
    got = POINT_OPERATIONS[name](before, torch.full((4,), argument))
    assert torch.equal(before, images.float())  # the input is not written to
    assert torch.equal(got, got.round().clamp(0, 255))
    expected = torch.stack([reference(image) for image in images]).float()
    assert (got - expected).abs().max() <= levels


def test_every_operation_has_its_definition() -> None:
    geometry = {"identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
    assert set(POINT_OPERATIONS) | geometry == set(OPERATIONS)
