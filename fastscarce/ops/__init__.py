"""Fused operators: tensors in, tensors out; no dataset and no model is known here."""

from __future__ import annotations

from fastscarce.ops.kd import kd_loss
from fastscarce.ops.modules import KDLoss
from fastscarce.ops.targets import MixedTarget

__all__ = ["KDLoss", "MixedTarget", "kd_loss"]
