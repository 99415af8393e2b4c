"""Figures and a page of a run."""

from __future__ import annotations

from fastscarce.report.context import ReportContext, RoundRow
from fastscarce.report.curves import draw_curves
from fastscarce.report.page import write_report

__all__ = ["ReportContext", "RoundRow", "draw_curves", "write_report"]
