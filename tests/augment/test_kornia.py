"""The two executors on the same plan, to what `fastscarce.augment.kornia` says of differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastscarce.augment import Plan, Policy, apply, describe, draw, get_policy, plan_of

ONE_LEVEL = {
    "identity": [0.0], "autocontrast": [0.0], "equalize": [0.0], "invert": [0.0], "flip": [0.0],
    "solarize": [30.0, 128.0], "posterize": [4.0, 7.0, 8.0], "brightness": [0.2, 0.7, 1.7],
    "contrast": [0.2, 0.7, 1.7], "sharpness": [0.2, 0.7, 1.9], "color": [0.2, 0.7],
    "hue": [-0.3, 0.1], "rotate": [-30.0, 17.0], "shear_x": [-0.3, 0.2], "shear_y": [0.11],
    "translate_x": [-3.0, 5.0], "translate_y": [4.0], "crop": [0.6, 0.83], "cutmix": [0.3],
    "mixup": [0.4], "erase": [0.2], "affine": [(0.8, 0.3, -2.5, -0.2, 1.1, 1.25)],
}  # fmt: skip


def pool(rows: int, channels: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(rows, channels, 4, 4, generator=generator) * 300 - 20
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return smooth.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def difference(plan: Plan, images: Tensor) -> Tensor:
    """In levels; normalised numbers are compared, so that nothing is rounded again."""
    got = apply(plan, images, mean=0.0, std=1 / 255)
    expected = apply(plan, images, mean=0.0, std=1 / 255, executor="kornia")
    assert got.shape == expected.shape
    return (got - expected).abs()


@pytest.mark.parametrize("operation", ONE_LEVEL)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 33), (3, 64)])
def test_one_operation_differs_by_a_level_at_most(operation: str, channels: int, side: int) -> None:
    images = pool(4, channels, side)
    for magnitude in ONE_LEVEL[operation]:
        for fill in (0, 77):
            plan = plan_of(
                operation, range(4), magnitude=magnitude, image_size=side, sampling="bilinear",
                fill=fill,
            )  # fmt: skip
            levels = 2 if operation == "color" else 1
            assert difference(plan, images).max() <= levels + 0.001


@pytest.mark.parametrize("fill", [0, 50, "reflect"])
@pytest.mark.parametrize("steps", [
    [{"affine": {"rotate": 30, "scale": 0.2, "shear_x": 0.3, "shear_y": 0.1, "translate": 0.2}}],
    ["resized_crop", "flip"],
    ["shift", "erase", "cutmix"],
    ["resized_crop", {"mixup": {"alpha": 0.4}}],
])  # fmt: skip
def test_geometry_and_mixing(steps: list[object], fill: int | str) -> None:
    for channels, side in ((1, 8), (3, 33), (3, 96)):
        policy = Policy(tuple(steps), fill=fill)  # type: ignore[arg-type]
        plan = draw(policy, range(32), view=0, seed=1, image_size=side)
        apart = difference(plan, pool(32, channels, side))
        assert apart.max() <= 1.001


@pytest.mark.parametrize("policy", ["standard", "strong+cutmix", "randaugment(2, 9)"])
def test_chains_differ_little(policy: str) -> None:
    chosen = get_policy(policy)
    plan = draw(chosen, range(64), view=0, seed=1, image_size=32)
    apart = difference(plan, pool(64, 3, 32))
    assert apart.mean() < 1.5
    # All but equalize after an operation, and edges that a nearest sample falls on either side of.
    assert (apart.amax(dim=(1, 2, 3)) <= 6).float().mean() > 0.7


def test_gradients_reach_the_pixels() -> None:
    images = pool(8, 3, 16).float().requires_grad_()
    plan = draw("strong+cutmix", range(8), view=0, seed=0, image_size=16)
    result = apply(plan, images, executor="kornia")
    expected = apply(plan, images.detach().byte(), executor="kornia")
    torch.testing.assert_close(result, expected, rtol=0, atol=2 / 127)
    (gradient,) = torch.autograd.grad(result.square().sum(), images)
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.2
    # Of a whole-pixel shift the gradient is the shifted one.
    plan = plan_of("translate_x", range(8), magnitude=2, image_size=16)
    result = apply(plan, images, executor="kornia", mean=0.0, std=1 / 255)
    (gradient,) = torch.autograd.grad(result.sum(), images)
    torch.testing.assert_close(gradient[:, :, :14], torch.ones(8, 16, 14, 3))
    assert not gradient[:, :, 14:].any()


def test_dtypes_layout_and_out() -> None:
    images = pool(4, 3, 16)
    plan = draw("weak", range(4), view=0, seed=0, image_size=16)
    last = apply(plan, images, executor="kornia", layout=torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty(4, 3, 16, 16, dtype=torch.bfloat16)
    got = apply(plan, images, executor="kornia", dtype=torch.bfloat16, out=out)
    assert got is out
    torch.testing.assert_close(got.float(), last, rtol=1e-2, atol=1e-2)
    raw = apply(plan, images, executor="kornia", dtype=torch.uint8)
    assert (raw.int() - apply(plan, images, dtype=torch.uint8).int()).abs().max() <= 1


@pytest.mark.parametrize("executor", ["native", "kornia"])
def test_refusals(executor: str) -> None:
    images = pool(2, 3, 8)
    plan = draw("weak", range(2), view=0, seed=0, image_size=8)
    for wrong, message in (
        (images.int(), "needs uint8"),
        (images[0], "needs uint8"),
        (images[:, :, :7], "images of the plan's size, 8x8, got 8x7"),
        (images[:1], "an image a row of the plan"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(plan, wrong, executor=executor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="an index from 0 to 1, got 0 to 2"):
        apply(plan, images, index=torch.tensor([0, 2]), executor=executor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mean, one number or 3"):
        apply(plan, images, mean=(0.5, 0.5), executor=executor)  # type: ignore[arg-type]
    changes: dict[str, tuple[object, str]] = {
        "mean": (float("nan"), "a finite mean"),
        "std": (0.0, "positive, finite std"),
        "dtype": (torch.float64, "dtype float32"),
        "layout": (torch.preserve_format, "channels_last"),
        "colour": ("slow", "exact or fast"),
        "index": ([0, 1], "index as a tensor, got list"),
        "out": (torch.empty(5, 2, 3, 8, 8), "needs out of"),
    }
    for name, (value, message) in changes.items():
        with pytest.raises(ValueError, match=message) as caught:
            apply(plan, images, executor=executor, **{name: value})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="needs one image or more for an index of 0 to 1"):
        apply(plan, images[:0], index=torch.tensor([0, 1]), executor=executor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int64 index"):
        apply(plan, images, index=torch.tensor([0, 1]).int(), executor=executor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images as a tensor, got ndarray; torch\.as_tensor"):
        apply(plan, images.numpy(), executor=executor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a Plan, such as draw returns, got ndarray"):
        apply(plan.table, images, executor=executor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="executor native or kornia, got 'dali'"):
        apply(plan, images, executor="dali")  # type: ignore[arg-type]


def test_mixed_labels_and_teachers_end_to_end(tmp_path: Path) -> None:
    """The losses of a mixed view are the mixtures that its pixels are."""
    from fastscarce.ops import kd_loss, topk

    images = pool(10, 3, 16)
    plan = draw("weak+cutmix", range(10), view=0, seed=0, image_size=16)
    torch.manual_seed(0)
    labels = torch.randint(0, 7, (10,))
    teacher = torch.randn(10, 7)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 7))
    logits = model(apply(plan, images))
    partner = np.arange(10) ^ 1
    lam = torch.from_numpy(plan.table["lam"].copy())
    target = plan.mixed_target(labels)
    assert torch.equal(target.b, labels[partner])
    share = lam[:, None].double()
    one_hot = torch.nn.functional.one_hot(labels, 7).double()
    dense = share * one_hot + (1 - share) * one_hot[partner]
    log_q = logits.double().log_softmax(1)
    torch.testing.assert_close(
        kd_loss(logits, None, target).double(), -(dense * log_q).sum(1).mean(), rtol=1e-5, atol=1e-6
    )
    p = teacher.double().softmax(1)
    mixture = share * p + (1 - share) * p[partner]
    loss = kd_loss(logits, plan.mixed_topk(topk(teacher, 7)), target, alpha=0.6)
    expected = 0.6 * -(mixture * log_q).sum(1).mean() - 0.4 * (dense * log_q).sum(1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert model[1].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"int64 labels of shape \(10,\)"):
        plan.mixed_target(labels[:9])
    with pytest.raises(ValueError, match="a teacher of 10 rows, got 9"):
        plan.mixed_topk(topk(teacher[:9], 3))


def test_memory_that_is_written_to() -> None:
    """Not that of the images, which later rows read; and autograd learns of it."""
    images = pool(6, 3, 8)
    plan = draw("eval+mixup", range(6), view=0, seed=0, image_size=8, partners=[3, 4, 5, 0, 1, 2])
    settings: dict[str, Any] = {"dtype": torch.uint8, "layout": torch.channels_last}
    with pytest.raises(ValueError, match="an out of other memory than the images'"):
        apply(plan, images, out=images.permute(0, 3, 1, 2), **settings)
    with pytest.raises(ValueError, match="an out that requires no gradient"):
        apply(plan, images, out=torch.empty(6, 3, 8, 8, requires_grad=True))
    out = apply(plan, images)
    weights = torch.ones(6, 3, 8, 8, requires_grad=True)
    value = (weights * out).sum()
    apply(plan, images, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_kornia_refuses_a_single_row_of_pixels() -> None:
    plan = draw("weak", range(2), view=0, seed=0, image_size=(1, 7))
    with pytest.raises(ValueError, match="at least 2x2 pixels for executor kornia"):
        apply(plan, torch.zeros(2, 1, 7, 3, dtype=torch.uint8), executor="kornia")
    assert describe(plan_of("affine", [0], magnitude=[0.0] * 6, image_size=8)) == [
        "one point or line of it"
    ]
    for text in ("- flip: {probability: !!bool 'x'}", "2001-99-99", "[" * 5000):
        with pytest.raises(ValueError, match="A policy needs"):
            Policy.from_yaml(text)
