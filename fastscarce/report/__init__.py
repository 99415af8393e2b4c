"""Figures and a page of a run."""

from __future__ import annotations

from fastscarce.report.context import ReportContext, RoundRow
from fastscarce.report.curves import draw_curves
from fastscarce.report.page import write_report
from fastscarce.report.sheet import draw_sheet, show_augment

__all__ = [
    "ReportContext",
    "RoundRow",
    "draw_curves",
    "draw_sheet",
    "show_augment",
    "write_report",
]
