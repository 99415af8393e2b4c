"""The one training loop, and the jobs that are made of it."""

from __future__ import annotations

from fastscarce.train.distill import distill
from fastscarce.train.finetune import finetune
from fastscarce.train.label import label
from fastscarce.train.run import Run, open_run
from fastscarce.train.selftrain import selftrain
from fastscarce.train.tables import build_table, verify_table
from fastscarce.train.tally import Tally

__all__ = [
    "Run",
    "Tally",
    "build_table",
    "distill",
    "finetune",
    "label",
    "open_run",
    "selftrain",
    "verify_table",
]
