"""The fused kernel against torchvision's uint8 functional operations, bit for bit.

Sizes: smaller than a vector, not a multiple of one, Fashion-MNIST's, a photograph's; 1 and 3
channels. All on each instruction set that this machine runs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as peer

from fastscarce.augment import OPERATIONS, PLAN, Plan, apply, draw, get_policy, plan_of
from fastscarce.augment.table import new_table
from fastscarce.data import load
from fastscarce.ops import kd_loss
from fastscarce.ops.augment import augment

FASHION = Path("/usr/share/datasets/fashion-mnist")


@functools.cache
def photographs(height: int, width: int) -> Tensor:
    """Both of scikit-learn's photographs, the middle of each, uint8 ``(2, height, width, 3)``."""
    from sklearn.datasets import load_sample_images

    crops = []
    for image in load_sample_images().images:
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        crops.append(image[top : top + height, left : left + width])
    return torch.from_numpy(np.stack(crops))


@functools.cache
def fashion() -> Tensor:
    """uint8 ``(8, 28, 28, 1)``."""
    return torch.from_numpy(load(f"idx:{FASHION}").images[:8].copy())


def sets() -> list[Callable[[], Tensor]]:
    found: list[Callable[[], Tensor]] = [
        functools.partial(photographs, 224, 224),
        functools.partial(photographs, 37, 53),
        functools.partial(photographs, 8, 8),
        lambda: photographs(64, 41)[..., 1:2].contiguous(),
    ]
    if FASHION.is_dir():
        found.append(fashion)
    return found


def levels(plan: Plan, images: Tensor) -> Tensor:
    return apply(plan, images, dtype=torch.uint8)


def by_peer(operation: str, magnitude: float, image: Tensor) -> Tensor:
    """torchvision's result for one image, ``(channels, height, width)``."""
    m = magnitude
    affine = functools.partial(peer.affine, image, 0.0, scale=1.0)
    calls: dict[str, Callable[[], Tensor]] = {
        "identity": lambda: image,
        "autocontrast": lambda: peer.autocontrast(image),
        "equalize": lambda: peer.equalize(image),
        "rotate": lambda: peer.rotate(image, m),
        "solarize": lambda: peer.solarize(image, m),
        "color": lambda: peer.adjust_saturation(image, m),
        "posterize": lambda: peer.posterize(image, int(m)),
        "contrast": lambda: peer.adjust_contrast(image, m),
        "brightness": lambda: peer.adjust_brightness(image, m),
        "sharpness": lambda: peer.adjust_sharpness(image, m),
        "shear_x": lambda: affine(
            translate=[0, 0], shear=[math.degrees(math.atan(m)), 0.0], center=[0, 0]
        ),
        "shear_y": lambda: affine(
            translate=[0, 0], shear=[0.0, math.degrees(math.atan(m))], center=[0, 0]
        ),
        "translate_x": lambda: affine(translate=[int(m), 0], shear=[0.0, 0.0]),
        "translate_y": lambda: affine(translate=[0, int(m)], shear=[0.0, 0.0]),
        "invert": lambda: peer.invert(image),
        "hue": lambda: peer.adjust_hue(image, m),
    }
    return calls[operation]()


FACTORS = [0.0, *(1.0 + s * 0.9 * k / 30 for k in range(0, 31, 2) for s in (-1, 1)), 2.7]
MAGNITUDES: dict[str, list[float]] = {
    **{name: [0.0] for name in ("identity", "autocontrast", "equalize", "invert")},
    **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), FACTORS),
    "rotate": [s * k for k in range(1, 31, 2) for s in (-1, 1)] + [45.5, -135.0, 90.0, 180.0],
    "solarize": [255.0 * k / 30 for k in range(31)],
    "posterize": [float(bits) for bits in range(9)],
    "shear_x": [s * 0.01 * k for k in range(1, 31, 2) for s in (-1, 1)] + [0.2, -0.2, 0.99],
    "shear_y": [s * 0.01 * k for k in range(1, 31, 2) for s in (-1, 1)] + [0.2, -0.2, 0.99],
    "translate_x": [-40.0, -9.0, -1.0, 1.0, 3.7, 14.0, 300.0],
    "translate_y": [-40.0, -9.0, -1.0, 1.0, 3.7, 14.0, 300.0],
    "hue": [-0.5, -0.31, -0.1, -0.02, 0.02, 0.1, 0.25, 0.44, 0.5],
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_is_torchvisions(isa: str, operation: str) -> None:
    for images in (make() for make in sets()):
        rows = range(len(images))
        size = tuple(images.shape[1:3])
        for magnitude in MAGNITUDES[operation]:
            plan = plan_of(operation, rows, magnitude=magnitude, image_size=size)
            expected = [by_peer(operation, magnitude, x.permute(2, 0, 1)) for x in images]
            got = levels(plan, images)
            assert torch.equal(got, torch.stack(expected)), (tuple(images.shape), magnitude)


# The seven that are one table of levels, once the image's statistics are known.
TABLES = [
    ("autocontrast", 0.0), ("equalize", 0.0), ("solarize", 110.0), ("posterize", 5.0),
    ("contrast", 1.7), ("brightness", 0.6), ("invert", 0.0),
]  # fmt: skip
REST = [("color", 0.3), ("sharpness", 1.8), ("hue", 0.2), ("rotate", 17.0), ("shear_x", -0.2)]


def chain(pairs: list[tuple[str, float]], images: Tensor) -> Plan:
    """A plan of several operations, one warp among them at most."""
    table = new_table(len(images))
    size = tuple(images.shape[1:3])
    for slot, (operation, magnitude) in enumerate(pairs):
        one = plan_of(operation, [0], magnitude=magnitude, image_size=size).table
        for field in ("operation", "argument", "rest"):
            table[field][:, slot] = one[field][:, 0]
        if (one["matrix"] != np.eye(2, 3)).any():
            table["matrix"] = one["matrix"]
            table["warp_at"] = slot
    return Plan(table, size)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *itertools.product(TABLES, TABLES),
        *itertools.product(REST, TABLES),
        *itertools.product(TABLES, REST),
        *itertools.permutations(REST[:4], 2),
    ],
    ids=lambda pair: pair[0],
)
def test_pairs_are_torchvisions(
    isa: str, first: tuple[str, float], second: tuple[str, float]
) -> None:
    for images in (make() for make in sets()):
        got = levels(chain([first, second], images), images)
        for row, image in enumerate(images):
            expected = by_peer(*second, by_peer(*first, image.permute(2, 0, 1)))
            assert torch.equal(got[row], expected), tuple(images.shape)


def test_four_in_a_row(isa: str) -> None:
    images = photographs(37, 53)
    chosen = [("equalize", 0.0), ("rotate", -12.0), ("contrast", 0.4), ("autocontrast", 0.0)]
    got = levels(chain(chosen, images), images)
    for row, image in enumerate(images):
        expected = image.permute(2, 0, 1)
        for operation in chosen:
            expected = by_peer(*operation, expected)
        assert torch.equal(got[row], expected)


@pytest.mark.parametrize("operation", ["autocontrast", "equalize", "contrast"])
def test_images_of_one_level_and_noise(isa: str, operation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([40, 120, 256, 1]).view(4, 1, 1, 1)
    for channels in (1, 3):
        images = (torch.rand(4, 33, 30, channels, generator=generator) * spread).byte()
        plan = plan_of(operation, range(4), magnitude=1.6, image_size=(33, 30))
        expected = [by_peer(operation, 1.6, x.permute(2, 0, 1)) for x in images]
        assert torch.equal(levels(plan, images), torch.stack(expected))


@pytest.mark.parametrize("angle", [3.0, -17.0, 45.0])
@pytest.mark.parametrize("fill", [0, 130])
def test_bilinear_is_torchvisions_to_a_level(isa: str, angle: float, fill: int) -> None:
    images = photographs(96, 120)
    plan = plan_of(
        "rotate", range(2), magnitude=angle, image_size=(96, 120), sampling="bilinear", fill=fill
    )
    # Where some taps are outside torchvision weighs the inside ones twice if it is given a fill.
    rotated = functools.partial(peer.rotate, angle=angle, interpolation=InterpolationMode.BILINEAR)
    expected = rotated(images.permute(0, 3, 1, 2))
    inside = rotated(torch.ones(1, 1, 96, 120)) > 0.9999
    difference = (levels(plan, images).int() - expected.int()).abs()
    if fill:
        difference = difference * inside
        assert (levels(plan, images) * ~inside).amax() > 100
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtypes_layouts_and_normalisation(isa: str, layout: torch.memory_format) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for images in (photographs(37, 53), photographs(224, 224), photographs(8, 8)):
        size = tuple(images.shape[1:3])
        index = torch.arange(16) % 2
        plan = draw("strong+cutmix", range(16), view=0, seed=0, image_size=size)
        raw = apply(plan, images, index=index, dtype=torch.uint8, layout=layout)
        assert raw.is_contiguous(memory_format=layout)
        shift, scale = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (mean, std))
        wide = (raw.double() / 255 - shift) / scale
        for dtype, close in ((torch.float32, 2e-6), (torch.bfloat16, 9e-3), (torch.float16, 2e-3)):
            got = apply(plan, images, index=index, mean=mean, std=std, dtype=dtype, layout=layout)
            assert got.dtype == dtype
            assert got.is_contiguous(memory_format=layout)
            torch.testing.assert_close(got.double(), wide, rtol=close, atol=close)
            out = torch.empty_like(got).fill_(7)
            back = apply(
                plan, images, index=index, mean=mean, std=std, dtype=dtype, layout=layout, out=out
            )
            assert back is out
            assert torch.equal(out, got)


def test_large_results_go_past_the_caches_unchanged(isa: str) -> None:
    images = photographs(224, 224)
    plan = draw("strong", range(16), view=0, seed=0, image_size=224)
    index = torch.arange(16) % 2
    whole = apply(plan, images, index=index)  # 9.6 MB
    alone = plan.table[5:6].copy()
    alone["partner"] = 0
    assert torch.equal(whole[5:6], apply(Plan(alone, (224, 224)), images[1:2]))


def one(**fields: object) -> Plan:
    table = new_table(2)
    for name, value in fields.items():
        table[name] = value
    return Plan(table, (8, 8))


def test_the_border_is_mirrored(isa: str) -> None:
    images = photographs(8, 8)
    # A shift by 20 pixels of 8: mirrored more than once.
    for shift in (-20.0, -3.0, 1.0, 9.0, 20.0):
        plan = one(matrix=[[1, 0, shift], [0, 1, 0]], border=1)
        places = np.pad(np.arange(8), 32, mode="reflect")[32 + int(shift) :][:8]
        expected = images[:, :, places].permute(0, 3, 1, 2)
        assert torch.equal(levels(plan, images), expected)
        plan.table["sampling"] = 1
        assert torch.equal(levels(plan, images), expected)


def test_erasing_and_cutmix_boxes(isa: str) -> None:
    images = photographs(8, 8)
    got = levels(one(erase=[1, 2, 4, 7], erase_fill=[9, 8, 7, 0]), images)
    expected = images.permute(0, 3, 1, 2).clone()
    expected[:, :, 1:4, 2:7] = torch.tensor([9, 8, 7], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.equal(got, expected)
    got = levels(one(mix=1, partner=[1, 0], box=[0, 3, 5, 8], lam=1 - 25 / 64), images)
    expected = images.permute(0, 3, 1, 2).clone()
    expected[:, :, 0:5, 3:8] = images.permute(0, 3, 1, 2).flip(0)[:, :, 0:5, 3:8]
    assert torch.equal(got, expected)
    both = levels(one(mix=2, partner=[1, 0], lam=0.25), images).double()
    wide = images.permute(0, 3, 1, 2).double()
    assert (both - (0.25 * wide + 0.75 * wide.flip(0))).abs().max() <= 0.5


def test_partners_need_not_be_neighbours(isa: str) -> None:
    images = photographs(37, 53)
    index = torch.arange(9) % 2
    far = np.array([5, 7, 8, 0, 4, 1, 2, 3, 6])
    plan = draw("strong+cutmix", range(9), view=0, seed=2, image_size=(37, 53), partners=far)
    got = levels(plan, images[index])
    alone = levels(draw("strong", range(9), view=0, seed=2, image_size=(37, 53)), images[index])
    for row in range(9):
        top, left, bottom, right = plan.table["box"][row]
        expected = alone[row].clone()
        expected[:, top:bottom, left:right] = alone[far[row]][:, top:bottom, left:right]
        assert torch.equal(got[row], expected)


def test_fast_colour_is_one_matrix(isa: str) -> None:
    luma = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)
    calls = {
        "brightness": lambda x, f: x * f,
        "contrast": lambda x, f: x * f + (1 - f) * _grey(x).mean(),
        "color": lambda x, f: x * f + (1 - f) * _grey(x),
    }

    def _grey(x: Tensor) -> Tensor:
        return (x * luma).sum(0, keepdim=True) if x.shape[0] == 3 else x

    for images in (make() for make in sets()):
        for chosen in (
            [("brightness", 1.4), ("contrast", 1.5), ("color", 0.3)],
            [("color", 1.7), ("brightness", 0.5)],
            [("contrast", 0.4), ("rotate", 10.0), ("contrast", 1.9), ("brightness", 0.8)],
        ):
            plan = chain(chosen, images)
            fast = apply(plan, images, dtype=torch.uint8, colour="fast")
            for row, image in enumerate(images):
                expected = image.permute(2, 0, 1)
                parts = [chosen] if len(chosen) < 4 else [chosen[:1], chosen[1:2], chosen[2:]]
                for part in parts:
                    if len(part) == 1:
                        expected = by_peer(*part[0], expected)
                        continue
                    wide = expected.double()
                    for name, factor in part:
                        if name != "color" or wide.shape[0] == 3:
                            wide = calls[name](wide, factor)
                    expected = wide.round().clamp(0, 255).byte()
                assert (fast[row].int() - expected.int()).abs().max() <= 1
        # One linear operation alone is the exact one.
        plan = chain([("brightness", 1.4), ("equalize", 0.0), ("contrast", 0.4)], images)
        assert torch.equal(apply(plan, images, dtype=torch.uint8, colour="fast"),
                           levels(plan, images))  # fmt: skip


def test_opcheck_and_compile() -> None:
    images = photographs(37, 53)
    plan = draw("strong+cutmix", range(2), view=0, seed=0, image_size=(37, 53))
    index = torch.tensor([1, 0])
    for last in (False, True):
        for pixels in range(4):
            torch.library.opcheck(
                torch.ops.fastscarce.augment.default,
                (images, plan.rows, index, [0.5], [0.5], pixels, last, False),
            )
    out = torch.empty(2, 3, 37, 53)
    torch.library.opcheck(
        torch.ops.fastscarce.augment_out.default,
        (images, plan.rows, None, [0.5], [0.5], False, False, out),
    )

    def step(images: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        return 2 * augment(images, rows, index=index, layout=torch.channels_last)

    compiled = torch.compile(step, fullgraph=True)
    assert torch.equal(compiled(images, plan.rows, index), step(images, plan.rows, index))

    def whole(plan: Plan, images: Tensor, labels: Tensor) -> Tensor:
        logits = apply(plan, images).mean(dim=(2, 3))
        return kd_loss(logits, None, plan.mixed_target(labels))

    labels = torch.tensor([2, 0])
    loss = torch.compile(whole, fullgraph=True)(plan, images, labels)
    torch.testing.assert_close(loss, whole(plan, images, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 8, 8, 3)}, "needs uint8 images"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "needs uint8 images"),
        ({"images": torch.zeros(8, 8, 3, dtype=torch.uint8)}, "needs uint8 images"),
        ({"images": torch.zeros(3, 8, 8, 3, dtype=torch.uint8)}, "an image a row"),
        ({"plan": torch.zeros(2, 112, dtype=torch.uint8)}, "a plan's rows"),
        ({"index": torch.zeros(2)}, "int64 index"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, r"shape \(2,\)"),
        ({"dtype": torch.float64}, "dtype float32"),
        ({"layout": torch.preserve_format}, "channels_last"),
        ({"mean": (0.5, 0.5)}, "mean, one number or 3"),
        ({"std": 0.0}, "positive, finite std"),
        ({"colour": "slow"}, "exact or fast"),
        ({"out": torch.zeros(2, 3, 8, 9)}, "needs out of"),
        ({"out": torch.zeros(2, 3, 8, 8, dtype=torch.float16)}, "needs out of"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        "plan": draw("weak", range(2), view=0, seed=0, image_size=8).rows,
        **change,
    }
    images, plan = arguments.pop("images"), arguments.pop("plan")
    with pytest.raises(ValueError, match=message) as caught:
        augment(images, plan, **arguments)  # type: ignore[arg-type]
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("matrix", np.nan), ("matrix", 1e9), ("partner", 2), ("partner", -1), ("operation", 16),
        ("box", [0, 0, 9, 8]), ("box", [-1, 0, 8, 8]), ("erase", [0, 0, 8, 9]), ("mix", 3),
        ("sampling", 2), ("border", 2), ("warp_at", 5), ("lam", 1.5), ("argument", np.inf),
    ],
)  # fmt: skip
def test_rows_that_no_policy_draws_are_refused(field: str, value: object) -> None:
    images = photographs(8, 8)
    plan = one()
    plan.table[field] = value
    with pytest.raises((RuntimeError, ValueError), match="a plan drawn for these rows"):
        levels(plan, images)


@pytest.mark.parametrize("place", [-1, 2, 2**40])
def test_an_index_outside_the_pool_is_refused(place: int) -> None:
    images, plan = photographs(8, 8), one()
    index = torch.tensor([0, place])
    with pytest.raises(ValueError, match="apply needs an index from 0 to 1"):
        apply(plan, images, index=index)
    with pytest.raises((RuntimeError, ValueError), match="an index of images that are there"):
        augment(images, plan.rows, index=index)


def test_no_rows_and_small_images(isa: str) -> None:
    empty = draw("strong", [], view=0, seed=0, image_size=8)
    pool = photographs(8, 8)
    assert apply(empty, pool, index=torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 8, 8)
    for size in ((1, 1), (1, 5), (2, 2), (3, 1)):
        for channels in (1, 3):
            images = torch.randint(0, 256, (40, *size, channels), dtype=torch.uint8)
            for fill in (0, "reflect"):
                policy = replace(get_policy("strong+cutmix"), fill=fill)
                plan = draw(policy, range(40), view=0, seed=0, image_size=size)
                got = apply(plan, images)
                assert got.isfinite().all()
                assert got.abs().max() <= 1.0 + 1e-6


def test_the_row_is_what_the_kernel_reads() -> None:
    offsets = {name: PLAN.fields[name][1] for name in PLAN.names}  # type: ignore[index,union-attr]
    assert PLAN.itemsize == 128
    assert offsets["matrix"] == 28
    assert offsets["operation"] == 84
    assert offsets["amount"] == 108


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda() -> None:
    for images in (make() for make in sets()):
        rows, size = len(images), tuple(images.shape[1:3])
        index = torch.arange(40) % rows
        for policy in ("strong+cutmix", "standard+mixup(0.3)", "weak", "trivialaugment"):
            plan = draw(policy, range(40), view=3, seed=1, image_size=size)
            device = plan.to("cuda")
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8):
                expected = apply(plan, images, index=index, dtype=dtype)
                got = apply(device, images.cuda(), index=index.cuda(), dtype=dtype)
                assert torch.equal(got.cpu(), expected), (policy, dtype)


def test_large_results_share_memory_with_none_that_is_alive() -> None:
    images = photographs(224, 224).repeat(8, 1, 1, 1)
    plans = [draw("weak", range(16), view=view, seed=0, image_size=224) for view in range(6)]
    expected = [torch.stack([apply(plan, images)[row] for row in range(16)]) for plan in plans]
    assert expected[0].nbytes > 4 << 20
    alive: list[Tensor] = []
    places: set[int] = set()
    for turn in range(3):
        for plan, want in zip(plans, expected, strict=True):
            got = apply(
                plan, images, layout=torch.channels_last if turn else torch.contiguous_format
            )
            places.add(got.untyped_storage().data_ptr())
            assert torch.equal(got, want)
            # A part of a result keeps all of it; so does what autograd or another thread holds.
            alive = [*alive[-3:], got[3]]
            for row, number in zip(alive[::-1], range(plans.index(plan), -1, -1), strict=False):
                assert torch.equal(row, expected[number][3])
        assert len({row.untyped_storage().data_ptr() for row in alive}) == len(alive)
    assert len(places) <= 7  # four that are alive, one that is made, two that wait


def test_large_results_of_several_threads() -> None:
    images = photographs(224, 224).repeat(8, 1, 1, 1)
    plans = [draw("weak", range(16), view=view, seed=0, image_size=224) for view in range(4)]
    expected = [apply(plan, images).clone() for plan in plans]

    def many(number: int) -> bool:
        return all(torch.equal(apply(plans[number], images), expected[number]) for _ in range(12))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))
