from __future__ import annotations

import pytest
import torch

from fastscarce.ops import MixedTarget


def test_dense() -> None:
    target = MixedTarget(
        torch.tensor([0, 1, 2, -100]), torch.tensor([2, 1, -100, -100]), torch.full((4,), 0.75)
    )
    assert len(target) == 4
    expected = torch.tensor([[0.75, 0, 0.25], [0, 1, 0], [0, 0, 0.75], [0, 0, 0]])
    torch.testing.assert_close(target.dense(3), expected)


def test_to() -> None:
    zeros = torch.zeros(2, dtype=torch.int64)
    moved = MixedTarget(zeros, zeros, torch.ones(2)).to("meta")
    assert moved.a.device.type == moved.b.device.type == moved.lam.device.type == "meta"


def test_refusals() -> None:
    zeros, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    with pytest.raises(ValueError, match="int64 and lam in float32"):
        MixedTarget(zeros.int(), zeros, ones)
    with pytest.raises(ValueError, match="int64 and lam in float32"):
        MixedTarget(zeros, zeros, ones.double())
    with pytest.raises(ValueError, match="one shape"):
        MixedTarget(zeros, zeros, torch.ones(3))
    with pytest.raises(ValueError, match="one device"):
        MixedTarget(zeros, zeros, ones.to("meta"))
