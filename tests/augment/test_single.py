"""Plans of one named operation; and that each is within reach of a policy, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastscarce.augment import OPERATIONS, apply, draw, plan_of

# What a user asks for: by name, with a magnitude, and as a step of a policy that draws it.
ASKED = {
    "brightness": ("brightness", 1.4, {"jitter": {"brightness": 0.4}}),
    "contrast": ("contrast", 0.6, {"jitter": {"contrast": 0.4}}),
    "saturation": ("saturation", 1.6, {"jitter": {"saturation": 0.6}}),
    "hue": ("hue", 0.2, {"jitter": {"hue": 0.2}}),
    "rotation": ("rotate", 20.0, {"affine": {"rotate": 20.0}}),
    "flip": ("flip", 0.0, {"flip": {"probability": 1.0}}),
    "crop": ("crop", 0.7, {"resized_crop": {"scale": [0.3, 0.7]}}),
    "affine": (
        "affine", (0.9, 0.1, 2.0, -0.1, 0.9, -1.0), {"affine": {"scale": 0.2, "shear_y": 0.2}},
    ),
    "shear": ("shear_x", 0.25, {"affine": {"shear_x": 0.25}}),
    "translation": ("translate_y", 3.0, {"shift": {"part": 0.2}}),
    "cutmix": ("cutmix", 0.3, {"cutmix": {"alpha": 1.0}}),
    "mixup": ("mixup", 0.3, {"mixup": {"alpha": 0.5}}),
    "erase": ("erase", 0.2, {"erase": {"probability": 1.0}}),
    "invert": ("invert", 0.0, None),  # no policy of the field draws it
    **{
        name: (name, magnitude, {"randaugment": {"operations": 1, "magnitude": 15}})
        for name, magnitude in {
            "autocontrast": 0.0, "equalize": 0.0, "posterize": 3.0, "solarize": 90.0,
            "sharpness": 1.8, "shear_y": 0.25, "translate_x": 3.0,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED)
def test_plans_and_policies_reach_each_operation(asked: str) -> None:
    name, magnitude, step = ASKED[asked]
    generator = torch.Generator().manual_seed(0)
    images = (40 + 150 * torch.rand(64, 24, 24, 3, generator=generator)).byte()
    plan = plan_of(name, range(64), magnitude=magnitude, image_size=24)
    levels = images.permute(0, 3, 1, 2)
    assert (apply(plan, images, dtype=torch.uint8) != levels).flatten(1).any(dim=1).all()
    if step is None:
        return
    drawn = draw([step], range(64), view=0, seed=0, image_size=24)
    changed = (apply(drawn, images, dtype=torch.uint8) != levels).flatten(1).any(dim=1)
    if "randaugment" in step:
        changed = changed[drawn.table["drawn"][:, 0] == OPERATIONS.index(name)]
    assert changed.float().mean() > 0.8


def test_an_affine_map_is_what_its_numbers_say() -> None:
    images = torch.randint(0, 256, (2, 9, 13, 1)).byte()
    quarter = plan_of("affine", range(2), magnitude=(0, 1, 0, -1, 0, 0), image_size=(9, 13))
    got = apply(quarter, images, dtype=torch.uint8)[:, 0, :, 2:11]
    assert torch.equal(got, torch.rot90(images[:, :, 2:11, 0], -1, dims=(1, 2)))


@pytest.mark.parametrize(
    ("operation", "change", "message"),
    [
        ("blur", {}, "plan_of needs one of identity, .*, got 'blur'"),
        ("rotate", {"magnitude": 361}, "rotate by degrees from -360 to 360, got 361"),
        ("posterize", {"magnitude": -1}, "posterize by whole bits from 0 to 8, got -1"),
        ("hue", {"magnitude": np.nan}, "hue by a part of a turn from -0.5 to 0.5, got nan"),
        ("cutmix", {"magnitude": 1.5}, "cutmix by the partner's part of the area from 0 to 1"),
        ("rotate", {"magnitude": (1, 2)}, r"rotate by degrees from -360 to 360, got \(1, 2\)"),
        ("affine", {"magnitude": 1.0}, "affine by six numbers from -100000 to 100000, got 1.0"),
        ("affine", {"magnitude": (1, 0, 0, 0, 1)}, "affine by six numbers"),
        ("affine", {"magnitude": (1, 0, 0, 0, 1, np.inf)}, "affine by six numbers"),
        ("flip", {"sampling": "cubic"}, "sampling nearest or bilinear"),
        ("flip", {"fill": 256}, "fill from 0 to 255"),
        ("flip", {"fill": "black"}, "fill from 0 to 255, got 'nearest' and 'black'"),
        ("flip", {"image_size": 0}, "plan_of needs image_size"),
        ("flip", {"sample_ids": [0.5]}, "sample_ids as whole numbers that int64 holds"),
        ("flip", {"sample_ids": [[0]]}, r"sample_ids of shape \(rows,\), got \(1, 1\)"),
        ("rotate", {"magnitude": None}, "rotate by degrees from -360 to 360, got None"),
        ("rotate", {"magnitude": "5"}, "rotate by degrees from -360 to 360, got '5'"),
        ("affine", {"magnitude": ["a"] * 6}, "affine by six numbers"),
    ],
)
def test_refusals(operation: str, change: dict[str, object], message: str) -> None:
    arguments = {"sample_ids": [0], "image_size": 8, **change}
    with pytest.raises(ValueError, match=message) as caught:
        plan_of(operation, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
