from __future__ import annotations

import numpy as np
import pytest
import torch

from fastscarce.augment import cutmix, partners


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (9, 17)])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("rows", [2, 33, 64])
def test_lam_is_the_share_of_own_pixels(height: int, width: int, alpha: float, rows: int) -> None:
    number = torch.arange(rows, dtype=torch.float32).view(-1, 1, 1, 1)
    images = number.expand(rows, 3, height, width).contiguous()
    mixed, partner, lam = cutmix(images, range(rows), view=4, seed=1, alpha=alpha)
    assert partner.tolist() == partners(rows).tolist()
    assert lam.dtype == torch.float32
    own = mixed == number
    foreign = mixed == partner.float().view(-1, 1, 1, 1)
    assert (own | foreign).all()
    expected = own[:, 0].sum(dim=(1, 2)).double() / (height * width)
    assert torch.equal(lam, expected.float())
    if rows % 2:
        assert partner[-1] == rows - 1
        assert lam[-1] == 1.0


def test_the_foreign_pixels_are_a_box() -> None:
    images = torch.arange(64.0).view(-1, 1, 1, 1).expand(64, 1, 16, 16).contiguous()
    mixed, partner, lam = cutmix(images, range(64), view=0, seed=0, alpha=1.0)
    assert 0.4 < lam.mean() < 0.8
    for row in range(64):
        inside = mixed[row, 0] == partner[row]
        down, across = inside.any(dim=1), inside.any(dim=0)
        assert torch.equal(inside, down[:, None] & across[None])
        for line in (down, across):
            assert (line.int().diff() == 1).sum() + line[0] <= 1


def test_beta_is_beta() -> None:
    rows = 4000
    images = torch.zeros(rows, 1, 1, 1)
    from fastscarce.augment.mix import _beta

    uniform = (np.arange(rows) + 0.5) / rows
    for alpha in (0.3, 1.0, 4.0):
        values = _beta(uniform, alpha)
        assert values.mean() == pytest.approx(0.5, abs=1e-3)
        assert values.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-2)
    assert cutmix(images, range(rows), view=0, seed=0, alpha=0.0)[0] is images


def test_a_box_depends_on_its_row_alone() -> None:
    images = torch.rand(8, 1, 12, 12)
    whole = cutmix(images, range(8), view=1, seed=0, alpha=1.0)
    pair = cutmix(images[4:6], [4, 5], view=1, seed=0, alpha=1.0)
    assert torch.equal(whole[0][4:6], pair[0])
    assert torch.equal(whole[2][4:6], pair[2])


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_refuses_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha of 0 or more"):
        cutmix(torch.zeros(2, 1, 4, 4), [0, 1], view=0, seed=0, alpha=alpha)


def test_refuses_ids_of_another_length() -> None:
    with pytest.raises(ValueError, match="an id a row"):
        cutmix(torch.zeros(2, 1, 4, 4), [0], view=0, seed=0, alpha=1.0)
