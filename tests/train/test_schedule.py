from __future__ import annotations

import math

import pytest
import torch

from fastscarce.train.schedule import cosine, set_rates


def test_warm_up_is_linear_and_joins_the_cosine() -> None:
    factors = [cosine(step, steps=20, warmup_steps=4) for step in range(20)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4] == 1.0
    expected = [0.5 * (1 + math.cos(math.pi * k / 16)) for k in range(16)]
    assert factors[4:] == pytest.approx(expected)
    assert all(0.0 < factor <= 1.0 for factor in factors)


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 5), (3, 3), (2, 9)])
def test_short_stages_have_a_rate_at_every_step(steps: int, warmup_steps: int) -> None:
    for step in range(steps):
        assert 0.0 < cosine(step, steps=steps, warmup_steps=warmup_steps) <= 1.0


def test_each_group_keeps_its_own_rate() -> None:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate, "initial_lr": rate}
        for rate in (0.1, 0.4)
    ]
    optimizer = torch.optim.SGD(groups)
    for _ in range(2):  # from the initial rate each time, never from the last one
        set_rates(optimizer, 0.5)
        assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.2]
