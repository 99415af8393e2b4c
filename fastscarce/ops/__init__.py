"""Fused operators: tensors in, tensors out; no dataset and no model is known here."""

from __future__ import annotations

from fastscarce.ops.kd import kd_loss
from fastscarce.ops.modules import KDLoss
from fastscarce.ops.selection import Confidence, confidence, topk
from fastscarce.ops.targets import MixedTarget, MixedTopK, TopK

__all__ = [
    "Confidence",
    "KDLoss",
    "MixedTarget",
    "MixedTopK",
    "TopK",
    "confidence",
    "kd_loss",
    "topk",
]
