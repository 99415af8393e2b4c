"""What the page of a run shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["ReportContext", "RoundRow"]


@dataclass(frozen=True)
class RoundRow:
    """One round of self-training.

    Attributes:
        round: 1 for the first student.
        teacher_score: What the guard measured of the teacher, in [0, 1].
        student_score: The same of the student.
        guard: What the scores were measured on: ``"holdout"``, ``"folds"`` or ``"agreement"``.
        adopted: Whether the student became the teacher.
        chosen: Pseudo-labelled images the student learned from.
        mean_confidence: Of the chosen; ``None`` where there are none.
        flips: Labels that differ from the round before; ``None`` in the first.
    """

    round: int
    teacher_score: float
    student_score: float
    guard: str
    adopted: bool
    chosen: int
    mean_confidence: float | None = None
    flips: int | None = None


@dataclass(frozen=True)
class ReportContext:
    """A whole page.

    Attributes:
        command: What repeats the run.
        title: Heading of the page.
        summary: Headline numbers by name, accuracies in [0, 1]; ``None`` is shown as a dash.
        rounds: In order.
        curves_png: The figure that `draw_curves` drew; left out where the file is missing.
        confidences: float ``(n,)`` in [0, 1], of the last round's labels.
        chosen: bool ``(n,)``.
        labels: int ``(n,)``.
        class_names: One a class.
        sheet: uint8 images ``(height, width, channels)``, 1 or 3 channels, each with a caption.
        versions: Package names and versions.
        config_yaml: The resolved configuration.
    """

    command: str
    title: str
    summary: dict[str, float | None]
    rounds: list[RoundRow]
    curves_png: Path
    confidences: NDArray[np.floating]
    chosen: NDArray[np.bool_]
    labels: NDArray[np.integer]
    class_names: tuple[str, ...]
    sheet: list[tuple[NDArray[np.uint8], str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    config_yaml: str = ""
