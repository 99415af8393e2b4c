"""Fused operators: tensors in, tensors out; no dataset and no model is known here."""

from __future__ import annotations

from fastscarce.ops import converters
from fastscarce.ops.dist import dist_loss
from fastscarce.ops.kd import kd_loss
from fastscarce.ops.linear import linear_kd_loss
from fastscarce.ops.modules import DistLoss, KDLoss
from fastscarce.ops.selection import Confidence, confidence, pack_topk, topk, unpack_topk
from fastscarce.ops.statistics import RowStatistics
from fastscarce.ops.targets import MixedTarget, MixedTopK, TopK
from fastscarce.ops.weighted import CrossEntropyLoss, TokenDistillationLoss, WeightedKDLoss

__all__ = [
    "Confidence",
    "CrossEntropyLoss",
    "DistLoss",
    "KDLoss",
    "MixedTarget",
    "MixedTopK",
    "RowStatistics",
    "TokenDistillationLoss",
    "TopK",
    "WeightedKDLoss",
    "confidence",
    "converters",
    "dist_loss",
    "kd_loss",
    "linear_kd_loss",
    "pack_topk",
    "topk",
    "unpack_topk",
]
