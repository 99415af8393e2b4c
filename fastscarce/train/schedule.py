"""The learning rate as a pure function of the step, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

import torch

__all__ = ["cosine", "set_rates"]


def cosine(step: int, *, steps: int, warmup_steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to 0.

    Args:
        step: The optimiser step about to be taken, from 0.
        steps: Steps in all.
        warmup_steps: Steps of the warm-up.

    Returns:
        A factor in (0, 1].

    Source: Loshchilov and Hutter, "SGDR" (2017), without restarts; warm-up after Goyal et al.,
    "Accurate, Large Minibatch SGD" (2017).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to ``factor`` times its ``initial_lr``."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
