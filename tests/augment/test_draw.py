"""What is drawn: distributions, ranges, and that a row depends on its id and view alone."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fastscarce.augment import (
    MAPPING_VERSION,
    OPERATIONS,
    POLICIES,
    Affine,
    CutMix,
    Erase,
    Flip,
    Jitter,
    MixUp,
    Plan,
    Policy,
    RandAugment,
    ResizedCrop,
    Shift,
    TrivialAugment,
    apply,
    draw,
    neighbours,
)
from fastscarce.augment.elementary import cosine_sine, exponential
from fastscarce.augment.steps import Step

ROWS = 7000
SURE = 1e-3  # a distribution is refused at this level; draws are fixed, so it never flickers


def table(*steps: object, rows: int = ROWS, view: int = 1, size: object = 28) -> np.ndarray:
    policy = Policy(tuple(steps))  # type: ignore[arg-type]
    return draw(policy, np.arange(rows), view=view, seed=3, image_size=size).table  # type: ignore[arg-type]


@pytest.mark.parametrize("operations", [1, 2, 3, 4])
def test_randaugment_is_uniform_with_replacement(operations: int) -> None:
    drawn = table(RandAugment(operations))["drawn"][:, :operations]
    for slot in range(operations):
        assert stats.chisquare(np.bincount(drawn[:, slot], minlength=14)).pvalue > SURE
    if operations > 1:
        pairs = np.bincount(drawn[:, 0].astype(int) * 14 + drawn[:, 1], minlength=196)
        assert stats.chisquare(pairs).pvalue > SURE


def test_randaugments_magnitudes_are_torchvisions() -> None:
    from torchvision.transforms.v2 import RandAugment as Peer

    names = {
        "Rotate": "rotate", "Brightness": "brightness", "Color": "color", "Contrast": "contrast",
        "Sharpness": "sharpness", "Posterize": "posterize", "Solarize": "solarize",
        "ShearX": "shear_x", "ShearY": "shear_y", "TranslateX": "translate_x",
        "TranslateY": "translate_y",
    }  # fmt: skip
    for magnitude in (0, 1, 9, 17, 30):
        rows = table(RandAugment(1, magnitude), rows=3000, size=(97, 224))
        for theirs, ours in names.items():
            values, signed = Peer._AUGMENTATION_SPACE[theirs]
            expected = float(values(31, 97, 224)[magnitude])
            if theirs in ("Brightness", "Color", "Contrast", "Sharpness"):
                both = {1 + expected, 1 - expected}
            elif theirs == "Solarize":
                both = {255 * expected}
            elif theirs.startswith("Translate"):
                both = {float(int(expected)), -float(int(expected))}
            else:
                both = {expected, -expected} if signed else {expected}
            got = np.unique(rows["amount"][rows["drawn"][:, 0] == OPERATIONS.index(ours), 0])
            assert np.allclose(got, sorted(both), atol=1e-5), (ours, magnitude)


def test_trivialaugments_magnitudes_are_uniform() -> None:
    rows = table(TrivialAugment(), rows=20000)
    turned = rows["amount"][rows["drawn"][:, 0] == OPERATIONS.index("rotate"), 0]
    steps = np.rint(turned / 4.5).astype(int)
    assert np.allclose(turned, steps * 4.5, atol=1e-4)
    assert np.abs(steps).max() == 30
    assert stats.chisquare(np.bincount(np.abs(steps), minlength=31)).pvalue > SURE


def test_eval_is_the_identity() -> None:
    rows = draw("eval", range(5), view=0, seed=0, image_size=8).table
    assert (rows["matrix"] == np.eye(2, 3)).all()
    for field in ("operation", "erase", "box", "mix"):
        assert not rows[field].any()
    assert (rows["lam"] == 1).all()


@pytest.mark.parametrize("side", [8, 28, 64])
def test_shift_moves_by_whole_pixels(side: int) -> None:
    matrix = table(Shift(0.125), size=side)["matrix"]
    assert (matrix[:, :, :2] == np.eye(2)).all()
    most = {8: 1, 28: 4, 64: 8}[side]
    for axis in range(2):
        values, counts = np.unique(matrix[:, axis, 2], return_counts=True)
        assert values.tolist() == list(range(-most, most + 1))
        assert stats.chisquare(counts).pvalue > SURE


def test_half_is_mirrored() -> None:
    assert 0.48 < (table(Flip())["matrix"][:, 0, 0] < 0).mean() < 0.52
    assert 0.18 < (table(Flip(0.2))["matrix"][:, 0, 0] < 0).mean() < 0.22


def test_affine_stays_in_its_ranges() -> None:
    matrix = table(Affine(rotate=8.0, scale=0.05, translate=0.0625))["matrix"].astype(float)
    scale = np.sqrt(np.linalg.det(matrix[:, :, :2]))
    degrees = np.degrees(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    for values, most in ((np.log(scale), 0.05), (degrees, 8.0), (matrix[:, :, 2], 0.0625 * 28)):
        assert np.abs(values).max() < most * 1.001
        assert values.min() < -0.98 * most
        assert values.max() > 0.98 * most
        assert abs(values.mean()) < 0.03 * most
    sheared = table(Affine(shear_x=0.3, shear_y=0.2))["matrix"].astype(float)
    assert np.allclose(np.linalg.det(sheared[:, :, :2]), 1.0, atol=1e-6)


def test_crops_stay_inside() -> None:
    matrix = table(ResizedCrop((0.08, 1.0)), Flip(), size=(28, 40))["matrix"].astype(float)
    corners = matrix @ np.array([[-20, 14, 1], [20, -14, 1], [-20, -14, 1], [20, 14, 1]]).T
    assert np.abs(corners[:, 0]).max() < 20.001
    assert np.abs(corners[:, 1]).max() < 14.001
    area = np.abs(matrix[:, 0, 0] * matrix[:, 1, 1])
    assert 0.07 < area.min() < 0.12
    assert area.max() > 0.98


def test_jitter_is_uniform() -> None:
    rows = table(Jitter(0.4, 0.3, 0.2, 0.1))
    names = [OPERATIONS[code] for code in rows["operation"][0]]
    assert names == ["brightness", "contrast", "color", "hue"]
    for slot, (centre, spread) in enumerate(((1, 0.4), (1, 0.3), (1, 0.2), (0, 0.1))):
        values = rows["argument"][:, slot].astype(float)
        assert stats.kstest(values, stats.uniform(centre - spread, 2 * spread).cdf).pvalue > SURE


def test_erasing() -> None:
    rows = table(Erase(0.5, (0.02, 0.2)))
    box = rows["erase"]
    erased = box[:, 2] > box[:, 0]
    assert 0.47 < erased.mean() < 0.53
    assert (box >= 0).all()
    assert (box <= 28).all()
    assert (box[erased, 3] > box[erased, 1]).all()
    level = rows["erase_fill"][erased, 0].astype(int)
    assert level.min() == 0
    assert level.max() == 255
    assert (rows["erase_fill"][:, :3] == rows["erase_fill"][:, :1]).all()


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0, 2.5, 8.0])
def test_mixup_is_beta(alpha: float) -> None:
    lam = table(MixUp(alpha), rows=20000)["lam"].astype(float)
    # Near 0 and 1 a float32 has fewer values than the distribution: counted, not compared.
    beta = stats.beta(alpha, alpha)
    edge = 1e-3
    for share, expected in (((lam < edge).mean(), beta.cdf(edge)),
                            ((lam > 1 - edge).mean(), beta.sf(1 - edge))):  # fmt: skip
        assert abs(share - expected) < 4 * np.sqrt(0.25 / 20000)
    inner = lam[(lam >= edge) & (lam <= 1 - edge)]
    low, high = beta.cdf([edge, 1 - edge])
    assert stats.kstest(inner, lambda x: (beta.cdf(x) - low) / (high - low)).pvalue > SURE


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (64, 41)])
def test_cutmix_boxes(alpha: float, size: tuple[int, int]) -> None:
    rows = table(CutMix(alpha), rows=20000, size=size)
    height, width = size
    box = rows["box"].astype(int)
    assert (box[:, :2] >= 0).all()
    assert (box[:, 2] <= height).all()
    assert (box[:, 3] <= width).all()
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    # lam is the area that is left after clipping, exactly.
    assert np.array_equal(rows["lam"], (1.0 - area / (height * width)).astype(np.float32))
    # Boxes that no border clips have the share that Beta says, to the whole pixels of their sides.
    if size == (64, 41):
        inner = (box[:, 0] > 0) & (box[:, 1] > 0) & (box[:, 2] < height) & (box[:, 3] < width)
        side = np.sqrt(1.0 - stats.beta(alpha, alpha).rvs(20000, random_state=1))
        centre = np.random.default_rng(2).random((20000, 2)) * size
        half = np.floor(side[:, None] * size) / 2
        low, high = np.floor(np.floor(centre) - half), np.floor(np.floor(centre) + half)
        free = ((low > 0) & (high < np.array(size))).all(axis=1)
        expected = 1.0 - np.prod(high - low, axis=1)[free] / (height * width)
        assert abs(inner.mean() - free.mean()) < 0.02
        assert stats.ks_2samp(rows["lam"][inner], expected.astype(np.float32)).pvalue > SURE


def test_mixing_probability_and_both() -> None:
    both = table(CutMix(1.0, 0.3), MixUp(1.0, 0.5))["mix"]
    shares = np.bincount(both, minlength=3) / ROWS
    assert np.abs(shares - [0.35, 0.3, 0.35]).max() < 0.02


def test_partners() -> None:
    assert neighbours(5).tolist() == [1, 0, 3, 2, 4]
    plan = draw("weak+cutmix", range(5), view=0, seed=0, image_size=16)
    assert plan.partner.tolist() == [1, 0, 3, 2, 4]
    assert plan.lam[4] == 1.0
    assert plan.table["mix"].tolist() == [1, 1, 1, 1, 0]
    assert not plan.table["box"][4].any()
    own = draw("weak+cutmix", range(3), view=0, seed=0, image_size=16, partners=[2, 1, 0])
    assert own.table["mix"].tolist() == [1, 0, 1]
    for wrong in ([0, 1], [0, 1, 3], [-1, 0, 1]):
        with pytest.raises(ValueError, match="draw needs partners, 3 places from 0 to 2"):
            draw("weak", range(3), view=0, seed=0, image_size=16, partners=wrong)


def fields_of(plan: Plan) -> np.ndarray:
    """All but the partner's place in the batch."""
    rows = plan.table.copy()
    rows["partner"] = 0
    return rows


@pytest.mark.parametrize("policy", [*POLICIES, "strong+cutmix", "randaugment(2, 9)+mixup(0.4)"])
def test_a_row_depends_on_its_id_and_view_alone(policy: str) -> None:
    ids = np.arange(256) * 977 - 2**40
    view = np.arange(256) % 5
    settings = {"seed": 11, "image_size": 33}
    whole = fields_of(draw(policy, ids, view=view, **settings))
    order = np.random.default_rng(1).permutation(128)
    pairs = np.stack([2 * order, 2 * order + 1], axis=1).ravel()
    shuffled = fields_of(draw(policy, ids[pairs], view=view[pairs], **settings))
    assert np.array_equal(shuffled, whole[pairs])
    for first in range(0, 256, 8):
        part = slice(first, first + 8)
        assert np.array_equal(fields_of(draw(policy, ids[part], view=view[part], **settings)),
                              whole[part])  # fmt: skip
    other = fields_of(draw(policy, ids, view=view + 5, **settings))
    if policy != "eval":
        assert (other[["matrix", "operation", "argument"]] !=
                whole[["matrix", "operation", "argument"]]).mean() > 0.5  # fmt: skip


def test_what_is_drawn_stays_as_it_is() -> None:
    """Of this mapping's version: whoever changes what words mean raises it."""
    ids = [0, 1, 2**40 + 7, -9]
    rows = draw("randaugment(2, 9)+cutmix", ids, view=3, seed=5, image_size=(37, 53)).table
    assert MAPPING_VERSION == 3
    assert rows["drawn"][:, :2].tolist() == [[2, 11], [4, 7], [7, 6], [10, 9]]
    assert rows["box"].tolist() == [
        [17, 15, 37, 53],
        [4, 0, 37, 36],
        [0, 22, 30, 53],
        [2, 12, 21, 40],
    ]
    jitter = draw([{"jitter": {"brightness": 0.5}}, "shift"], ids, view=3, seed=5, image_size=40)
    assert jitter.table["argument"][:, 0].tolist() == [
        0.6861106753349304,
        0.8265962600708008,
        1.0076215267181396,
        1.26105535030365,
    ]
    assert jitter.table["matrix"][:, :, 2].tolist() == [
        [5.0, 4.0],
        [3.0, 1.0],
        [3.0, -1.0],
        [-2.0, -2.0],
    ]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("others", [(), (Flip(),), (Jitter(0.3),)])
def test_randaugment_looked_up_is_randaugment_computed(
    steps: int, others: tuple[Step, ...]
) -> None:
    """One magnitude is looked up; a range of hardly more than one is computed a row."""
    rows = [
        table(*others, RandAugment(steps, magnitude), CutMix(), rows=2000, size=(21, 40))
        for magnitude in (9, (9, np.nextafter(9, 10)))
    ]
    for field in ("operation", "drawn", "box", "mix", "warp_at", "lam"):
        assert np.array_equal(rows[0][field], rows[1][field])
    for field in ("matrix", "argument", "rest", "amount"):
        assert np.allclose(rows[0][field], rows[1][field], rtol=1e-6, atol=1e-6)


def test_elementary_functions() -> None:
    x = np.concatenate([np.linspace(-4, 4, 4001), np.pi * np.arange(-4, 5) / 2])
    for value in x:
        cosine, sine = cosine_sine(value)
        assert abs(cosine - math.cos(value)) <= 2**-53
        assert abs(sine - math.sin(value)) <= 2**-53
        assert abs(exponential(value) / math.exp(value) - 1.0) <= 2**-52
    # Zeros of these are tiny numbers, as the argument is rounded: they are kept to float32.
    assert np.float32(cosine_sine(math.pi / 2)[0]) == np.float32(math.cos(math.pi / 2))
    assert np.float32(cosine_sine(math.pi)[1]) == np.float32(math.sin(math.pi))


@pytest.mark.parametrize("policy", ["strong", "weak", "randaugment(2, 9)"])
def test_a_view_is_bit_equal_in_any_batch(policy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for channels, side in ((1, 8), (3, 32), (3, 45)):
        pool = torch.randint(0, 256, (256, side, side, channels), generator=generator).byte()
        ids = np.arange(256) + 5
        whole = apply(draw(policy, ids, view=2, seed=1, image_size=side), pool)
        order = torch.from_numpy(np.random.default_rng(0).permutation(256))
        plan = draw(policy, ids[order], view=2, seed=1, image_size=side)
        assert torch.equal(apply(plan, pool, index=order), whole[order])
        for size in (1, 8):
            for first in range(0, 256, 8 * size):
                part = slice(first, first + size)
                plan = draw(policy, ids[part], view=2, seed=1, image_size=side)
                assert torch.equal(apply(plan, pool[part]), whole[part])


PROCESSES = """
import os, sys, numpy as np, torch
from fastscarce.augment import apply, draw
path = sys.argv[1]
pool = torch.from_numpy(np.load(path + "/pool.npy"))
for processes in (2, 4):
    children = []
    for rank in range(processes):
        children.append(os.fork())
        if children[-1] == 0:
            ids = np.arange(len(pool)).reshape(processes, -1)[rank]
            plan = draw("strong+cutmix", ids, view=7, seed=5, image_size=32)
            views = apply(plan, pool, index=torch.from_numpy(ids))
            np.save(f"{path}/{processes}-{rank}.npy", views.numpy())
            os._exit(0)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
"""


def test_a_view_is_bit_equal_in_any_number_of_processes(tmp_path: Path) -> None:
    pool = torch.randint(0, 256, (32, 32, 32, 3)).byte()
    np.save(tmp_path / "pool.npy", pool.numpy())
    plan = draw("strong+cutmix", range(32), view=7, seed=5, image_size=32)
    here = apply(plan, pool).numpy()
    subprocess.run([sys.executable, "-c", PROCESSES, str(tmp_path)], check=True)
    for processes in (2, 4):
        parts = [np.load(tmp_path / f"{processes}-{rank}.npy") for rank in range(processes)]
        assert np.array_equal(np.concatenate(parts), here)


class _Views(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Views as a loader's workers make them, a sample at a time."""

    def __init__(self, pool: torch.Tensor) -> None:
        self.pool = pool

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, place: int) -> torch.Tensor:
        plan = draw("strong", [place], view=7, seed=5, image_size=16)
        return apply(plan, self.pool[place : place + 1])[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_view_is_bit_equal_in_loader_workers() -> None:
    pool = torch.randint(0, 256, (12, 16, 16, 3)).byte()
    whole = apply(draw("strong", range(12), view=7, seed=5, image_size=16), pool)
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(_Views(pool), batch_size=4, num_workers=workers)
        assert torch.equal(torch.cat(list(loader)), whole)


def test_a_step_at_the_end_leaves_the_others_as_they_were() -> None:
    fields = ["matrix", "operation", "argument"]
    weak = draw("weak", range(50), view=0, seed=0, image_size=28).table[fields]
    mixed = draw("weak+cutmix+erase", range(50), view=0, seed=0, image_size=28).table[fields]
    assert np.array_equal(weak, mixed)


def test_a_flip_that_is_not_drawn_changes_nothing() -> None:
    """What stands before or after the warp stays there; a flip that is drawn joins the warp."""
    settings: dict[str, Any] = {"view": 0, "seed": 0, "image_size": 32}
    plain = draw("randaugment(2, 9)", range(2000), **settings).table
    for policy, share in (("randaugment(2, 9)+flip", 0.5), ("randaugment(2, 9)+flip(0)", 1.0)):
        flipped = draw(policy, range(2000), **settings).table
        same = (flipped["matrix"] == plain["matrix"]).all(axis=(1, 2))
        assert abs(same.mean() - share) < 0.05
        assert np.array_equal(flipped["warp_at"][same], plain["warp_at"][same])


@pytest.mark.parametrize("side", [331, 662])
def test_translations_are_whole_pixels_as_torchvision_counts_them(side: int) -> None:
    for magnitude in (11, 22):
        table = draw(
            f"randaugment(1, {magnitude})", range(400), view=0, seed=0, image_size=side
        ).table
        moved = table["amount"][table["drawn"][:, 0] == OPERATIONS.index("translate_x"), 0]
        assert set(np.abs(moved).tolist()) == {side // 331 * magnitude * 5.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"view": -1}, "view must be from 0"),
        ({"view": [1, 2, 3]}, "one view number, or one a row"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": (3, 4, 5)}, "image_size"),
        ({"sample_ids": [[1]]}, r"sample_ids of shape \(rows,\)"),
        ({"sample_ids": [1.5, 2.0]}, "sample_ids as whole numbers that int64 holds, got float64"),
        (
            {"sample_ids": np.array([2**63], np.uint64)},
            "sample_ids as whole numbers that int64 holds, got uint64",
        ),
        ({"sample_ids": [2**70, 1]}, "sample_ids as whole numbers that int64 holds, got object"),
        ({"view": [0, -3]}, "view must be from 0 to 4294967295, got -3 to 0"),
        ({"view": 0.5}, "view as whole numbers"),
        ({"image_size": 8.0}, "image_size, one side or .*got 8.0"),
        ({"image_size": None}, "image_size, one side or .*got None"),
        ({"seed": 1.5}, "a whole number as its seed, got 1.5"),
        ({"partners": [0.0, 1.0]}, "partners as whole numbers"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "sample_ids": [1, 2], "view": 0, "seed": 0, "image_size": 8, **change
    }  # fmt: skip
    ids = arguments.pop("sample_ids")
    with pytest.raises(ValueError, match=message) as caught:
        draw("weak", ids, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
