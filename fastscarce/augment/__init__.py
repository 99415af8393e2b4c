"""What to do to each image: drawn from (seed, sample id, view) alone, then carried out."""

from __future__ import annotations

from fastscarce.augment.kornia import carry_out, views
from fastscarce.augment.mix import cutmix, partners
from fastscarce.augment.policy import MAPPING_VERSION, OPERATIONS, PLAN, POLICIES, Policy, draw

__all__ = [
    "MAPPING_VERSION",
    "OPERATIONS",
    "PLAN",
    "POLICIES",
    "Policy",
    "carry_out",
    "cutmix",
    "draw",
    "partners",
    "views",
]
