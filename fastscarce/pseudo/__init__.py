"""From a teacher's rows to labels: how sure, how well calibrated, which to learn from."""

from __future__ import annotations

from fastscarce.pseudo.calibrate import (
    expected_calibration_error,
    temperature,
    threshold_for_precision,
)
from fastscarce.pseudo.label import (
    PseudoLabels,
    align,
    alignment,
    concatenate,
    from_logits,
    label_flips,
)
from fastscarce.pseudo.select import select
from fastscarce.pseudo.table import LabelTable, read_parquet, write_parquet

__all__ = [
    "LabelTable",
    "PseudoLabels",
    "align",
    "alignment",
    "concatenate",
    "expected_calibration_error",
    "from_logits",
    "label_flips",
    "read_parquet",
    "select",
    "temperature",
    "threshold_for_precision",
    "write_parquet",
]
