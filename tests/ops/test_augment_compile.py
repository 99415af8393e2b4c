"""apply under torch.compile with a Plan as an argument: one graph, whatever the plan."""

from __future__ import annotations

import torch
from torch import Tensor

from fastscarce.augment import Plan, apply, draw


def test_apply_compiles_without_a_break() -> None:
    images = torch.randint(0, 256, (8, 16, 16, 3)).byte()
    index = torch.arange(8)

    def step(plan: Plan, images: Tensor, index: Tensor) -> Tensor:
        return apply(plan, images, index=index) * 2

    compiled = torch.compile(step, fullgraph=True)
    for view in range(3):
        plan = draw("strong+cutmix", range(8), view=view, seed=0, image_size=16)
        assert torch.equal(compiled(plan, images, index), step(plan, images, index))
