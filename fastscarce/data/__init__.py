"""Where images come from, how they are split and in which order they train."""

from __future__ import annotations

from fastscarce.data.crop import decode_crop
from fastscarce.data.decode import Header, decode_whole, inspect, mended
from fastscarce.data.images import ImageSet
from fastscarce.data.labels import relabel, write_split
from fastscarce.data.load import load_images
from fastscarce.data.loader import Loader, LoaderBatch
from fastscarce.data.order import partner_ids
from fastscarce.data.pixels import Decoder, OnDemand, Pixels
from fastscarce.data.quarantine import write_quarantine
from fastscarce.data.sampler import Sampler, SamplerBatch
from fastscarce.data.source import Failure, Reader, Source
from fastscarce.data.sources import load, open_source
from fastscarce.data.splitting import Given, Split, split
from fastscarce.data.stream import Stream, StreamBatch

__all__ = [
    "Decoder",
    "Failure",
    "Given",
    "Header",
    "ImageSet",
    "Loader",
    "LoaderBatch",
    "OnDemand",
    "Pixels",
    "Reader",
    "Sampler",
    "SamplerBatch",
    "Source",
    "Split",
    "Stream",
    "StreamBatch",
    "decode_crop",
    "decode_whole",
    "inspect",
    "load",
    "load_images",
    "mended",
    "open_source",
    "partner_ids",
    "relabel",
    "split",
    "write_quarantine",
    "write_split",
]
