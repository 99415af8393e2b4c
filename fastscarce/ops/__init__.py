"""Fused operators: tensors in, tensors out; no dataset and no model is known here."""

from __future__ import annotations

from fastscarce.ops.kd import kd_loss
from fastscarce.ops.targets import MixedTarget

__all__ = ["MixedTarget", "kd_loss"]
