"""The CUDA kernels of augmentation, emulated, against the CPU's: see cases.py."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from fastscarce import _ops  # noqa: F401  loads the CPU's kernels

torch.ops.load_library(os.environ["FASTSCARCE_EMULATED"])
emulated = torch.ops.fastscarce_emulated
cpu = torch.ops.fastscarce


def rows_of_any_kind(rows: int, height: int, width: int) -> np.ndarray:
    """A plan whose rows have any operations in any order, before and after any warp."""
    from fastscarce.augment.table import OPERATIONS, new_table

    place = np.random.default_rng(0)
    table = new_table(rows)
    table["operation"] = place.integers(len(OPERATIONS), size=(rows, 4))
    # What reads neighbours or the whole image is not left to chance.
    table["operation"][0] = [OPERATIONS.index(name) for name in
                             ("sharpness", "equalize", "sharpness", "contrast")]  # fmt: skip
    table["operation"][1] = [OPERATIONS.index(name) for name in
                             ("brightness", "autocontrast", "sharpness", "sharpness")]  # fmt: skip
    argument = place.uniform(0.2, 1.8, (rows, 4))
    argument = np.where(table["operation"] == OPERATIONS.index("posterize"), 3.0, argument)
    argument = np.where(table["operation"] == OPERATIONS.index("solarize"), 120.0, argument)
    table["argument"], table["rest"] = argument, 1.0 - argument
    table["warp_at"] = place.integers(5, size=rows)
    table["matrix"][2:] = np.eye(2, 3) + place.normal(0, 0.3, (rows - 2, 2, 3))
    table["matrix"][:, :, 2] += place.integers(-3, 4, size=(rows, 2))
    table["sampling"], table["border"] = place.integers(2, size=(2, rows))
    table["fill"], table["erase_fill"] = place.integers(256, size=(2, rows, 4))
    table["erase"][::3] = [1, 0, height // 2, width // 2]
    table["partner"] = place.permutation(rows)
    table["mix"] = place.integers(3, size=rows)
    table["box"] = [height // 3, width // 3, height, width // 2 + 1]
    table["lam"] = place.uniform(size=rows)
    return table


AUGMENT = [
    (1, "any"), (3, "any"), (3, "randaugment(2, 9)+cutmix"), (3, "standard+mixup"), (1, "weak"),
    (3, "eval"),
]  # fmt: skip


@pytest.mark.parametrize(("channels", "policy"), AUGMENT)
def test_augment(channels: int, policy: str) -> None:
    from fastscarce.augment import draw

    generator = torch.Generator().manual_seed(channels)
    for height, width in ((2, 3), (31, 34)):  # part of a tile; two, most lines of which no 16 fit
        size = (6, height, width, channels)
        images = torch.randint(256, size, generator=generator, dtype=torch.uint8)
        if policy == "any":
            table = rows_of_any_kind(12, height, width)
        else:
            ids = torch.arange(12)
            table = draw(policy, ids, view=3, seed=1, image_size=(height, width)).table
        rows = torch.from_numpy(table.view("u1").reshape(12, -1).copy())
        index = torch.randint(6, (12,), generator=generator)
        cases = [(3, False, False), (0, True, False), (1, False, True), (2, True, True)]
        for number, (pixels, channels_last, fast) in enumerate(cases):
            options = ([0.4], [0.3], pixels, channels_last, fast)
            want = cpu.augment(images, rows, index, *options)
            emulated.set_order(number % 2)
            got = emulated.augment(images, rows, index, *options)
            assert got.stride() == want.stride()
            assert torch.equal(got, want)


def test_augment_of_what_cannot_be_carried_out_is_black() -> None:
    from fastscarce.augment import draw

    images = torch.full((2, 5, 5, 3), 200, dtype=torch.uint8)
    plan = draw("eval", torch.arange(3), view=0, seed=0, image_size=5).table.copy()
    plan["operation"][2, 0] = 99
    rows = torch.from_numpy(plan.view("u1").reshape(3, -1).copy())
    got = emulated.augment(images, rows, torch.tensor([0, 2, 1]), [0.0], [1.0], 3, True, False)
    assert [int(x) for x in got.float().mean((1, 2, 3))] == [200, 0, 0]
