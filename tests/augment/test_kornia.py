from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastscarce.augment import PLAN, POLICIES, carry_out, views


def pool(rows: int, channels: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(rows, channels, 4, 4, generator=generator) * 300 - 20
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return smooth.clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 9), (3, 32)])
def test_a_view_does_not_depend_on_its_batch(policy: str, channels: int, side: int) -> None:
    images = pool(64, channels, side)
    ids = np.arange(64) * 13 - 99
    number = np.arange(64) % 5
    settings = {"policy": policy, "seed": 11, "flip": True}
    whole = views(images, ids, view=number, **settings)
    assert whole.dtype == torch.float32
    assert whole.shape == images.shape
    assert whole.isfinite().all()
    assert whole.abs().max() <= 1.0
    order = np.random.default_rng(1).permutation(64)
    assert torch.equal(
        whole[order], views(images[order], ids[order], view=number[order], **settings)
    )
    for rows in (1, 8):
        for first in range(0, 64, rows):
            part = slice(first, first + rows)
            alone = views(images[part], ids[part], view=number[part], **settings)
            assert torch.equal(whole[part], alone)


def test_channels_last_and_tensors_give_the_same() -> None:
    images = pool(16, 3, 16)
    settings = {"policy": "strong", "seed": 0, "flip": True}
    expected = views(images, np.arange(16), view=2, **settings)
    last = images.to(memory_format=torch.channels_last)
    got = views(last, torch.arange(16), view=torch.full((16,), 2), **settings)
    assert torch.equal(expected, got)


def test_large_photographs() -> None:
    images = pool(3, 3, 224)
    whole = views(images, [1, 2, 3], policy="strong", view=0, seed=0, flip=True)
    assert torch.equal(
        whole[1:2], views(images[1:2], [2], policy="strong", view=0, seed=0, flip=True)
    )


def test_eval_normalises_only() -> None:
    images = pool(4, 3, 12)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    got = views(images, range(4), policy="eval", view=0, seed=0, flip=True, mean=mean, std=std)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1).double()) / torch.tensor(
        std
    ).view(3, 1, 1).double()
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-6)


def test_whole_pixel_shifts_are_exact() -> None:
    images = pool(2, 1, 8)
    plan = np.zeros(2, dtype=PLAN)
    plan["matrix"] = [[[1, 0, 1], [0, 1, 0]], [[-1, 0, 7], [0, 1, 0]]]
    got = carry_out(images, plan, mean=0.0, std=1 / 255)
    assert torch.equal(got[0, 0, :, :7].round().byte(), images[0, 0, :, 1:])
    assert got[0, 0, :, 7].abs().max() == 0
    assert torch.equal(got[1].round().byte(), images[1].flip(-1))


@pytest.mark.parametrize("degrees", [-30.0, 17.0])
def test_warp_against_torchvision(degrees: float) -> None:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import affine

    images = pool(1, 1, 21)
    plan = np.zeros(1, dtype=PLAN)
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    plan["matrix"] = [[cos, sin, 10 - 10 * cos - 10 * sin], [-sin, cos, 10 + 10 * sin - 10 * cos]]
    expected = affine(
        images.float(), degrees, [0, 0], 1.0, [0.0, 0.0], InterpolationMode.BILINEAR, fill=0
    )
    got = carry_out(images, plan, mean=0.0, std=1 / 255)
    assert (got - expected)[..., 4:17, 4:17].abs().max() <= 0.51  # levels are whole


@pytest.mark.parametrize(
    ("images", "ids", "view"),
    [
        (torch.zeros(2, 1, 8, 8), [0, 1], 0),
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), [0, 1], 0),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), [0, 1], 0),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0], 0),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 1], [0, 1, 2]),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 1], -1),
    ],
)
def test_refusals(images: Tensor, ids: list[int], view: int | list[int]) -> None:
    with pytest.raises(ValueError, match=r"need|view"):
        views(images, ids, policy="weak", view=view, seed=0, flip=False)


def test_refuses_a_plan_or_mean_of_another_size() -> None:
    images = pool(2, 3, 8)
    with pytest.raises(ValueError, match="row an image"):
        carry_out(images, np.zeros(3, dtype=PLAN))
    with pytest.raises(ValueError, match="mean needs one number or 3"):
        views(images, [0, 1], policy="eval", view=0, seed=0, flip=False, mean=(0.5, 0.5))
