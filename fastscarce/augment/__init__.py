"""What to do to each image: drawn from (seed, sample id, view) alone, then carried out."""

from __future__ import annotations

from fastscarce.augment.apply import apply
from fastscarce.augment.describe import describe
from fastscarce.augment.draw import draw, draw_batches, neighbours
from fastscarce.augment.plan import Plan, concatenate
from fastscarce.augment.policy import POLICIES, Policy, get_policy, read_policy
from fastscarce.augment.single import plan_of
from fastscarce.augment.steps import (
    STEPS,
    Affine,
    CutMix,
    Erase,
    Flip,
    Jitter,
    MixUp,
    RandAugment,
    ResizedCrop,
    Shift,
    TrivialAugment,
)
from fastscarce.augment.table import MAPPING_VERSION, OPERATIONS, PLAN

__all__ = [
    "MAPPING_VERSION",
    "OPERATIONS",
    "PLAN",
    "POLICIES",
    "STEPS",
    "Affine",
    "CutMix",
    "Erase",
    "Flip",
    "Jitter",
    "MixUp",
    "Plan",
    "Policy",
    "RandAugment",
    "ResizedCrop",
    "Shift",
    "TrivialAugment",
    "apply",
    "concatenate",
    "describe",
    "draw",
    "draw_batches",
    "get_policy",
    "neighbours",
    "plan_of",
    "read_policy",
]
