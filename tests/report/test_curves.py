"""Figures are drawn, look as the numbers say, and bad numbers do no harm."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastscarce.errors import ResultsError
from fastscarce.report import draw_curves
from fastscarce.report.curves import COLOURS, confidence_png, kept_png


def pixels(png: bytes) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3).astype(int)


def painted(png: bytes, colour: str) -> int:
    """How many pixels have very nearly this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels(png) - wanted).max(axis=1) < 12).sum())


def lines(*stages: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for number, stage in enumerate(stages):
        found += [
            {"stage": stage, "step": step, "loss": 2 - step / 200 + number}
            for step in range(0, 200, 10)
        ]
        found.append({"stage": stage, "step": 200, "score": 0.9 - number / 20})
    return found


def test_a_line_a_stage(tmp_path: Path) -> None:
    few = draw_curves(lines("supervised", "teacher"), tmp_path / "few.png").read_bytes()
    more = draw_curves(lines("supervised", "teacher", "student-1"), tmp_path / "more.png")
    assert painted(few, COLOURS[0]) > 200
    assert painted(few, COLOURS[1]) > 200
    assert painted(few, COLOURS[2]) == 0
    assert painted(more.read_bytes(), COLOURS[2]) > 200
    assert Image.open(io.BytesIO(few)).size == (1512, 576)


def test_equal_metrics_give_equal_bytes(tmp_path: Path) -> None:
    one = draw_curves(lines("teacher"), tmp_path / "one.png").read_bytes()
    two = draw_curves(lines("teacher")[::-1], tmp_path / "two.png").read_bytes()
    assert one == two


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"stage": "teacher", "step": 1}],
        [{"note": "no stage"}],
        [{"stage": "teacher", "step": 1, "loss": math.nan, "score": None}],
        [{"stage": f"student-{i}", "step": 1, "loss": 1.0, "score": 0.5} for i in range(15)],
    ],
)
def test_odd_metrics(tmp_path: Path, metrics: list[dict[str, object]]) -> None:
    assert len(pixels(draw_curves(metrics, tmp_path / "curves.png").read_bytes())) == 1512 * 576


def test_histogram_shows_the_kept() -> None:
    values = np.linspace(0, 1, 500)
    none = confidence_png(values, np.zeros(500, dtype=bool))
    half = confidence_png(values, values > 0.5)
    every = confidence_png(values, np.ones(500, dtype=bool))
    assert painted(none, COLOURS[0]) < painted(half, COLOURS[0]) < painted(every, COLOURS[0])


@pytest.mark.parametrize("classes", [2, 10, 40, 1000])
def test_bars_of_any_number_of_classes(classes: int) -> None:
    names = ["a $ b $ c", *(f"name {i} " * 9 for i in range(classes - 1))]
    labels = np.arange(4 * classes) % classes
    assert painted(kept_png(labels, labels >= 0, names), COLOURS[0]) > 500


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="could not be written"):
        draw_curves([], tmp_path / "file" / "curves.png")
