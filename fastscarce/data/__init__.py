"""Where images come from, how they are split and in which order they train."""

from __future__ import annotations

from fastscarce.data.images import ImageSet
from fastscarce.data.sources import load
from fastscarce.data.splitting import Split, split
from fastscarce.data.stream import Stream, StreamBatch

__all__ = ["ImageSet", "Split", "Stream", "StreamBatch", "load", "split"]
