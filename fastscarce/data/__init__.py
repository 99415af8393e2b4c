"""Where images come from, how they are split and in which order they train."""

from __future__ import annotations

from fastscarce.data.images import ImageSet
from fastscarce.data.order import partner_ids
from fastscarce.data.sampler import Sampler, SamplerBatch
from fastscarce.data.sources import load
from fastscarce.data.splitting import Split, split
from fastscarce.data.stream import Stream, StreamBatch

__all__ = [
    "ImageSet",
    "Sampler",
    "SamplerBatch",
    "Split",
    "Stream",
    "StreamBatch",
    "load",
    "partner_ids",
    "split",
]
