"""The teacher's table: what a teacher says of each (sample, view), kept for its students."""

from __future__ import annotations

from fastscarce.cache.build import Built, build
from fastscarce.cache.compare import Difference, diff, export_parquet, info
from fastscarce.cache.maintain import compact, gc
from fastscarce.cache.record import Layout, decode, encode, pack
from fastscarce.cache.samples import Samples, expectation
from fastscarce.cache.sentinel import check_sentinels
from fastscarce.cache.table import TeacherTable
from fastscarce.cache.teacher import Teacher, normalisation
from fastscarce.cache.verify import Deep, Verification, verify

__all__ = [
    "Built",
    "Deep",
    "Difference",
    "Layout",
    "Samples",
    "Teacher",
    "TeacherTable",
    "Verification",
    "build",
    "check_sentinels",
    "compact",
    "decode",
    "diff",
    "encode",
    "expectation",
    "export_parquet",
    "gc",
    "info",
    "normalisation",
    "pack",
    "verify",
]
